"Plots: the data in the axes, not the pixels."
import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from strlora import plots, report
from strlora.artefacts import Run, load_run, specimen
from strlora.core import SpecError
from strlora.data.metrics import AP_k
from strlora.style import METHODS, SPARE, look

TASK4 = ("imagenet", "ocr", "textcaps", "grounding")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [load_run(specimen(folder / method / f"seed{seed}", method, seed, decay, chunks=8, tasks=TASK4, experts=experts, questions=12))
            for method, decay, experts in (("strlora", 0.02, 4), ("lora", 0.15, 0)) for seed in range(3)]


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def lines(axes):
    return {line.get_gid(): line for line in axes.lines if line.get_gid()}


def at(run, points, **more):
    "The same run, evaluated at fewer points."
    return Run(run.folder, {**run.info, **more}, run.stream, run.predictions[run.predictions["after_chunk"].isin(points)], run.train, run.routing)


def test_accuracy_of_one_run(runs):
    axes = plots.accuracy_over_stream(runs[0])
    drawn = lines(axes)
    assert np.allclose(drawn["method:strlora"].get_ydata(), AP_k(runs[0].scores(), runs[0].counts).loc[1:])
    assert list(drawn["method:strlora"].get_xdata()) == list(range(1, 9))
    for task in TASK4:
        first = runs[0].counts.index[runs[0].counts[task] > 0][0]
        assert np.allclose(drawn[f"task:{task}"].get_ydata(), runs[0].scores().loc[first - 1:, task])
    assert "points of 100" in axes.get_ylabel() and axes.figure.axes[1].get_xlabel() == "chunk" and axes.get_ylim() == (0, 100)


def test_accuracy_of_several_seeds(runs):
    axes = plots.accuracy_over_stream(runs)
    drawn = lines(axes)
    assert set(drawn) == {"method:strlora", "method:lora"}
    ap = np.array([AP_k(r.scores(), r.counts).loc[1:] for r in runs[3:]])
    assert np.allclose(drawn["method:lora"].get_ydata(), ap.mean(0))
    band = axes.collections[1].get_paths()[0].vertices
    assert np.isclose(band[:, 1].max(), ap.max()) and np.isclose(band[:, 1].min(), ap.min())
    assert "3 seeds (0, 1, 2)" in axes.figure.get_supxlabel()
    words = [t.get_text() for t in axes.texts]
    assert words[0].startswith("StrLoRA\nMAP") and words[1].startswith("LoRA\nMAP")


def test_levels(runs):
    "A run that was asked once is a level over the whole stream."
    joint, floor = at(runs[0], [8], method="joint"), at(runs[0], [0], method="zero_shot")
    drawn = lines(plots.accuracy_over_stream([runs[3], joint, floor]))
    assert np.allclose(drawn["method:joint"].get_ydata(), runs[0].scores().loc[8].mean()) and list(drawn["method:joint"].get_xdata()) == [0, 8]
    assert np.allclose(drawn["method:zero_shot"].get_ydata(), runs[0].scores().loc[0].mean())
    assert len(plots.accuracy_by_task([runs[3], joint, floor])) == 4


def test_pooled_stream_does_not_hide_the_others(runs):
    pooled = {**runs[0].stream, "chunks": [{"index": 1, "size": 4, "composition": dict.fromkeys(TASK4, 1)}]}
    frame = runs[0].predictions[runs[0].predictions["after_chunk"].isin([0, 8])]
    joint = Run(runs[0].folder, {**runs[0].info, "method": "joint"}, pooled, frame.assign(after_chunk=frame["after_chunk"].clip(upper=1)), None, None)
    axes = plots.accuracy_over_stream([joint, runs[0]])
    assert list(lines(axes)["method:joint"].get_xdata()) == [0, 8] and len(axes.figure.axes[1].containers[0]) == 8
    panels = plots.accuracy_by_task([joint, runs[0]])
    assert np.allclose(lines(panels[1])["method:joint"].get_ydata(), joint.scores().loc[1, "ocr"])


def test_panels(runs):
    panels = plots.accuracy_by_task(runs)
    assert [p.get_title("left") for p in panels] == list(TASK4)
    for task, axes in zip(TASK4, panels, strict=True):
        expected = np.mean([r.scores()[task] for r in runs[:3]], axis=0)
        assert np.allclose(lines(axes)["method:strlora"].get_ydata(), expected)
        assert len(axes.patches) == (runs[0].counts[task] > 0).sum()


def test_heatmap(runs):
    axes = plots.score_heatmap(runs[0])
    assert np.allclose(axes.collections[0].get_array(), runs[0].scores().T)
    assert [t.get_text() for t in axes.get_yticklabels()] == list(TASK4)
    dots = {(int(x.get_xdata()[0]), int(x.get_ydata()[0])) for x in axes.lines}
    assert dots == {(k, j) for k in runs[0].counts.index for j, t in enumerate(TASK4) if runs[0].counts.loc[k, t] > 0}


def test_heatmap_of_fewer_points(runs):
    run = at(runs[0], [4, 8])
    axes = plots.score_heatmap(run)
    assert np.allclose(axes.collections[0].get_array(), run.scores().T)
    dots = {(int(x.get_xdata()[0]), int(x.get_ydata()[0])) for x in axes.lines}
    assert dots == {(i, j) for i, (a, b) in enumerate([(1, 4), (5, 8)]) for j, t in enumerate(TASK4) if run.counts.loc[a:b, t].any()}


def last_layer(run): return run.routing[run.routing["layer"] == run.routing["layer"].unique()[-1]]


def test_experts(runs):
    run = runs[0]
    axes = plots.expert_activation(run)
    frame = last_layer(run).query("after_chunk == 8").pivot(index="task", columns="expert", values="weight").loc[list(TASK4)]
    frame = frame.div(frame.sum(axis=1), axis=0)
    assert np.allclose(axes.collections[0].get_array(), 100 * frame) and np.allclose(axes.collections[0].get_array().sum(1), 100)
    entropy = -(frame * np.log2(frame.where(frame > 0, 1))).sum(axis=1)
    assert any(np.allclose(line.get_xdata(), entropy) for line in axes.figure.axes[1].lines if len(line.get_xdata()) == 4)
    early = plots.expert_activation(run, after_chunk=0).collections[0].get_array()
    assert early.max() < 50
    first = run.routing["layer"].iloc[0]
    other = plots.expert_activation(run, layer=first).collections[0].get_array()
    assert first != last_layer(run)["layer"].iloc[0] and not np.allclose(other, 100 * frame), "each layer has experts of its own"
    with pytest.raises(SpecError, match="recorded"): plots.expert_activation(run, after_chunk=77)
    with pytest.raises(SpecError, match="with experts"): plots.expert_activation(run, layer="none")


def test_experts_over_the_stream(runs):
    panels = plots.experts_over_stream(runs[0])
    assert len(panels) == 4 and panels[2].get_title("left") == "expert 2"
    frame = last_layer(runs[0]).query("expert == 2").pivot(index="task", columns="after_chunk", values="weight").loc[list(TASK4)]
    assert np.allclose(panels[2].collections[0].get_array(), 100 * frame)


def test_many_experts(tmp_path):
    run = load_run(specimen(tmp_path, chunks=2, tasks=TASK4, experts=32, questions=2))
    assert plots.expert_activation(run).collections[0].get_array().shape == (4, 32)
    assert len(plots.experts_over_stream(run)) == 32
    axes = plots.first_experts(run)
    assert "without" not in axes.figure.get_supxlabel(), "no two tasks are served alike"
    last = last_layer(run).query("after_chunk == 2").pivot(index="task", columns="expert", values="weight").loc[list(TASK4)]
    assert [int(t.get_text()) for t in axes.texts][2::3] == last.idxmax(axis=1).tolist()


def test_first_of_the_private_experts():
    "A run of the preset with prototypes: those that serve all tasks alike are left out, and so they are of the share."
    run = report.collect(["strlora_prototypes"], seeds=(0,))[0]
    axes = plots.first_experts(run)
    tasks, records = axes.collections[0].get_array().shape
    assert "the 16 of 32" in axes.figure.get_supxlabel() and records == run.routing["after_chunk"].nunique()
    assert all(int(t.get_text()) >= 16 for t in axes.texts) and len(axes.texts) == tasks * records
    assert np.isclose(axes.collections[0].get_array().max(), 100)
    assert plots.first_experts(run, most=2).collections[0].get_array().shape == (tasks, 2)
    assert plots.first_experts(report.collect(["strlora"], seeds=(0,))[0]).collections[0].get_array().max() <= 100


def test_without_routing(runs):
    assert "no experts" in plots.first_experts(runs[3]).texts[0].get_text()
    assert "no experts" in plots.expert_activation(runs[3]).texts[0].get_text()
    assert "no experts" in plots.experts_over_stream(runs[3])[0].texts[0].get_text()


@pytest.mark.parametrize("chunks, tasks", [(1, TASK4), (1, ("ocr",)), (5, ("ocr",))])
def test_small_runs(tmp_path, chunks, tasks):
    run = load_run(specimen(tmp_path, chunks=chunks, tasks=tasks, questions=3))
    for draw in (plots.accuracy_over_stream, plots.accuracy_by_task, plots.score_heatmap, plots.expert_activation, plots.experts_over_stream,
                 plots.first_experts):
        figure = np.atleast_1d(np.asarray(draw(run), dtype=object)).flat[0].figure
        figure.canvas.draw()
    plots.composition(run.stream).figure.canvas.draw()
    assert {p.name for p in plots.pictures(run)} == {"accuracy.png", "scores.png", "experts.png"}


def test_composition(runs):
    axes = plots.composition(runs[0].stream)
    heights = np.array([[abs(bar.get_height()) for bar in row] for row in axes.containers]).T
    share = runs[0].counts.div(runs[0].counts.sum(axis=1), axis=0).to_numpy()
    assert np.allclose(heights / heights.max(), share / share.max())
    assert [t.get_text() for t in axes.texts][:4] == [f"{runs[0].counts[t].sum():,}" for t in TASK4]


def test_comparison(runs):
    table, rows = report.compare(runs, draws=50), report.summary(runs)
    panels = plots.comparison(table, rows)
    for axes, name in zip(panels, ("MAP", "MAF", "final AP"), strict=True):
        marks = {line.get_gid(): line.get_xdata()[0] for line in axes.lines if line.get_gid()}
        assert np.isclose(marks["mean:strlora"], rows.query("method == 'strlora'")[name].mean()) and axes.get_title("left") == name
    assert [t.get_text() for t in panels[0].get_yticklabels()] == ["StrLoRA", "LoRA"]


def test_one_look_for_each_method():
    assert len({look(m)[1] for m in METHODS}) == len(METHODS) and look("new_one") == look("new_one")
    assert look("new_one")[1] in SPARE and not set(SPARE) & {look(m)[1] for m in METHODS}
    assert look("lora (train.lr=0.1)") == ("LoRA (train.lr=0.1)", *look("lora")[1:])


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_same_file_twice(runs, tmp_path, ending):
    first, second = (plots.save(plots.accuracy_over_stream(runs[:1]), tmp_path / f"{n}.{ending}").read_bytes() for n in "ab")
    assert first == second and b"Matplotlib" not in first and not plt.get_fignums()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_style_stays_at_home(runs):
    before = dict(matplotlib.rcParams)
    plots.accuracy_over_stream(runs[0])
    assert dict(matplotlib.rcParams) == before


def test_refusals(runs, tmp_path):
    paper = Run(runs[1].folder, {**runs[1].info, "spec": {**runs[1].info["spec"], "scale": "paper"}}, runs[1].stream, runs[1].predictions, None, None)
    for draw in (plots.accuracy_over_stream, plots.accuracy_by_task):
        with pytest.raises(SpecError, match="scales"): draw([runs[0], paper])
        with pytest.raises(SpecError, match="at least one"): draw([])
    with pytest.raises(SpecError, match="png"): plots.save(plots.composition(runs[0].counts), tmp_path / "figure.pdf")
