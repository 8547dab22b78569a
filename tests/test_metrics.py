"MAP, MAF and their relatives: the worked example, properties over random matrices, intervals and tests."
import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from strlora.core import RecordError, SpecError
from strlora.data.intervals import bootstrap, holm, interval, paired_t, sign_flip
from strlora.data.metrics import (AF_k, AP_k, Definition, MAF, MAP, METRICS, STRICT, composition, grid, measure, sample_scores,
                                  score_matrix)

nan = float("nan")


def frame(values, columns=None, first=1):
    values = np.asarray(values, float)
    columns = columns or [f"t{j}" for j in range(values.shape[1])]
    return pd.DataFrame(values, range(first, first + len(values)), columns)


@pytest.fixture
def worked():
    "Two tasks, three chunks; the second task enters in chunk 2."
    return frame([[60, nan], [50, 40], [55, 45]]), frame([[4, 0], [0, 4], [2, 2]])


def test_worked_example(worked):
    assert AP_k(*worked).tolist() == [60, 45, 50]
    assert np.isclose(MAP(*worked), 155 / 3)
    assert AF_k(*worked).tolist()[1:] == [10, 0]
    assert MAF(*worked) == 5.0


@pytest.mark.parametrize("choice, expected", [
    ({"clip": True}, (10 + 2.5) / 2), ({"divide": "K"}, 10 / 3), ({"reference": "previous"}, (10 - 5) / 2),
    ({"reference": "last-seen"}, 5.0), ({"start": "stream"}, 5.0)])
def test_options(worked, choice, expected):
    scores, counts = worked
    assert np.isclose(MAF(scores.fillna(0), counts, Definition(**choice)), expected)


def test_last_seen_differs_from_max():
    scores, counts = frame([[60], [80], [50], [40]]), frame([[4], [0], [4], [0]])
    other = frame([[0], [4], [0], [4]], ["o"])
    counts, scores = counts.join(other), scores.join(frame([[50]] * 4, ["o"]))
    f = lambda **c: MAF(scores, counts, Definition(**c))
    assert np.isclose(f(), np.mean([-20, 15, 20]))            # o is constant; t0: 60-80, 80-50, 80-40
    assert np.isclose(f(reference="last-seen"), np.mean([-20, 5, 5]))  # 60-80, 60-50, 50-40


def test_all_tasks_and_floor():
    scores, counts = frame([[0, 10], [60, 20], [50, 40]], first=0), frame([[4, 0], [0, 4]])
    d = Definition(tasks="all", start="floor")
    assert AP_k(scores, counts, d).tolist() == [5, 40, 45]
    assert MAP(scores, counts, d) == 42.5                      # the row before training is no part of the mean
    assert MAF(scores, counts, d) == ((60 - 50) + (20 - 40)) / 2
    assert MAF(scores, counts, Definition(tasks="all")) == 10  # nothing learned of the second task before chunk 2


def test_streaming_metrics():
    scores = frame([[0, 5, 10], [60, 5, 10], [40, 70, 20], [50, 50, 50], [30, 60, 40]], first=0)
    counts = frame([[4, 0, 0], [0, 4, 0], [4, 0, 4], [0, 4, 0]])
    m = measure(scores, counts)
    assert m["retention gap"] == np.mean([60 - 40, 70 - 50, 50 - 30, 50 - 40])
    assert m["reinforcement gain"] == np.mean([50 - 40, 60 - 50])
    assert m["first-exposure gain"] == np.mean([60, 65, 30])
    assert m["zero-shot floor"] == 5


def test_fewer_points_than_chunks():
    scores = frame([[0, 0], [60, 30], [40, 50]], first=0).set_axis([0, 2, 4])
    counts = frame([[4, 0], [2, 2], [0, 4], [0, 4]])
    with pytest.raises(RecordError, match=r"none after chunks 1, 3.*evaluated"): MAP(scores, counts)
    d = Definition(points="evaluated")
    assert MAP(scores, counts, d) == 45 and MAF(scores, counts, d) == ((60 - 40) + (30 - 50)) / 2
    g = grid(scores, counts, d)
    assert g.present.tolist() == [[False, False], [True, True], [False, True]]


def test_one_chunk():
    m = measure(frame([[70.0]]), frame([[4]]))
    assert m["MAP"] == m["final AP"] == 70
    assert all(np.isnan(m[name]) for name in ("MAF", "retention gap", "reinforcement gain", "first-exposure gain", "zero-shot floor"))


def test_before_training_only():
    m = measure(frame([[10.0, 20.0]], first=0), frame([[4, 4]]), Definition(points="evaluated", tasks="all"))
    assert m["zero-shot floor"] == m["final AP"] == 15 and np.isnan(m["MAP"]) and np.isnan(m["MAF"])


def test_errors(worked):
    scores, counts = worked
    with pytest.raises(SpecError, match="max"): Definition(reference="maximum")
    with pytest.raises(RecordError, match="task t1 after chunk 2"): MAP(scores.mask(scores == 40), counts)
    with pytest.raises(RecordError, match="none for t1"): MAP(scores[["t0"]], counts)
    with pytest.raises(RecordError, match="rising"): MAP(scores.set_axis([1, 2, 9]), counts)
    with pytest.raises(RecordError, match="rising"): MAP(scores.loc[[2, 1, 3]], counts)
    with pytest.raises(RecordError, match="composition: expected rising"): MAP(scores, counts.loc[[1, 3, 2]])


@st.composite
def streams(draw, floor=True):
    "A random matrix with a random composition; every chunk holds at least one task."
    K, T = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    scores = draw(arrays(float, (K + floor, T), elements=st.floats(0, 100)))
    counts = draw(arrays(int, (K, T), elements=st.integers(0, 2)))
    counts[np.arange(K), draw(arrays(int, K, elements=st.integers(0, T - 1)))] += 1
    return frame(scores, first=1 - floor), frame(counts).astype(int)


definitions = st.builds(Definition, tasks=st.sampled_from(["seen", "all"]), clip=st.booleans(), reference=st.sampled_from(["max", "previous", "last-seen"]),
                        start=st.sampled_from(["exposure", "stream", "floor"]), divide=st.sampled_from(["K-1", "K"]))


@settings(max_examples=200, deadline=None)
@given(streams(), definitions, st.randoms())
def test_order_of_tasks_is_nothing(stream, definition, random):
    scores, counts = stream
    order = random.sample(list(scores.columns), scores.shape[1])
    before, after = measure(scores, counts, definition), measure(scores[order], counts[order], definition)
    assert all(np.isclose(before[n], after[n], equal_nan=True) for n in METRICS)


@settings(max_examples=200, deadline=None)
@given(streams(), definitions)
def test_bounds(stream, definition):
    m = measure(*stream, definition)
    for name in ("MAP", "final AP", "zero-shot floor"): assert np.isnan(m[name]) or -1e-9 <= m[name] <= 100 + 1e-9
    for name in METRICS: assert np.isnan(m[name]) or abs(m[name]) <= 100 + 1e-9
    if definition.clip and not np.isnan(m["MAF"]): assert m["MAF"] >= 0
    assert np.isnan(m["MAF"]) == (len(stream[1]) < 2)


@settings(max_examples=100, deadline=None)
@given(streams(), definitions, st.floats(0, 100))
def test_constant_scores_forget_nothing(stream, definition, value):
    scores, counts = stream
    m = measure(scores * 0 + value, counts, definition)
    for name in ("MAF", "retention gap", "reinforcement gain", "first-exposure gain"): assert np.isnan(m[name]) or abs(m[name]) < 1e-9
    assert np.isclose(m["MAP"], value)


@settings(max_examples=100, deadline=None)
@given(streams())
def test_plain_loops_agree(stream):
    "The definition written out, with no arrays."
    scores, counts = stream
    K, tasks = len(counts), list(counts.columns)
    first = {j: next((k for k in range(1, K + 1) if counts.loc[k, j]), None) for j in tasks}
    seen = {k: [j for j in tasks if first[j] and first[j] <= k] for k in range(1, K + 1)}
    ap = [np.mean([scores.loc[k, j] for j in seen[k]]) for k in seen]
    af = [np.mean([max(scores.loc[l, j] for l in range(first[j], k)) - scores.loc[k, j] for j in seen[k - 1]]) for k in range(2, K + 1)]
    assert np.isclose(MAP(scores, counts), np.mean(ap))
    assert np.isclose(MAF(scores, counts), np.mean(af) if af else nan, equal_nan=True)


@settings(max_examples=50, deadline=None)
@given(streams(), st.floats(0, 1), st.floats(0, 50))
def test_scale_and_shift(stream, scale, shift):
    scores, counts = stream
    before, after = measure(scores, counts), measure(scores * scale / 2 + shift, counts)
    for name in METRICS:
        moved = shift if name in ("MAP", "final AP", "zero-shot floor") else 0
        assert np.isclose(after[name], before[name] * scale / 2 + moved, equal_nan=True)


def predictions(chunks=(0, 1, 2), tasks=("a", "b"), n=6, split="proxy", seed=0):
    rng = np.random.default_rng(seed)
    return pd.DataFrame([{"after_chunk": k, "split": split, "task": t, "sample_id": f"{t}{i}", "score": float(rng.random() < 0.5)}
                         for k in chunks for t in tasks for i in range(n)])


def test_score_matrix():
    p = pd.concat([predictions(), predictions(chunks=[2], split="full", n=20, seed=1)])
    proxy, full = score_matrix(p, tasks=["b", "a"]), score_matrix(p, "full")
    assert list(proxy.columns) == ["b", "a"] and list(proxy.index) == [0, 1, 2] and list(full.index) == [2]
    mine = p[(p.split == "proxy") & (p.task == "a") & (p.after_chunk == 1)].score
    assert np.isclose(proxy.loc[1, "a"], 100 * mine.mean())
    assert np.allclose(score_matrix(p.sample(frac=1, random_state=0), tasks=["b", "a"]), proxy)


def test_bad_predictions():
    p = predictions()
    with pytest.raises(SpecError, match="proxy"): score_matrix(p, "proxi")
    with pytest.raises(RecordError, match="twice.*a3|a3.*twice"): score_matrix(pd.concat([p, p[p.sample_id == "a3"].head(1)]))
    with pytest.raises(RecordError, match="no score for sample a3"): score_matrix(p.drop(p.index[(p.sample_id == "a3") & (p.after_chunk == 2)]))
    for bad in (1.5, -0.1, nan):
        with pytest.raises(RecordError, match=r"\[0, 1\]"): score_matrix(p.assign(score=p.score.where(p.index != 4, bad)))


def test_composition():
    manifest = {"tasks": ["b", "a"], "chunks": [{"index": 1, "composition": {"a": 3}}, {"index": 2, "composition": {"b": 1, "a": 2}}]}
    assert composition(manifest).to_dict("list") == {"b": [0, 1], "a": [3, 2]} and list(composition(manifest).index) == [1, 2]
    back = {"tasks": ["a", "b"], "chunks": [{"index": k, "composition": {"ab"[k % 2]: k}} for k in (1, 2, 3, 4)]}
    assert list(composition(back).index) == [1, 2, 3, 4], "some versions of pandas go task by task"


def test_bootstrap_covers_and_pairs():
    counts = frame([[4, 0], [0, 4]], ["a", "b"])
    samples = [sample_scores(predictions(n=40, seed=s)) for s in range(3)]
    draws = [bootstrap(s, counts) for s in samples]
    point = np.mean([measure(pd.DataFrame({t: f.mean(axis=1) for t, f in s.items()}), counts)["MAP"] for s in samples])
    low, high = interval([d["MAP"] for d in draws])
    assert low < point < high and high - low < 30
    assert interval([d["MAP"] for d in draws], 0.5)[0] > low
    better = [{t: (f + 10).clip(upper=110) for t, f in s.items()} for s in samples]      # ten points more on each sample
    gain = [bootstrap(b, counts)["MAP"] - d["MAP"] for b, d in zip(better, draws)]
    assert np.allclose(interval(gain), 10)                                                # paired: no spread is left
    shuffled = {t: f.sample(frac=1, axis=1, random_state=1) for t, f in reversed(samples[0].items())}
    assert np.allclose(bootstrap(shuffled, counts)["MAP"], draws[0]["MAP"])               # order of samples and tasks is nothing


def test_bootstrap_width_is_right():
    "The spread of a proportion over resampled test sets is known in closed form."
    values = pd.DataFrame([[100.0] * 30 + [0.0] * 70], [1], range(100))
    draws = bootstrap({"a": values}, frame([[4]], ["a"]), draws=4000)["MAP"]
    assert np.isclose(draws.std(), 100 * np.sqrt(0.3 * 0.7 / 100), rtol=0.05)


def test_significance():
    from scipy.stats import ttest_rel

    a, b = [60.0, 62.0, 61.0, 66.0], [55.0, 58.0, 60.0, 59.0]
    assert np.allclose(paired_t(np.subtract(a, b)), ttest_rel(a, b))
    assert all(np.isnan(paired_t([1.0]))) and paired_t([0.0, 0.0]) == (0.0, 1.0) and paired_t([2.0, 2.0])[1] == 0
    assert sign_flip([1.0, 2.0, 3.0]) == 0.25 and sign_flip([1, 2, 3, 4, 5]) == 2 / 32 and sign_flip([1.0, -1.0]) == 1
    assert sign_flip(np.ones(20)) < 0.01
    assert np.allclose(holm([0.04, nan, 0.01]), [0.04, nan, 0.02], equal_nan=True) and holm([]).size == 0
    assert holm([0.5, 0.6]).tolist() == [1, 1]


def test_definition_names_its_sources():
    assert all("source" in f.metadata for f in dataclasses.fields(Definition)) and Definition() == STRICT
