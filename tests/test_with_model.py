"What needs the model of a run, on a checkout without models."
import importlib.util
import shutil
from pathlib import Path

import pandas as pd
import pytest
from small import make_base, short_spec

from strlora import runs

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def with_model():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        spec = importlib.util.spec_from_file_location("with_model", TOOLS / "with_model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    return runs.start(short_spec(make_base(home/"base"), "method=strlora", "test_size=4"), home/"seed0")


@pytest.fixture
def run(whole, tmp_path, monkeypatch):
    "A run as git holds it: without its model."
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(whole, "results/mini/windows/strlora/seed0", ignore=shutil.ignore_patterns("checkpoint")))


@pytest.fixture
def here(with_model, monkeypatch):
    "Runs are made in this process; how many."
    made = []

    def work_off(children, jobs):
        for child in children:
            if with_model.settle(child) == "absent": made.append(runs.start(child.spec, child.folder))
            child.state = "finished"
    monkeypatch.setattr(with_model, "work_off", work_off)
    return made


def test_what_needs_the_model_is_made_once_and_copied(with_model, run, here, capsys):
    before, file = pd.read_parquet(run/"predictions.parquet"), run/"interference.csv"
    assert with_model.main(["interference", str(run)]) == 0
    assert "the same to the last digit" in capsys.readouterr().out and len(pd.read_csv(file)["task"].unique()) == 11
    assert with_model.main(["held_out", str(run)]) == 0
    after = pd.read_parquet(run/"predictions.parquet")
    asked = after["split"] == "held_out"
    pd.testing.assert_frame_equal(after[~asked].reset_index(drop=True), before)
    assert asked.sum() == 4 * 11 and not (run/"checkpoint").exists() and len(here) == 1
    capsys.readouterr()
    assert with_model.main(["held_out", str(run)]) == 0 and "1 of 1 have it" in capsys.readouterr().out


def test_looks_lie_beside_the_streams(with_model, run, here):
    assert with_model.main(["looks", str(run)]) == 0
    assert Path("results/mini/view/strlora.json").stat().st_size > 1000


def test_a_model_is_used_where_it_is(with_model, whole, run, here, capsys):
    shutil.copytree(whole/"checkpoint", run/"checkpoint")
    for words in (["held_out", str(run), "--dry-run"], ["model", str(run)]): assert with_model.main(words) == 0
    assert f"model in {run} (there)\n{run}: its model is in {run}\n" in capsys.readouterr().out
    assert with_model.main(["held_out", str(run)]) == 0
    assert with_model.STEPS["held_out"].there(run) and not here and not Path("scratch").exists()


@pytest.mark.parametrize("near, code", [(3.0, 0), (-1.0, 1)])
def test_another_outcome_is_told_and_one_far_off_copied_nowhere(with_model, run, here, capsys, monkeypatch, near, code):
    rows = pd.read_parquet(run/"train.parquet")
    rows.assign(loss=rows["loss"] + 1).to_parquet(run/"train.parquet")
    monkeypatch.setattr(with_model.reproduce, "NEAR", {"MAP": near})
    assert with_model.main(["held_out", str(run)]) == code
    out = capsys.readouterr().out
    assert f"not the same: {len(rows)} rows of train, 0 rows of predictions differ; MAP" in out and ("nothing is copied" in out) == bool(code)
    assert with_model.STEPS["held_out"].there(run) == (not code)


def test_where_other_words_go_is_a_table_of_runs_with_prototypes(with_model, run, here, tmp_path, capsys):
    assert with_model.main(["routes", str(run)]) == 2 and "strlora_prototypes" in capsys.readouterr().err
    other = runs.start(short_spec(make_base(tmp_path/"base"), "method=strlora_prototypes", "num_experts=4",
                                 "shared=2", "test_size=4"), run.parents[1]/"strlora_prototypes/seed0")
    assert with_model.main(["routes", str(other)]) == 0
    table = pd.read_csv(other/with_model.ROUTES)
    assert len(table) == 11 and table[["own", "same"]].stack().between(0, 1).all()


def test_what_is_no_finished_run_is_one_line(with_model, run, capsys):
    assert with_model.main(["looks", str(run), "nowhere"]) == 2
    assert (err := capsys.readouterr().err).count("\n") == 1 and "no run.json" in err
    assert with_model.main(["looks", str(run), "--limit", "1"]) == 2 and "--limit" in capsys.readouterr().err


@pytest.mark.slow
def test_a_smoke_test_leaves_the_run_alone(with_model, run, capsys):
    "With processes, as from the command line."
    files = {path: path.read_bytes() for path in run.iterdir()}
    assert with_model.main(["interference", str(run), "--limit", "4", "--jobs", "1"]) == 0
    assert {path: path.read_bytes() for path in run.iterdir()} == files
    assert list(Path("scratch").rglob("interference.csv")) and "a smoke test" in capsys.readouterr().err
