"Artefacts and report: files read back strictly, answers scored anew, tables, comparisons, escaping."
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from strlora import report
from strlora.artefacts import Run, collect, load_run, provenance, rescore, specimen
from strlora.core import CheckpointError, SpecError, read_json, write_json
from strlora.data.metrics import Definition, measure, score_matrix
from strlora.data.rules import SETS
from strlora.data.tasks import TASKS

TASK4 = ("imagenet", "ocr", "textcaps", "grounding")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for method, decay, experts in (("strlora", 0.02, 4), ("lora", 0.15, 0)):
        for seed in range(3):
            specimen(folder / method / f"seed{seed}", method, seed, decay, chunks=8, tasks=TASK4, experts=experts, questions=12)
    return folder


@pytest.fixture(scope="module")
def runs(shelf):
    return [load_run(shelf / method / f"seed{seed}") for method in ("strlora", "lora") for seed in range(3)]


@pytest.fixture
def copy(shelf, tmp_path):
    return shutil.copytree(shelf / "strlora/seed0", tmp_path / "run")


def edit(folder, name, change):
    frame = pd.read_parquet(folder / name)
    change(frame).to_parquet(folder / name)


# --- loading -------------------------------------------------------------------------------------------------------

def test_load(runs):
    run = runs[0]
    assert (run.method, run.seed, run.scale, run.tasks) == ("strlora", 0, "mini", list(TASK4))
    assert run.scores().shape == (9, 4) and run.counts.shape == (8, 4) and run.routing is not None and runs[3].routing is None
    assert run.scores().equals(score_matrix(run.predictions, tasks=run.tasks))


@pytest.mark.parametrize("name", ["run.json", "stream.json", "predictions.parquet"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name): load_run(copy)


@pytest.mark.parametrize("name", ["run.json", "predictions.parquet", "routing.parquet"])
def test_damaged_file(copy, name):
    (copy / name).write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match=f"{name}.*found"): load_run(copy)


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="strlora run"): load_run(tmp_path / "nowhere")


@pytest.mark.parametrize("name, column", [("predictions.parquet", "answer"), ("routing.parquet", "weight"), ("train.parquet", "loss")])
def test_wrong_columns(copy, name, column):
    edit(copy, name, lambda f: f.drop(columns=column))
    with pytest.raises(CheckpointError, match=f"found no {column}"): load_run(copy)


def test_missing_keys(copy):
    write_json(copy / "run.json", {"method": "lora"})
    with pytest.raises(CheckpointError, match="found no spec, status"): load_run(copy)


def test_no_predictions_yet(copy):
    edit(copy, "predictions.parquet", lambda f: f.iloc[:0])
    with pytest.raises(CheckpointError, match="resume"): load_run(copy)


def test_stored_scores_are_not_trusted(copy):
    edit(copy, "predictions.parquet", lambda f: f.assign(score=f["score"].where(f.index != 77, 1 - f["score"])))
    row = pd.read_parquet(copy / "predictions.parquet").loc[77]
    with pytest.raises(CheckpointError, match=f"task {row['task']}, sample {row['sample_id']}, after chunk {row['after_chunk']}"): load_run(copy)


def test_edited_answers_and_rules_are_noticed(copy):
    frame = pd.read_parquet(copy / "predictions.parquet")
    right = frame.index[frame["score"] == 1][0]
    with pytest.raises(CheckpointError, match="expected score 0.0"): rescore(frame.assign(prediction=frame["prediction"].where(frame.index != right, "no")))
    with pytest.raises(CheckpointError, match="task version"): rescore(frame.assign(task_version=99))
    with pytest.raises(CheckpointError, match="score"): rescore(frame.assign(score=np.nan))
    with pytest.raises(SpecError, match="imagenet"): rescore(frame.replace({"task": {"imagenet": "imagent"}}))


def test_references_are_scored(copy):
    frame = pd.read_parquet(copy / "predictions.parquet").query("task == 'textcaps'").head(2)
    frame = frame.assign(prediction="a red bus", answer="x", references="a red bus\na car", score=1.0)
    assert rescore(frame)["score"].tolist() == [1, 1]


# --- tables --------------------------------------------------------------------------------------------------------

def test_summary_is_recomputed(runs):
    frame = report.summary(runs)
    for run, row in zip(runs, frame.to_dict("records"), strict=True):
        expected = measure(run.scores(), run.counts)
        assert all(np.isclose(row[name], value) for name, value in expected.items())
        assert all(np.isclose(row[t], run.scores().loc[8, t]) for t in TASK4)
    assert list(frame["method"]) == ["strlora"] * 3 + ["lora"] * 3 and set(frame["points"]) == {"8/8"}


def test_json_is_strict(runs, copy):
    edit(copy, "predictions.parquet", lambda f: f[f["after_chunk"] == 0])
    rows = json.loads(report.summary_json([*runs[:1], load_run(copy)]))
    assert rows[0]["final"].keys() == set(TASK4) and rows[0]["split"] == "proxy"
    assert rows[1]["MAP"] is None and rows[1]["final AP"] == rows[1]["zero-shot floor"]


@pytest.mark.parametrize("width", [75, 85, 100])
def test_table_fits(runs, width):
    lines = report.table(runs[0], width=width).splitlines()
    assert max(map(len, lines[1:])) <= width and len(lines[0]) <= 100
    assert [line.split()[0] for line in lines[3:7]] == list(TASK4)
    head = lines[2].split()
    assert head[1] == "start" and head[-1] == "8"


def test_table_marks(runs):
    text, run = report.table(runs[0], width=200), runs[0]
    cells = text.splitlines()[3].split()[1:]
    for k, cell in enumerate(cells):
        assert cell.rstrip("*") == f"{run.scores().loc[k, 'imagenet']:.1f}" and cell.endswith("*") == (k > 0 and run.counts.loc[max(k, 1), "imagenet"] > 0)
    assert "·" in text.splitlines()[5] and f"MAP {measure(run.scores(), run.counts)['MAP']:.1f}" in text


def test_one_chunk_and_one_task(tmp_path):
    run = load_run(specimen(tmp_path, chunks=1, tasks=("ocr",), questions=4))
    assert "MAF –" in report.table(run) and np.isnan(report.summary(run)["MAF"][0])


def test_fewer_points(copy):
    edit(copy, "predictions.parquet", lambda f: f[f["after_chunk"].isin([0, 4, 8])])
    run = load_run(copy)
    assert run.definition() == Definition(points="evaluated")
    assert report.summary(run)["points"][0] == "2/8" and "evaluated after 2 of them" in report.table(run)


def test_unknown_split(runs):
    with pytest.raises(SpecError, match="proxy"): report.table(runs[0], split="fulll")


# --- several runs --------------------------------------------------------------------------------------------------

def scaled(run, scale):
    return Run(run.folder, {**run.info, "spec": {**run.info["spec"], "scale": scale}}, run.stream, run.predictions, run.train, run.routing)


def test_scales_never_mix(runs):
    for call in (report.summary, report.compare, report.summary_json):
        with pytest.raises(SpecError, match="one scale"): call([runs[0], scaled(runs[1], "paper")])
    with pytest.raises(SpecError, match="at least one"): report.summary([])


def test_labels_name_what_differs(runs):
    def at(**train):
        info = {**runs[0].info, "spec": {**runs[0].info["spec"], "train": train}}
        return Run(runs[0].folder, info, runs[0].stream, runs[0].predictions, None, None)
    assert report.labels([runs[0], runs[1]]) == ["strlora", "strlora"]
    assert report.labels([at(lr=0.2), at(lr=0.1)]) == ["strlora (train.lr=0.2)", "strlora (train.lr=0.1)"]
    assert report.labels([at(lr=0.1), at(lr=0.1, new=0)]) == ["strlora"] * 2, "an older run does not know the setting"
    assert report.labels([at(lr=0.1), at(lr=0.1, new=0), at(lr=0.1, new=1)])[2] == "strlora (train.new=1)"


def test_compare(runs):
    frame = report.compare(runs, reference="lora", draws=200).set_index(["metric", "method"])
    single = report.summary(runs).groupby("method")
    for metric in ("MAP", "MAF", "final AP"):
        for method in ("strlora", "lora"):
            row = frame.loc[(metric, method)]
            assert np.isclose(row["mean"], single.get_group(method)[metric].mean()) and row["low"] <= row["mean"] <= row["high"] and row["seeds"] == 3
        d = single.get_group("strlora")[metric].to_numpy() - single.get_group("lora")[metric].to_numpy()
        row = frame.loc[(metric, "strlora")]
        assert np.isclose(row["difference"], d.mean()) and row["pairs"] == 3 and row["d low"] <= d.mean() <= row["d high"]
        assert pd.isna(frame.loc[(metric, "lora"), "difference"])
    assert frame.loc[("MAP", "strlora"), "difference"] > 0 > frame.loc[("MAF", "strlora"), "difference"]


def test_compare_with_itself_is_zero(runs):
    twin = [Run(r.folder, {**r.info, "method": "twin"}, r.stream, r.predictions, None, None) for r in runs[:3]]
    row = report.compare(runs[:3] + twin, reference="strlora", draws=100).query("method == 'twin' and metric == 'MAP'").iloc[0]
    assert row["difference"] == row["d low"] == row["d high"] == 0 and row["p (t)"] == row["p (signs)"] == row["p (Holm)"] == 1


def test_compare_refuses(runs, tmp_path):
    with pytest.raises(SpecError, match="two runs of strlora"): report.compare([runs[0], runs[0].__class__(**vars_of(runs[0]))])
    with pytest.raises(SpecError, match="strlora"): report.compare(runs, reference="strlra")
    other = load_run(specimen(tmp_path, "lora", 0, chunks=8, tasks=TASK4, questions=6))
    with pytest.raises(SpecError, match="different questions"): report.compare([runs[0], other], reference="lora")


def vars_of(run):
    return {k: getattr(run, k) for k in ("folder", "info", "stream", "predictions", "train", "routing")}


def test_one_piece_beside_a_stream(runs, tmp_path):
    "A method that trains on everything at once has one point; it is compared by its final AP all the same."
    folder = shutil.copytree(runs[3].folder, tmp_path / "joint")
    stream = read_json(folder / "stream.json")
    write_json(folder / "stream.json", {**stream, "chunks": [{"index": 1, "size": 4, "composition": dict.fromkeys(TASK4, 1)}]})
    write_json(folder / "run.json", {**read_json(folder / "run.json"), "method": "joint"})
    edit(folder, "predictions.parquet", lambda f: f[f["after_chunk"].isin([0, 8])].assign(after_chunk=lambda g: g["after_chunk"].clip(upper=1)))
    frame = report.compare([runs[3], load_run(folder)], reference="lora", draws=50).set_index(["metric", "method"])
    assert frame.loc[("final AP", "joint"), "difference"] == 0 and np.isnan(frame.loc[("MAF", "joint"), "mean"])


# --- collecting ----------------------------------------------------------------------------------------------------

def finish(folder, **more):
    write_json(folder / "run.json", {**read_json(folder / "run.json"), "status": "finished", "dirty": False, "commit": "a" * 40, **more})


def test_collect(shelf, tmp_path, monkeypatch):
    place = tmp_path / "results/mini/windows/strlora"
    for seed in (0, 1):
        shutil.copytree(shelf / f"strlora/seed{seed}", place / f"seed{seed}")
        finish(place / f"seed{seed}")
    found = collect(["strlora"], seeds=(0, 1), root=tmp_path / "results")
    assert [r.seed for r in found] == [0, 1] and set(provenance(found)["commit"]) == {"a" * 12}
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    assert len(collect(["strlora"], seeds=(1,))) == 1
    with pytest.raises(CheckpointError, match=r"found absent.*strlora run experiments/mini/windows/strlora.toml --seed 2"): collect(["strlora"], seeds=(0, 1, 2))
    finish(place / "seed1", dirty=True)
    with pytest.raises(CheckpointError, match="changed code"): collect(["strlora"], seeds=(1,))
    finish(place / "seed1", status="interrupted")
    with pytest.raises(CheckpointError, match="found interrupted"): collect(["strlora"], seeds=(1,))


def test_a_specimen_is_never_a_result(tmp_path):
    specimen(tmp_path / "mini/windows/strlora/seed0", chunks=2, questions=2)
    with pytest.raises(CheckpointError, match="found invented"): collect(["strlora"], root=tmp_path)


# --- pages ---------------------------------------------------------------------------------------------------------

NASTY = ["<script>alert(1)</script>", "a|b", "*bold* _it_ `code`", "[link](javascript:x)", "two\nlines", "&amp;", "\\"]


def test_escaping():
    frame = pd.DataFrame({"<b>": NASTY, "score": [0.5] * 6 + [float("nan")]})
    page, text = report.to_html(frame), report.to_markdown(frame)
    for bad in ("<script", "<b>"): assert bad not in page and bad not in text
    assert len(text.splitlines()) == 2 + len(NASTY) and r"a\|b" in text and r"\[link\]" in text and "&amp;amp;" in page and "–" in text


def test_text_table_is_aligned(runs):
    lines = report.to_text(report.compare(runs, reference="lora", draws=50)).splitlines()
    assert len(lines) == 7 and lines[0].startswith("metric")
    at = lines[0].index("mean") + 4
    assert all(line[at - 2] == "." for line in lines[1:])


def test_sources_table():
    frame = report.sources_table(Definition)
    assert set(frame["setting"]) == {"tasks", "clip", "reference", "start", "divide", "points"} and (frame["source"] != "").all()


def test_paper_values_have_sources():
    from pathlib import Path

    frame = pd.read_csv(Path(__file__).parent.parent / "reference/paper.csv")
    assert list(frame.columns) == ["table", "row", "column", "value", "unit", "source"] and frame["source"].str.len().min() > 10
    assert not frame.duplicated(["table", "row", "column", "source"]).any()


def test_no_torch():
    done = subprocess.run([sys.executable, "-c", "import sys, strlora.report, strlora.plots; assert 'torch' not in sys.modules"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_task_has_a_specimen(tmp_path):
    run = load_run(specimen(tmp_path, chunks=3, questions=4))
    assert set(run.scores().columns) == set(TASKS)


def test_both_means_where_the_official_one_leaves_sets_out(tmp_path):
    "Mini tasks under the names of the released sets; a stream without them says nothing of it."
    run = load_run(specimen(tmp_path, chunks=4))
    names = dict(zip(run.tasks, SETS, strict=True))
    chunks = [{**c, "composition": {names[t]: n for t, n in c["composition"].items()}} for c in run.stream["chunks"]]
    renamed = Run(run.folder, run.info, {**run.stream, "tasks": list(names.values()), "chunks": chunks},
                  run.predictions.assign(task=run.predictions["task"].map(names)), None, None)
    counted = [task for task in names.values() if task not in ("GQA", "ChartQA")]
    wanted = renamed.scores()[counted].iloc[-1].mean()
    row = json.loads(report.summary_json(renamed))[0]
    assert len(counted) == 9 and row["AP (official sets)"] == pytest.approx(wanted) and set(row["final"]) == set(names.values())
    assert "official AP" in report.table(renamed) and f"AP (official sets) {wanted:.1f}" in report.table(renamed)
    assert "official" not in report.table(run) + report.summary_json(run)
