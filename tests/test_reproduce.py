"A run is made once more and compared with its artefact."
import importlib.util
import json
import shutil
import subprocess
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
def folder(whole, tmp_path, monkeypatch):
    "A run, from the code at hand."
    folder = Path(shutil.copytree(whole, tmp_path/"seed0"))
    told(folder, commit="0" * 40, dirty=False)
    monkeypatch.setattr(reproduce, "commit", lambda: ("0" * 40, False))
    return folder


def told(folder, **changed):
    "Another run.json."
    info = json.loads((folder/"run.json").read_text())
    (folder/"run.json").write_text(json.dumps({**info, **changed}))
    return info


@pytest.fixture
def kept(tmp_path, monkeypatch):
    "The lines that were kept."
    monkeypatch.setattr(reproduce, "KEPT", tmp_path/"reproduced.jsonl")
    return lambda: [json.loads(line) for line in reproduce.KEPT.read_text().splitlines()]


def test_the_same_machine_makes_the_same_run(folder, capfd, kept):
    path = folder/"predictions.parquet"  # answers in other words come later and are not made again
    rows = pd.read_parquet(path)
    pd.concat([rows, rows.assign(split="held_out")]).to_parquet(path)
    assert reproduce.main([str(folder), "--keep"]) == 0
    out, (row,) = capfd.readouterr().out, kept()
    assert "the same to the last digit: train and predictions" in out and "no equality" not in out
    assert (row["equal"], row["claimed"], row["largest_difference"], row["threads"]) == (True, True, 0, 1)
    assert row["processor"] == row["recorded_processor"] and row["torch"] == row["recorded_torch"] and row["run"].endswith("/seed0")


@pytest.fixture
def another(folder, monkeypatch):
    "What is made once more has other losses."
    rows = pd.read_parquet(folder/"train.parquet")
    rows.assign(loss=rows["loss"] + 1).to_parquet(folder/"train.parquet")
    monkeypatch.setattr(reproduce, "make", lambda info, code, other: shutil.copytree(whole_of(folder), other))
    return len(rows)


def test_a_run_that_differs_is_told(folder, another, capsys, kept):
    told(folder, versions={**told(folder)["versions"], "torch": "0.1"})
    assert reproduce.main([str(folder), "--keep"]) == 0
    out, (row,) = capsys.readouterr().out, kept()
    assert f"rows that differ: {another} of train, 0 of predictions" in out and "scores are near" in out and "torch: 0.1 there" in out
    assert not row["equal"] and not row["claimed"] and row["rows"] == {"train": another, "predictions": 0} and row["recorded_torch"] == "0.1"


def test_nothing_is_claimed_of_an_unknown_processor(folder, another, capsys, kept):
    info = told(folder)
    assert reproduce.main([str(folder), "--keep"]) == 1, "all is known, so it should be the same"
    told(folder, hardware={k: v for k, v in info["hardware"].items() if k != "processor"})
    assert "should be the same" in capsys.readouterr().out
    assert reproduce.main([str(folder), "--keep"]) == 0
    assert "no equality can be claimed" in (out := capsys.readouterr().out) and "processor: not written down there" in out
    assert [row["claimed"] for row in kept()] == [True, False] and kept()[1]["recorded_processor"] is None


@pytest.mark.parametrize("changed, words", [({"commit": "1" * 40}, "git does not have 111111111111"), ({"dirty": True}, "never committed"),
                                            ({"commit": None}, "never committed")])
def test_where_its_code_is_gone_the_code_at_hand_is_taken(tmp_path, capsys, changed, words):
    with reproduce.code_of({"commit": "2" * 40, "dirty": False, **changed}, tmp_path) as found: assert found == (ROOT, None)
    assert words in (out := capsys.readouterr().out) and "made with the code at hand" in out


def test_a_run_is_made_with_the_code_that_it_came_from(folder, tmp_path, kept, monkeypatch):
    "Of another commit: checked out, used, removed."
    git = lambda *words, where: subprocess.run(["git", "-C", where, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                                               capture_output=True, text=True).stdout.strip()
    top = tmp_path/"repository"
    shutil.copytree(ROOT/"strlora", top/"strlora", ignore=shutil.ignore_patterns("__pycache__"))
    for words in (["init"], ["add", "."], ["commit", "-m", "then"]): git(*words, where=top)
    sha = git("rev-parse", "HEAD", where=top)
    (top/"strlora"/"runs.py").write_text("raise SystemExit('other code')")
    git("commit", "-am", "now", where=top)
    told(folder, commit=sha, dirty=False)
    monkeypatch.setattr(reproduce, "TOP", top)
    assert reproduce.main([str(folder), "--keep"]) == 0 and kept()[0]["commit"] == sha and kept()[0]["equal"]
    assert not list((top/"scratch").iterdir()) and len(git("worktree", "list", where=top).splitlines()) == 1
    assert reproduce.main([str(folder), "--code", "here"]) == 2, "other code cannot make it"


def whole_of(folder):
    "The same run with the losses it had."
    other = folder.parent/"other"
    shutil.copytree(folder, other, dirs_exist_ok=True)
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
