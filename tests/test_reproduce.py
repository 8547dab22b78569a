"A run is made once more and compared with its artefact."
import importlib.util
from pathlib import Path

import pandas as pd
import pytest
from small import make_base, short_spec

from strlora import runs

PATH = Path(__file__).parents[1] / "tools" / "reproduce.py"
SPEC = importlib.util.spec_from_file_location("reproduce", PATH)
reproduce = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reproduce)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    runs.start(short_spec(make_base(home/"base"), "method=strlora"), home/"seed0")
    return home/"seed0"


def test_the_same_machine_makes_the_same_run(folder, capsys):
    assert reproduce.main([str(folder)]) == 0
    assert "the same to the last digit: train and predictions" in capsys.readouterr().out


def test_a_run_that_is_another_one_is_told(folder, capsys):
    path = folder/"train.parquet"
    kept = path.read_bytes()
    rows = pd.read_parquet(path)
    rows.assign(loss=rows["loss"] + 1).to_parquet(path)
    try: code = reproduce.main([str(folder)])
    finally: path.write_bytes(kept)
    out = capsys.readouterr().out
    assert f"rows that differ: {len(rows)} of train, 0 of predictions" in out and code == 0 and "nearer than" in out


def test_scores_that_stray_further_than_seeds_are_told(folder):
    there = reproduce.report.load_run(folder)
    far = pd.DataFrame({"MAP": [0.0], "MAF": [0.0], "final AP": [0.0]})
    true = reproduce.report.summary
    answers = iter([far, far + 50, far])
    reproduce.report.summary = lambda runs: next(answers)
    try: table, close = reproduce.near(there, there, [folder])
    finally: reproduce.report.summary = true
    assert not close and table.loc["MAP", "once more"] == 50


def test_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="found no run.json"): reproduce.main([str(tmp_path)])


def test_without_a_name_any_run_of_the_study_is_taken():
    assert (reproduce.chosen(None)/"run.json").is_file()
