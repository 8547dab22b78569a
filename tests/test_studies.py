"Fair search and comparison: budget, choice, seeds kept apart, processes side by side, what is written."
import contextlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import make_base
from test_cli import said

from strlora import cli, compare, parallel, toml, tune
from strlora.core import SpecError, TrainingError, read_json, write_json
from strlora.data.mini.bench import REPORTING_SEEDS, TUNING_SEEDS
from strlora.data.mini.export import export_mini
from strlora.methods.table import METHODS
from strlora.request import asked, experiment
from strlora.runs import status_of
from strlora.spec import as_dict, flat, load, resolve

SPEC = """# a small {method}
method = "{method}"

[model]
base = {base!r}

[stream]
chunks = 2
chunk_size = 8
test_size = 1
proxy_size = 1

[train]
batch_size = 4
save_every = 1

[settings]
r = 8
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def place(base, tmp_path, monkeypatch):
    "A working folder with experiments of seconds."
    monkeypatch.chdir(tmp_path)
    for method in ("lora", "strlora", "joint"):
        file = Path("experiments/mini/windows", f"{method}.toml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(SPEC.format(method=method, base=base))
    return tmp_path


# ---------------------------------------------------------------- the search

def searched(monkeypatch, method, score):
    "The search with made-up scores; what was tried and chosen."
    monkeypatch.setattr(tune, "work_off", lambda runs, jobs, later=0: None)
    monkeypatch.setattr(tune, "scored", lambda run, single, setting: {"MAP": score(setting), "final AP": score(setting), "seed": run.spec.seed,
                                                                      "method": method, "settings": tune.told(setting)})
    rows, best = tune.search(method, "windows", 1, None)
    return list(dict.fromkeys(r["settings"] for r in rows)), rows, best


def test_the_search_goes_from_the_best_to_the_next_stage(monkeypatch):
    wanted = {"train.lr": 2e-3, "train.lr_later": 4e-4, "settings.kl_weight": 0.3, "settings.ema_decay": 0.99}
    tried, rows, best = searched(monkeypatch, "strlora", lambda s: sum(s[k] == v for k, v in wanted.items()))
    assert best == wanted and len(tried) == 9 and [r["seed"] for r in rows].count(TUNING_SEEDS[0]) == 9
    again = [r["settings"] for r in rows if r["seed"] == TUNING_SEEDS[1]]
    assert tune.told(best) in again and len(set(again)) == len(again) < 9, "the second seed is for the best"


def test_equal_scores_change_nothing(monkeypatch):
    for method in ("strlora", "lora"): assert searched(monkeypatch, method, lambda s: 50.0)[2] == tune.defaults(method)


def test_the_second_seed_decides_among_the_best(monkeypatch):
    "What is best on the first seed alone is not chosen; what was third there is not looked at again."
    first, second = {2.5e-4: 1, 5e-4: 9, 1e-3: 10, 2e-3: 8}, {5e-4: 9, 1e-3: 1, 2e-3: 99}
    scores = {TUNING_SEEDS[0]: first, TUNING_SEEDS[1]: second}
    monkeypatch.setattr(tune, "work_off", lambda runs, jobs, later=0: None)
    monkeypatch.setattr(tune, "scored", lambda run, single, setting: {
        "final AP": scores[run.spec.seed][setting["train.lr"]], "seed": run.spec.seed, "settings": tune.told(setting)})
    rows, best = tune.search("joint", "windows", 1, None)
    assert best["train.lr"] == 5e-4 and len(rows) == 6
    second[1e-3] = math.nan
    rows, best = tune.search("joint", "windows", 1, None)
    assert best["train.lr"] == 2e-3 and len(rows) == 7, "one that diverges makes room for the next"


def test_what_follows_takes_over_what_it_shares(place):
    with pytest.raises(SpecError, match="strlora tune strlora"): tune.check_method("strlora_select")
    assert tune.followers("strlora", "windows") == []
    Path("experiments/mini/windows/strlora_no_reg.toml").write_text('method = "strlora_no_reg"')
    assert tune.followers("strlora", "windows") == ["strlora_no_reg"]
    assert tune.shared("strlora", "strlora_no_reg", {"train.lr": 5e-4, "settings.kl_weight": 0.3}) == {"train.lr": 5e-4}
    assert all(METHODS[m.follows].follows == "" for m in METHODS.values() if m.follows)


def test_joint_has_no_later_rate(monkeypatch):
    tried, _, best = searched(monkeypatch, "joint", lambda s: s["train.lr"])
    assert len(tried) == 4 and best["train.lr"] == 2e-3


def test_what_diverges_is_not_chosen(monkeypatch):
    assert searched(monkeypatch, "lora", lambda s: math.nan if s["train.lr"] > 1e-3 else s["train.lr"])[2]["train.lr"] == 1e-3
    with pytest.raises(TrainingError): searched(monkeypatch, "lora", lambda s: math.nan)


def test_more_knobs_than_the_budget_are_refused(monkeypatch):
    import dataclasses
    monkeypatch.setitem(METHODS, "lora", dataclasses.replace(METHODS["lora"], knobs={"settings.r": (1, 2, 4, 8, 16)}))
    with pytest.raises(SpecError, match="at most 9"): tune.check_method("lora")


def test_seeds_are_kept_apart(place):
    assert not set(TUNING_SEEDS) & set(REPORTING_SEEDS) and set(REPORTING_SEEDS) == set(range(20))
    file = Path("experiments/mini/windows/lora.toml")
    file.write_text(file.read_text().replace("chunks = 2", "chunks = 2\nseed = 3"))
    code, _, err = said("tune", "lora", "--limit", "1")
    assert code == 2 and "stream.seed" in err and "3" in err
    file.write_text(file.read_text().replace("seed = 3", "seed = 100"))
    code, _, err = said("compare", "lora")
    assert code == 2 and "stream.seed" in err


def test_dry_runs_start_nothing(place):
    grid = json.loads(said("tune", "strlora", "--dry-run", "--json")[1])
    assert len(grid) == 9 and grid[0]["seeds"] == [100, 101] and "best train.lr" in grid[4]["setting"]
    rows = json.loads(said("compare", "lora", "strlora", "--dry-run", "--json")[1])
    assert [r["status"] for r in rows] == ["absent"] * 6 and "experiments" in rows[0]["command"]
    assert not Path("scratch").exists() and not Path("results").exists()


def test_a_reference_that_does_not_run_is_refused_beforehand(place):
    "Asked for, it must be among the methods; not asked for, the first that is no bound stands in for StrLoRA, and that is said."
    code, out, err = said("compare", "lora", "--seeds", "0", "--reference", "joint", "--dry-run")
    assert code == 2 and not out and err.count("\n") == 1
    assert all(word in err for word in ("--reference", "expected", "found joint", "strlora compare joint lora"))
    for words, reference in ((["joint", "ewc", "lora"], "ewc"), (["joint", "lora", "--reference", "lora"], ""),
                             (["lora", "strlora"], ""), (["lora"], "")):
        code, out, err = said("compare", *words, "--seeds", "0", "--dry-run", "--json")
        assert code == 0 and json.loads(out) and (reference in err if reference else "reference" not in err), err


def test_methods_without_a_file_are_named_before_they_run(place, monkeypatch):
    begun, wanted = [], ["compare", "lora", "ewc", "--seeds", "0", "--reference", "lora"]
    monkeypatch.setattr(compare, "work_off", lambda runs, jobs: begun.append(err.getvalue()))
    for words in ([], ["--dry-run"]):
        with contextlib.redirect_stderr(io.StringIO()) as err: assert cli.main([*wanted, *words]) < 2
        assert "default settings, in chunks of 200 samples: ewc;" in err.getvalue()
        assert "experiments/mini/windows/METHOD.toml" in err.getvalue()
    assert len(begun) == 1 and "default settings" in begun[0]
    assert "default settings" not in said("compare", "lora", "strlora", "--seeds", "0", "--dry-run")[2]


@pytest.mark.parametrize("verb", [["compare", "lora"], ["ablate", "lora", "r=4"]])
def test_a_folder_of_experiments_is_asked_for_where_it_is_missing(verb, place):
    code, out, err = said(*verb, "--stream", "windows-gemma3", "--dry-run")
    assert code == 2 and not out and "experiments/mini/windows-gemma3/lora.toml of the repository" in err and "Did you mean" not in err
    file = Path("experiments/mini/windows-gemma3/lora.toml")
    file.parent.mkdir()
    file.write_text(Path("experiments/mini/windows/lora.toml").read_text())
    assert said(*verb, "--stream", "windows-gemma3", "--dry-run")[0] == 0
    code, _, err = said(*verb, "--stream", "windws", "--dry-run")
    assert code == 2 and "unknown stream 'windws'. Did you mean 'windows'?" in err


@pytest.mark.parametrize("method", [m for m in METHODS if METHODS[m].adapter and not METHODS[m].follows])
def test_every_setting_of_the_grid_becomes_a_run_and_can_land(method, tmp_path, monkeypatch):
    "Also where a default is unset, which TOML cannot say."
    start = tune.defaults(method)
    settings = [s for name in tune.stages(method, False) for s in tune.stage(method, name, start)]
    file = tmp_path/"lands.toml"
    for setting in settings:
        run = tune.children(method, "windows", setting, 8, [TUNING_SEEDS[0]])[0]
        found = flat(as_dict(run.spec))
        assert {name: found[name] for name in setting} == setting
        toml.land(file, method, setting, "a choice")
        assert {name: flat(as_dict(resolve(load(file))))[name] for name in setting} == setting


def test_landing_keeps_the_file_and_leaves_defaults_out(place):
    file = Path("experiments/mini/windows/strlora.toml")
    before = load(file)
    toml.land(file, "strlora", {"train.lr": 2e-3, "train.lr_later": 1e-3, "settings.kl_weight": 0.3}, "`strlora tune strlora`: train.lr=0.002")
    assert load(file) == {k: v for k, v in before.items() if k != "method"} | \
        {"train": before["train"] | {"lr": 2e-3}, "settings": {"r": 8, "kl_weight": 0.3}}
    assert file.read_text().startswith("# a small strlora\n# chosen by `strlora tune strlora`: train.lr=0.002")
    toml.land(file, "strlora", {"train.lr": 1e-3, "settings.kl_weight": 0.1}, "strlora tune strlora")
    assert load(file) == {k: v for k, v in before.items() if k != "method"} and file.read_text().count("chosen by") == 1
    toml.land(Path("experiments/mini/strcvit/lora.toml"), "lora", {"train.lr": 5e-4}, "strlora tune lora --stream strcvit", "strcvit")
    spec, published = asked(["experiments/mini/strcvit/lora.toml"])
    assert (spec.method, spec.stream.name, spec.train.lr, published) == ("lora", "strcvit", 5e-4, False), "not of this repository"


@pytest.mark.parametrize("odd", [{"a": None}, {"a": [float("nan")]}, {"a": object()}])
def test_toml_that_would_not_read_back_is_refused(odd):
    with pytest.raises(SpecError): toml.to_toml(odd)


# ---------------------------------------------------------------- processes

@pytest.fixture
def files(place):
    "A stream of the same name as the built-in one, in files."
    export_mini(place/"mini", seed=0, chunks=2, chunk_size=8, test_size=1, proxy_size=1)
    return "mini"


def test_studies_on_files_keep_to_themselves(files):
    "Other folders than the built-in stream's; settings that a search on these files chose come first, those of other files do not count."
    own, built_in = (json.loads(said("compare", "lora", "--seeds", "0", *words, "--dry-run", "--json")[1])[0] for words in (["--data", files], []))
    assert own["folder"] != built_in["folder"] and re.match(r"scratch/mini/windows-base\d+/lora/seed0-", own["folder"]) and "--data mini" in own["command"]
    moved = str(Path(files).rename("other"))
    images = json.loads(said("compare", "lora", "--seeds", "0", "--data", moved, "--images", f"{moved}/images", "--dry-run", "--json")[1])[0]
    assert images["folder"] not in (own["folder"], built_in["folder"]) and "--images other/images" in images["command"]
    grid = json.loads(said("tune", "lora", "--data", moved, "--dry-run", "--json")[1])
    assert grid[0]["folders"] and all(re.match(r"scratch/mini/windows-base\d+/lora/seed10", f) for f in grid[0]["folders"])
    file = experiment("lora", "windows", data=moved)
    assert file.parts[0] == "scratch" != experiment("lora", "windows").parts[0]
    toml.land(file, "lora", {"train.lr": 5e-4}, "`strlora tune lora --data other`", "windows")
    found = json.loads(said("compare", "lora", "--seeds", "0", "--data", moved, "--dry-run", "--json")[1])[0]
    assert str(file) in found["command"] and asked(found["command"].split()[2:])[0].train.lr == 5e-4
    for words in (["--data", moved, "--stream", "strcvit"], ["--data", "none"], ["--images", moved]):
        code, _, err = said("compare", "lora", *words, "--dry-run")
        assert code == 2 and err.count("\n") == 1, err


@pytest.mark.slow
def test_compare_on_files(files):
    code, out, err = said("compare", "lora", "--seeds", "0", "--reference", "lora", "--data", files, "--json")
    found = json.loads(out)
    assert code == 0 and found["runs"][0]["folder"].startswith("scratch/") and found["defaults"] == ["lora"], err
    assert read_json(Path(found["runs"][0]["folder"], "run.json"))["spec"]["stream"]["data"] == files


@pytest.mark.slow
def test_compare_runs_keeps_and_tells_of_failures(place):
    "One method works, one fails; the second time nothing is run again but the failed."
    broken = Path("experiments/mini/windows/strlora.toml")
    whole = broken.read_text()
    broken.write_text(whole.replace("base = '", "base = '/nowhere"))
    code, out, err = said("compare", "lora", "strlora", "--seeds", "0", "--json")
    found = json.loads(out)
    assert code == 1 and [r["method"] for r in found["runs"]] == ["lora"] and [r["method"] for r in found["failed"]] == ["strlora"]
    log = Path(found["failed"][0]["log"])
    assert "nowhere" in err and log.exists()
    broken.write_text(whole)
    code, out, err = said("compare", "lora", "strlora", "--seeds", "0", "--json")
    found = json.loads(out)
    assert code == 0 and "1 of 2 runs were finished before" in err and "finished   strlora" in err
    assert {r["metric"] for r in found["scores"]} == {"MAP", "MAF", "final AP"} and "1 seed: this ranks nothing" in found["caution"]
    assert [r["time / lora"] for r in found["costs"]][0] == 1 and found["costs"][0]["extra samples"] == 0
    assert list(Path("scratch").rglob("*.log")) == [log] and not list(Path("results").rglob("*.log")), "what failed keeps its log"
    broken.write_text(whole.replace("r = 8", "r = 16"))
    rows = json.loads(said("compare", "lora", "strlora", "--seeds", "0", "--dry-run", "--json")[1])
    assert [row["status"] == "finished" for row in rows] == [True, False], "other settings have a folder of their own"


COMPARE = ["compare", "lora", "strlora", "--seeds", "0", "--jobs", "2", "--limit", "400"]


@pytest.mark.slow
def test_ctrl_c_lets_every_run_save_itself(place):
    for file in Path("experiments/mini/windows").glob("*.toml"):
        file.write_text(file.read_text().replace("chunk_size = 8", "chunk_size = 400"))
    env = dict(os.environ, PYTHONPATH=str(parallel.PACKAGE.parent))
    process = subprocess.Popen([sys.executable, "-m", "strlora.cli", *COMPARE], env=env, stderr=subprocess.PIPE, text=True)
    runs = [parallel.child(m, [f"experiments/mini/windows/{m}.toml", "--seed", "0", "--limit", "400"]) for m in ("lora", "strlora")]
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not all(parallel.position_of(r)[1] for r in runs): time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130 and "saved themselves" in err
    assert [status_of(r.folder) for r in runs] == ["interrupted", "interrupted"]


@pytest.mark.slow
def test_tune_from_grid_to_file(place):
    code, out, err = said("tune", "joint", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert len(found["tried"]) == 6 and all(r["MAP"] is None and r["final AP"] is not None for r in found["tried"])
    table = Path("results/mini/tuning/windows/joint.csv").read_text().splitlines()
    assert table[0] == "method,settings,seed,MAP,MAF,final AP,seconds,commit" and len(table) == 7
    assert "# chosen by `strlora tune joint`" in Path("experiments/mini/windows/joint.toml").read_text()
    code, out, err = said("tune", "joint", "--json")
    assert code == 0 and "4 of 4 runs were finished before" in err and json.loads(out) == found


@pytest.mark.slow
def test_ablate_pairs_values_over_seeds(place):
    words = ["ablate", "strlora", "share_routers=block,true", "--seeds", "100,102", "--json"]
    code, out, err = said(*words)
    found = json.loads(out)
    assert code == 0 and not found["failed"], err
    rows = [r for r in found["scores"] if r["metric"] == "MAP"]
    assert [r["value"] for r in rows] == ["True", "block"] and rows[0]["difference"] is None and rows[1]["pairs"] == 2
    table = Path("results/mini/ablation/windows/strlora.share_routers.csv").read_text().splitlines()
    assert [line.split(",")[1:3] for line in table[1:]] == [[f"share_routers={v}", s] for v in ("True", "block") for s in ("100", "102")]
    code, out, err = said(*words)
    assert code == 0 and "4 of 4 runs were finished before" in err and json.loads(out) == found


def test_a_run_older_than_a_setting_has_its_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = parallel.child("lora", ["--method", "lora"])
    spec = as_dict(run.spec)
    for rules, fits in ((None, True), ("strict", True), ("released", False)):
        spec["eval"].pop("rules", None)
        if rules: spec["eval"]["rules"] = rules
        write_json(run.folder/"run.json", {"schema": 1, "method": "lora", "status": "finished", "spec": spec})
        if fits: assert parallel.settle(run) == "finished"
        else:
            with pytest.raises(SpecError, match="eval.rules is 'released' there and 'strict' here"): parallel.settle(run)


def test_an_ablation_keeps_what_it_has_tried(place, tmp_path):
    from strlora import ablate, worth
    path = tmp_path/"t.csv"
    row = lambda setting, seed, score: {"method": "lora", "settings": setting, "seed": seed, "MAP": score, "MAF": 0.0, "final AP": 1.0,
                                        "seconds": 1, "commit": "none"}
    tune.write_tried(path, ablate.beside(path, [row("r=64", 100, 1.0), row("r=32", 100, 2.0)], "r=64"))
    tune.write_tried(path, ablate.beside(path, [row("r=64", 100, 3.0), row("r=16", 100, 4.0)], "r=64"))
    assert [line.split(",")[1:4] for line in path.read_text().splitlines()[1:]] == [
        ["r=64", "100", "3.0"], ["r=32", "100", "2.0"], ["r=16", "100", "4.0"]], "the value in use first"
    tried = worth.tried(path)
    assert tried["value"].tolist() == ["64", "32", "16"] and set(tried["setting"]) == {"r"}
    assert worth.worth(tried, ["MAP"])["value"].tolist() == ["16", "32", "64"], "by size"
    assert ablate.pair_of("train.betas=[0.9,0.99],[0.8,0.9]") == ("train.betas", ["[0.9,0.99]", "[0.8,0.9]"])
    for pair, word in (("stream.chunk_size=4", "compare --stream"), ("train.grad_norm_every=3", "another setting")):
        with pytest.raises(SpecError, match=word): ablate.arms("lora", pair, "windows", [100], None)


def test_runs_older_than_the_setting_are_the_value_in_use(monkeypatch):
    from strlora import ablate, report
    found = ablate.arms("strlora", "lazy=true", "windows", [102], None)
    old = report.load_run(Path(__file__).parents[1]/"results/mini/windows/strlora/seed3")
    assert "lazy" not in old.info["spec"]["settings"], "made before the setting was there"
    monkeypatch.setattr(ablate, "load_run", lambda folder: old)
    for run in (run for runs in found.values() for run in runs): run.state = "finished"
    frame = ablate.result(found)
    assert list(dict.fromkeys(frame["value"])) == ["False", "True"] and (frame.dropna(subset="difference")["difference"] == 0).all()


def test_settings_can_be_ablated_together_and_errors_name_what_was_asked():
    from strlora import ablate
    found = ablate.arms("strlora_prototypes", "sight=0.25", "windows", [100], None, also=["threshold=0.6"])
    tuned, other = (run.spec.settings for (run,) in found.values())
    assert (tuned.sight, tuned.threshold, other.sight, other.threshold) == (0.4, 0.7, 0.25, 0.6)
    assert list(found.values())[1][0].label == "sight=0.25 threshold=0.6"
    for pair, also, words in (("geometry=round", (), "strlora ablate strlora_prototypes geometry=round: unknown geometry"),
                              ("gate=1", ("hold=0",), "gate=1 hold=0: unknown setting 'hold'")):
        with pytest.raises(SpecError, match=words): ablate.arms("strlora_prototypes", pair, "windows", [100], None, also=also)
