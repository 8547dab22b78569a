"Specs: files, overrides, kinds, ranges, nearest names, published experiments."
import importlib.util
import dataclasses
from pathlib import Path

import pytest

from strlora.core import SpecError, read_json, sources
from strlora.folder import folder_of
from strlora.methods.table import METHODS
from strlora.spec import EXECUTION, GROUPS, RunSpec, as_dict, digest, explain, flat, load, override, resolve

ROOT = Path(__file__).parents[1]
EXPERIMENTS = sorted((ROOT/"experiments").rglob("*.toml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: "/".join(p.parts[-3:]))
def test_every_experiment_resolves_and_holds_only_differences(path):
    given = load(path)
    spec, base = resolve(given, path), flat(as_dict(resolve({"method": given.get("method", "strlora")})))
    base["method"] = "strlora"
    for name, value in flat(given).items(): assert base.get(name, "") != value, f"{name} = {value} is the default"
    assert folder_of(spec).parts[1:4] == (*path.parts[-3:-1], path.stem), "folder and name say what is run"


def test_there_are_experiments():
    assert {p.stem for p in EXPERIMENTS} >= set(METHODS)


def test_finished_runs_are_those_of_the_experiments():
    "What stands in results/ was made with the settings that stand in experiments/, whatever was written later."
    odd = {}
    for path in sorted((ROOT/"results"/"mini").glob("*/*/seed*/run.json")):
        info, (stream, method, seed) = read_json(path), path.parts[-4:-1]
        if info["status"] != "finished": continue
        file = ROOT/"experiments"/"mini"/stream/f"{method}.toml"
        wanted, there = (flat(as_dict(spec)) for spec in (resolve(override(load(file), [f"seed={seed[4:]}"]), file), resolve(info["spec"], path)))
        names = [name for name in sorted({*wanted, *there}) if name not in EXECUTION and wanted.get(name) != there.get(name)]
        if names: odd[f"{stream}/{method}/{seed}"] = names
    assert not odd, "make a run with other settings again (strlora run FILE --seed N --again)"


# ---------------------------------------------------------------- paper scale

PAPER = [p for p in EXPERIMENTS if p.parts[-3] == "paper"]
spec_file = importlib.util.spec_from_file_location("make_paper_specs", ROOT/"tools"/"make_paper_specs.py")
tool = importlib.util.module_from_spec(spec_file)
spec_file.loader.exec_module(tool)


def test_paper_specs_are_what_the_tool_writes():
    assert {(p.parent.name, p.stem) for p in PAPER} == {(b, m) for b in tool.BACKBONES for m in tool.METHODS}
    assert set(tool.METHODS) == {m for m in METHODS if not METHODS[m].follows}, "every method but the ablations"
    for p in PAPER: assert p.read_text(encoding="utf-8") == tool.text(p.parent.name, p.stem), f"run tools/make_paper_specs.py: {p}"


def test_specs_of_other_streams_are_what_the_tool_writes():
    found = importlib.util.spec_from_file_location("make_stream_specs", ROOT/"tools"/"make_stream_specs.py")
    moving = importlib.util.module_from_spec(found)
    found.loader.exec_module(moving)
    here = {p.stem: p.read_text(encoding="utf-8") for p in EXPERIMENTS if p.parts[-2] == "windows"}
    there = {(p.parts[-2], p.stem): p.read_text(encoding="utf-8") for p in EXPERIMENTS if p.parts[-3] == "mini" and p.parts[-2] != "windows"}
    wanted = {(s, m): moving.moved(text, m, s) for m, text in here.items() for s in moving.STREAMS}
    wanted |= {(f"windows-{b}", m): moving.on_base(text, m, b) for m, text in here.items() for b in moving.BASES}
    assert there == wanted, "run tools/make_stream_specs.py"


@pytest.mark.parametrize("path", PAPER, ids=lambda p: "/".join(p.parts[-2:]))
def test_paper_specs_follow_the_released_protocol(path):
    spec = resolve(load(path), path)
    assert (spec.seed, spec.stream.chunks, spec.stream.chunk_size, spec.eval.max_new_tokens, spec.train.precision) == (42, 25, 2000, 100, "bf16")
    for text in path.read_text(encoding="utf-8").splitlines():
        if " = " in text and not text.startswith(("#", "method")): assert text.partition("  # ")[2], f"no source: {text}"
    if spec.method == "zero_shot": return
    train = spec.train
    assert train.batch_size * train.accumulation == 32 and train.accumulation % 4 == 0 and train.gradient_checkpointing and train.max_length == 4096
    assert (train.schedule, train.schedule_later, train.warmup, train.optimizer_state) == ("cosine", "constant", 0.05, "restart")
    assert (train.betas, train.weight_decay, train.clip, train.projector_lr) == ((0.9, 0.95), 0.1, 1.0, 1e-5)
    assert (spec.settings.r, spec.settings.lora_alpha, spec.settings.lora_dropout) == (64, 128.0, 0.05)
    if spec.method != "joint": assert train.lr_later == 2e-5
    slow = spec.method == "smolora_released" and path.parent.name != "gemma3_4b"
    assert train.lr == (2e-5 if slow else 1e-4) and train.train_projector == (path.parent.name != "gemma3_4b")
    if spec.method == "strlora_released":
        assert (spec.settings.kl_weight, spec.settings.kl_from_chunk) == (0.1, 2)
        assert spec.settings.freeze_from_chunk == (4 if path.parent.name == "gemma3_4b" else 5)
    if spec.method == "strlora": assert (spec.settings.kl_from_chunk, spec.settings.freeze_from_chunk, spec.settings.stage1) == (1, 0, "prior")


@pytest.mark.parametrize("method", tool.METHODS)
def test_backbones_differ_only_in_what_is_named(method):
    specs = {b: flat(as_dict(resolve(load(tool.FOLDER/b/f"{method}.toml")))) for b in tool.BACKBONES}
    named = {"model.base"} | ({"train.train_projector"} if method != "zero_shot" else set())
    if method == "strlora_released": named |= {"settings.freeze_from_chunk"}
    if method == "smolora_released": named |= {"train.lr", "train.batch_size", "train.accumulation"}
    assert {name for name, value in specs["internvl3_5_8b"].items() if value != specs["gemma3_4b"][name]} == named
    assert {name for name, value in specs["internvl3_5_8b"].items() if value != specs["internvl3_5_4b"][name]} == {"model.base"}


def test_methods_share_what_is_not_theirs():
    "On one backbone, methods differ in what the method's own entries name and in nothing else."
    shared = lambda m: {n: v for n, v in flat(as_dict(resolve(load(tool.FOLDER/"gemma3_4b"/f"{m}.toml")))).items() if "settings" not in n and n != "method"}
    for method in set(tool.METHODS) - {"zero_shot", "joint"}: assert shared(method) == shared("lora"), method


def test_no_differences_give_the_main_job():
    spec = resolve()
    assert (spec.method, spec.scale, spec.stream.name, spec.stream.chunks, spec.stream.chunk_size) == ("strlora", "mini", "windows", 25, 200)


@pytest.mark.parametrize("values, words", [
    ({"metod": "lora"}, "unknown setting 'metod'.*'method'"),
    ({"method": "strlra"}, "unknown method 'strlra'.*'strlora'"),
    ({"stream": {"name": "windws"}}, "unknown name 'windws'.*'windows'"),
    ({"train": {"optimiser_state": "carry"}}, "optimizer_state"),
    ({"train": {"lr": "1e-3"}}, "train.*: lr: expected float, found '1e-3'"),
    ({"train": {"lr": True}}, "expected float, found True"),
    ({"train": {"batch_size": 1.5}}, "expected int, found 1.5"),
    ({"train": {"betas": [0.9]}}, "betas"),
    ({"train": {"lr": -1.0}}, "train.lr: expected at least 0"),
    ({"train": {"lr": float("nan")}}, "train.lr"),
    ({"stream": {"chunks": 0}}, "stream.chunks: expected at least 1"),
    ({"stream": {"test_size": 5}}, "proxy_size"),
    ({"train": 3}, "expected a table"),
    ({"settings": {"r": 10}}, "r = 10, num_experts = 4"),
    ({"settings": {"top_k": 5}}, "top_k.*num_experts = 4"),
    ({"method": "lora", "settings": {"top_k": 1}}, "unknown setting 'top_k'"),
])
def test_mistakes_are_named(values, words):
    with pytest.raises(SpecError, match=words): resolve(values)


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(SpecError, match="no such file"): load(tmp_path/"none.toml")
    (tmp_path/"bad.toml").write_text("lr = = 3")
    with pytest.raises(SpecError, match="bad.toml"): load(tmp_path/"bad.toml")


def test_overrides():
    spec = resolve(override({"train": {"lr": 0.5}}, ["top_k=1", "train.lr=2e-4", "optimizer_state=carry", "stream.seed=4", "seed=3"]))
    assert (spec.settings.top_k, spec.train.lr, spec.train.optimizer_state, spec.stream.seed, spec.seed) == (1, 2e-4, "carry", 4, 3)
    assert resolve(override({}, ["lora_alpha=32", "method=lora"])).settings.lora_alpha == 32.0, "the method counts before its settings"
    for wrong in ("lr", "learning_rate=1", "train.lrr=1", "batch_sizes=1"):
        with pytest.raises(SpecError): override({}, [wrong])


def test_a_digest_names_what_was_changed():
    assert digest(resolve({"seed": 4, "method": "lora", "stream": {"name": "strcvit"}})) == ""
    assert digest(resolve({"train": {"threads": 1}})) == "", "how it is executed does not change what it is"
    a, b = digest(resolve({"train": {"lr": 0.1}})), digest(resolve({"train": {"lr": 0.2}}))
    assert a and b and a != b


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_has_a_source_and_survives_the_record(method):
    spec = resolve({"method": method})
    for row in explain(spec): assert row["source"] and row["help"], row["name"]
    assert {r["name"] for r in explain(spec)} == set(flat(as_dict(spec))) | {"stream.data", "stream.images", "stream.bad_images"}
    assert resolve(as_dict(spec)) == spec
    files = dataclasses.replace(spec, stream=dataclasses.replace(spec.stream, data="somewhere", images="elsewhere"))
    assert {r["name"] for r in explain(files)} == set(flat(as_dict(files))) and resolve(as_dict(files)) == files
    for cls in (RunSpec, *GROUPS.values()): assert sources(cls)


def test_presets_agree_with_the_adapters_defaults():
    from strlora.tuner.config import StrLoraConfig
    for method, config in (("strlora", StrLoraConfig()), ("strlora_released", StrLoraConfig.released())):
        settings = as_dict(resolve({"method": method}))["settings"]
        differ = {k: (v, getattr(config, k)) for k, v in settings.items() if hasattr(config, k) and getattr(config, k) != v}
        assert set(differ) <= {"lora_dropout", "init_experts"}, differ


@pytest.mark.parametrize("values, found", [({"train": {"lr": float("inf")}}, "train.lr"), ({"train": {"betas": [2.0, 3.0]}}, "betas"),
                                           ({"train": {"warmup": 5.0}}, "warmup"), ({"settings": {"kl_weight": float("nan")}}, "settings.kl_weight"),
                                           ({"settings": {"top_k": -1}}, "from 0 to num_experts")])
def test_numbers_that_no_run_can_use(values, found):
    with pytest.raises(SpecError, match=found): resolve(values)


def test_the_study_names_every_method():
    text = (ROOT/"Makefile").read_text(encoding="utf-8")
    named = {name: line.partition(":=")[2].split() for line in text.splitlines() for name in ("COMPARED", "ABLATED", "ROUTED")
             if line.startswith(name)}
    assert {*named["COMPARED"], *named["ABLATED"]} == set(METHODS) and not {*named["COMPARED"]} & {*named["ABLATED"]}
    assert {m for m in named["ABLATED"]} == {m for m in METHODS if METHODS[m].follows}
    assert set(named["ROUTED"]) < set(named["COMPARED"])
