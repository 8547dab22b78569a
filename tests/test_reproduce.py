"A run is made once more and compared with its artefact."
import importlib.util
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from small import make_base, short_spec

from strlora import report, runs

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("reproduce", ROOT / "tools" / "reproduce.py")
reproduce = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reproduce)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    runs.start(short_spec(make_base(home/"base"), "method=strlora"), home/"seed0")
    return home/"seed0"


@pytest.fixture
def folder(whole, tmp_path): return Path(shutil.copytree(whole, tmp_path/"seed0"))


def test_the_same_machine_makes_the_same_run(folder, capsys):
    path = folder/"predictions.parquet"  # answers in other words come later and are not made again
    rows = pd.read_parquet(path)
    pd.concat([rows, rows.assign(split="held_out")]).to_parquet(path)
    assert reproduce.main([str(folder)]) == 0
    assert "the same to the last digit: train and predictions" in capsys.readouterr().out


def test_a_run_that_differs_is_told(folder, capsys, monkeypatch):
    rows = pd.read_parquet(folder/"train.parquet")
    rows.assign(loss=rows["loss"] + 1).to_parquet(folder/"train.parquet")
    monkeypatch.setattr(reproduce.runs, "start", lambda spec, other: shutil.copytree(whole_of(folder), other))
    info = json.loads((folder/"run.json").read_text())
    (folder/"run.json").write_text(json.dumps({**info, "versions": {**info["versions"], "torch": "0.1"}}))
    assert reproduce.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"rows that differ: {len(rows)} of train, 0 of predictions" in out and "scores are near" in out and "torch: 0.1 there" in out


def whole_of(folder):
    "The same run with the losses it had."
    other = folder.parent/"other"
    shutil.copytree(folder, other)
    rows = pd.read_parquet(other/"train.parquet")
    rows.assign(loss=rows["loss"] - 1.5).to_parquet(other/"train.parquet")
    return other


def test_another_method_is_no_reproduction():
    study = [report.load_run(ROOT/"results"/"mini"/"windows"/name/"seed0") for name in ("lora", "strlora", "joint")]
    assert all(reproduce.near(run, run)[1] for run in study), "MAP or none"
    assert not reproduce.near(study[0], study[1])[1]


@pytest.mark.parametrize("harm", [lambda f: (f/"predictions.parquet").unlink(), lambda f: (f/"train.parquet").unlink(),
                                  lambda f: (f/"run.json").write_text("{"), lambda f: (f/"run.json").write_text("{}"),
                                  lambda f: (f/"run.json").write_text('{"status": "running"}'), lambda f: (f/"run.json").unlink()])
def test_what_cannot_be_compared_is_one_line(folder, harm, capsys):
    harm(folder)
    assert reproduce.main([str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be compared" in said


def test_a_table_of_another_shape_differs(whole, folder):
    rows = pd.read_parquet(folder/"train.parquet")
    rows.iloc[:0].to_parquet(folder/"train.parquet")
    assert reproduce.differing(folder, whole) == {"train": len(rows), "predictions": 0}


def test_without_a_name_any_run_of_the_study_is_taken():
    assert (reproduce.chosen(None)/"run.json").is_file()
