"Plans: what they count and what they estimate, what cannot fit, how runs are launched."
import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from small import make_base, rows, session, short_spec
from test_cli import said

from strlora import runs
from strlora.core import SpecError
from strlora.data.mini.export import export_mini
from strlora.data.rules import KNOWN
from strlora.duration import Setup, asking_of, chunks_of, gpus_of, looks_at, questions_of, tokens_of
from strlora.plan import STRATEGIES, memory, state_bytes
from strlora.schedule import check_processes
from strlora.sizes import known, sizes
from strlora.spec import load, resolve

ROOT = Path(__file__).parents[1]
PAPER = ROOT/"experiments"/"paper"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def held(value, found):
    "Storages of all tensors within → their bytes."
    if isinstance(value, torch.Tensor): found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict): [held(v, found) for v in value.values()]
    elif isinstance(value, (list, tuple)): [held(v, found) for v in value]
    elif isinstance(value, functools.partial): held((value.args, value.keywords), found)
    elif type(value).__module__.startswith("strlora.") and hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module): held(vars(value), found)
    return found


@pytest.mark.parametrize("method, least", [("ewc", 1.0), ("lwf", 1.0), ("olora", 0.5), ("same", 0.2), ("branchlora", 0.05), ("strlora_prototypes", 0.9), ("lora", 1.0), ("moelora", 1.0), ("strlora", 0.7)])
def test_what_a_method_keeps_is_what_the_plan_says(base, method, least):
    "At the fullest moment of two short chunks; for some methods the plan is an upper bound."
    more = {"ewc": ["fisher_samples=2"], "strlora_prototypes": ["r=32"], "olora": ["num_experts=4"],
            "strlora": ["oracle_task_id=true", "num_experts=32", "r=32"]}
    pairs = [f"method={method}", "stream.chunks=2", "chunk_size=4", *more.get(method, [])]
    job = session(base, *pairs)
    own = {p.untyped_storage().data_ptr() for p in (*job.model.parameters(), *job.model.buffers())}
    most, parts = 0, [*job.trainer.parts.values()]
    def look():
        nonlocal most
        found = {}
        for part in parts: held({k: v for k, v in vars(part).items() if k != "routers"}, found)
        most = max(most, sum(size for place, size in found.items() if place not in own))
    for part in parts:
        def watched(run, after=part.after_backward):
            after(run)
            look()
        part.after_backward = watched
    job.trainer.fit(job.seen)
    look()
    planned = state_bytes(sizes(short_spec(base, *pairs), torch.float32), short_spec(base, *pairs))
    assert least * planned <= most <= 1.01 * planned + 4096, (method, most, planned)


def test_every_part_of_memory_is_there():
    spec = resolve(load(PAPER/"internvl3_5_4b"/"strlora.toml"))
    s = sizes(spec)
    rows = {name: memory(s, spec, Setup(4, 80, name, tokens_of(s), 2, True)) for name in STRATEGIES}
    for found in rows.values():
        assert {"frozen weights", "trained weights", "gradients", "AdamW's moments", "slow routers", "fragmentation"} <= found.keys()
        assert all(value > 0 for value in found.values())
    ddp = rows["ddp"]
    assert ddp["frozen weights"] == 2 * s.sum("numbers", "language model", "vision tower", "projector")
    assert ddp["AdamW's moments"] == 2 * ddp["gradients"] == 2 * s.sum("trained_size")
    assert ddp["slow routers"] == 4 * s.sum("numbers", "slow routers")


def test_samples_of_a_stream():
    chunks = lambda method: chunks_of(resolve({"method": method, "stream": {"chunks": 3, "chunk_size": 300}}))
    assert chunks("lora") == [300] * 3 and chunks("joint") == [900] and chunks("zero_shot") == [] and chunks("replay") == [300, 400, 400]


@pytest.mark.parametrize("words, code, found", [
    (["--gpus", "4x80"], 0, "in all"), (["--gpus", "1x0.01"], 1, "expected at most 0.01 GB"), (["--gpus", "fourx80"], 2, "for example 4x80"),
    (["--gpus", "3x80"], 2, "divides train.accumulation"), (["--mfu", "0"], 2, "--mfu"), (["--set", "model.base=nowhere"], 2, "Correct the path"),
    (["--set", "model.base=org/unheard_of"], 2, "hf download org/unheard_of config.json --local-dir models/unheard_of"), (["--mbu", "0"], 2, "--mbu"),
    (["--method", "lroa"], 2, "'lora'"), (["--method", "zero_shot"], 0, "no training"),
])
def test_the_command(words, code, found):
    got, out, err = said("plan", "--set", "accumulation=4", *words) if "zero_shot" not in words else said("plan", *words)
    assert got == code and found in out + err, (got, out, err)
    assert ("an estimate" in out) == (code < 2) and (code == 0) == (err == "")
    if code: assert err.startswith("strlora: ") and err.count("\n") == 1


def test_the_plan_as_json():
    code, out, _ = said("plan", "--set", "accumulation=4", "--gpus", "2x80", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["estimate"] and plan["fits"] and plan["course"]["passes_a_gpu"] == 2
    assert plan["memory_total"] == pytest.approx(sum(plan["memory"].values()))


@pytest.mark.parametrize("pairs", [["eval.before=false", "eval.full_every=2"], ["eval.every=2"], ["method=joint", "eval.every=2", "eval.full_every=1"],
                                   ["method=zero_shot", "eval.full_every=3"]], ids=" ".join)
def test_a_run_asks_what_the_plan_says(base, tmp_path, pairs):
    spec = short_spec(base, "method=lora", "test_size=3", *pairs) if not any("method" in p for p in pairs) else short_spec(base, "test_size=3", *pairs)
    runs.start(spec, tmp_path/"run")
    found = Counter((r["split"], r["after_chunk"]) for r in rows(tmp_path/"run"))
    looks, (questions, counted) = looks_at(spec), questions_of(spec)
    assert counted and {split: sum(s == split for s, _ in found) for split in looks} == looks
    assert all(n == sum(questions[split].values()) for (split, _), n in found.items())
    s = sizes(spec, torch.float32)
    plan = asking_of(s, spec, Setup(1, 80, "ddp", tokens_of(s), 4, False))
    assert plan["asked"] == sum(found.values()) and plan["hours"] > 0
    assert plan["new_tokens"] == sum(KNOWN[r["task"]].max_new_tokens for r in rows(tmp_path/"run"))


def test_questions_are_counted_where_the_files_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_mini(tmp_path/"mini", chunks=2, chunk_size=4, test_size=3, proxy_size=2)
    words = ["plan", "--set", "accumulation=4", "--set", "stream.data=mini", "--json"]
    plan = json.loads(said(*words)[1])
    assert plan["asking"]["counted"] and plan["asking"]["questions"] == {"full": 33, "proxy": 22} and plan["asking"]["asked"] == 3 * 22
    absent = said("plan", "--set", "accumulation=4", "--set", "stream.data=absent")[1]
    assert "absent is not there to be counted" in absent and "440 questions of the proxies 26 times" in absent
    assert plan["hours"] == plan["asking"]["hours"] + plan["course"]["hours"]


def test_the_defaults_of_the_command_are_those_of_the_setup():
    g = json.loads(said("plan", "--set", "accumulation=4", "--json")[1])["setup"]
    assert all(g[f.name] == f.default for f in dataclasses.fields(Setup) if f.name in ("peak", "mfu", "bandwidth", "mbu"))


def test_a_folder_that_would_need_code_is_refused(tmp_path):
    (tmp_path/"config.json").write_text('{"model_type": "internvl_chat"}')
    code, _, err = said("plan", "--set", f"model.base={str(tmp_path)!r}", "--set", "accumulation=4")
    assert code == 2 and "strlora convert" in err


def test_sizes_of_gpus():
    assert gpus_of("4x80") == (4, 80.0) and gpus_of("1X24.5") == (1, 24.5)
    for wrong in ("4", "x80", "0x80", "4x0", "4x", "-1x80"):
        with pytest.raises(SpecError): gpus_of(wrong)


def test_architectures_name_their_sources():
    for name, record in known().items():
        assert record["sources"] and record["published"]["total"] and record["config"]["model_type"], name


# ---------------------------------------------------------------- recipes

@pytest.mark.parametrize("name, kind", [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED")])
def test_recipes_are_read_by_accelerate(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file
    config = load_config_from_file(str(ROOT/"recipes"/f"{name}.yaml"))
    assert config.distributed_type.value == kind and config.mixed_precision == "bf16" and config.num_processes == 4
    assert name != "fsdp2" or config.fsdp_config["fsdp_version"] == 2
    assert name != "zero2" or config.deepspeed_config["zero_stage"] == 2
    for file in PAPER.glob("*/*.toml"):
        train = resolve(load(file)).train
        if file.stem != "zero_shot": check_processes(train.batch_size, train.accumulation, config.num_processes)


def recipe():
    spec = importlib.util.spec_from_file_location("make_paper_recipe", ROOT/"tools"/"make_paper_recipe.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_recipe_runs_every_method_and_says_what_it_costs():
    text = (ROOT/"recipes"/"paper.sh").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(ROOT/"recipes"/"paper.sh")]).returncode == 0
    costs = dict(reversed(pair) for pair in re.findall(r"^(# \d+ GB a GPU, .*)\nonce (\w+)$", text, re.M))
    tool = recipe()
    assert list(costs) == list(tool.ORDER) and set(costs) == set(tool.METHODS) and (tool.ORDER[0], tool.ORDER[-1]) == ("zero_shot", "joint")
    for method in ("lora", "zero_shot"): assert costs[method] == tool.remark(method), "run tools/make_paper_recipe.py"


def test_the_recipe_goes_on_after_a_method_that_fails_and_says_which(tmp_path):
    "The two commands are stood in for: they write down their words; `lora` does not fit, `ewc` stops."
    stub = f"""#!{sys.executable}
import sys
from pathlib import Path
name, words = Path(sys.argv[0]).name, sys.argv[1:]
with Path("said").open("a") as file: print(name, *words, file=file)
if (words[0] == "plan" and "/lora.toml" in words[1]) or (name == "accelerate" and "/ewc.toml" in " ".join(words)): sys.exit(1)
if "--out" in words:
    folder = Path(words[words.index("--out") + 1])
    folder.mkdir(parents=True)
    (folder/"run.json").write_text('{{"status": "finished"}}')
"""
    for file, text in (("recipes/paper.sh", (ROOT/"recipes"/"paper.sh").read_text()), (".venv/bin/strlora", stub), (".venv/bin/accelerate", stub)):
        (tmp_path/file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/file).write_text(text)
        (tmp_path/file).chmod(0o755)

    def run(): return subprocess.run([tmp_path/"recipes"/"paper.sh"], capture_output=True, text=True, env={**os.environ, "CONFIG": "recipes/fsdp2.yaml"})

    done, said = run(), (tmp_path/"said").read_text().splitlines()
    assert done.returncode == 1 and "2 failed: lora ewc" in done.stderr
    order, tool = [re.search(r"/(\w+)\.toml", line)[1] for line in said if " plan " in line], recipe()
    assert order == list(tool.ORDER) and all(line.endswith("--gpus 4x80 --strategy fsdp2") for line in said if " plan " in line)
    launched = [line for line in said if line.startswith("accelerate")]
    assert len(launched) == len(order) - 1 and all("--config_file recipes/fsdp2.yaml --num_processes 4 -m strlora run" in line for line in launched)
    assert said[-1] == " ".join(["strlora report", *(f"results/paper/internvl3_5_8b/{m}/seed42" for m in order if m not in ("lora", "ewc"))])
    run()
    again = (tmp_path/"said").read_text().splitlines()[len(said):]
    assert sum(line.startswith("accelerate") for line in again) == 1, "finished runs are kept"


@pytest.mark.slow
def test_the_recipe_is_what_the_tool_writes():
    assert (ROOT/"recipes"/"paper.sh").read_text(encoding="utf-8") == recipe().text(), "run tools/make_paper_recipe.py"
