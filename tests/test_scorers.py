"Scorers of the released test sets: released and strict rules, boxes, charts, captions against a corpus, and rows scored together."
import json
import math
import random
import typing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strlora.artefacts import load_run, rescore, specimen
from strlora.core import CheckpointError, RecordError, SpecError, write_json
from strlora.data.corpus import Cider, plain_words, split_words
from strlora.data.metrics import sample_scores, score_matrix
from strlora.data.rules import CORPUS, PAIRS, RULES, SETS, highest, metric_of, score, score_rows, version_of
from strlora.data.scorers import amount, read_box, relaxed, vqa_words
from strlora.data.tasks import TASKS
from strlora.data.tasks import score as mini_score

few = settings(max_examples=80, deadline=None, derandomize=True)
SINGLE = sorted(set(SETS) - {"TextCaps"})
TEXTS = sorted(set(SINGLE) - {"Grounding"})
WORDS = st.lists(st.sampled_from("a the red 5 2017 0.5 -3 St. no none dont 45% t-shirt , ! x_y 1,000 é".split()), min_size=1, max_size=5)
CAPTIONS = st.lists(st.sampled_from("a red bus on the street says stop Bus. 12".split()), max_size=9).map(" ".join)
ANYTHING = st.text(max_size=30) | st.text("0123456789.,[]() -%", max_size=30)
BOX = st.tuples(*[st.integers(0, 100)] * 4).map(lambda b: tuple(v / 100 for v in (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))))


def written(box) -> str:
    return "[" + ",".join(f"{v:.2f}" for v in box) + "]"


def rows_of(predictions, golds, task="TextCaps", chunk=1, split="proxy"):
    "Rows of predictions.parquet for a set of captions."
    return [{"after_chunk": chunk, "split": split, "task": task, "sample_id": f"s{i}", "prediction": said, "answer": gold[0], "references": "\n".join(gold)}
            for i, (said, gold) in enumerate(zip(predictions, golds))]


# --- every set -----------------------------------------------------------------------------------------------------

@few
@given(st.sampled_from(TEXTS), WORDS)
def test_a_reference_is_a_right_answer(name, words):
    assert score(name, " ".join(words), " ".join(words)) == 1


@few
@given(BOX)
def test_a_reference_is_a_right_box(box):
    assert score("Grounding", written(box), written(box)) == 1


@pytest.mark.parametrize("name, gold", [("AD", "a  b"), ("ChartQA", "0.57"), ("Fin", "sideways trend"), ("Fin", "1.5"), ("GQA", "St. Louis."), ("OCRVQA", "a  b"),
                                        ("RS", "St.  Louis"), ("Grounding", "[0.20,0.44,0.40,0.49]")])
def test_released_rules_refuse_some_references_themselves(name, gold):
    assert score(name, gold, gold, rules="released") == 0 and score(name, gold, gold) == 1


@few
@given(st.sampled_from(SINGLE), ANYTHING, BOX, WORDS)
def test_scores_are_zero_or_one_whatever_is_said(name, said, box, words):
    gold = written(box) if name == "Grounding" else " ".join(words)
    for rules in RULES: assert score(name, said, gold, rules=rules) in (0, 1)


@few
@given(st.sampled_from(TEXTS), ANYTHING)
def test_nothing_is_never_right(name, gold):
    for nothing in ("", " ", "\n\t"): assert score(name, nothing, gold) == 0


def test_nothing_is_no_box_and_no_caption():
    assert score("Grounding", "", "[0.1,0.1,0.2,0.2]") == 0
    for rules in RULES: assert score_rows(rows_of(["", "a"], [["a red bus"], ["a car"]]), rules)[0] == 0
    assert [n for n in SINGLE if n != "Grounding" and score(n, "", "tabby", rules="released")] == ["ImageNet", "Places365"]
    assert [n for n in TEXTS if score(n, "", "the", rules="released")] == ["ImageNet", "Places365", "VQAv2"]


@few
@given(st.sampled_from(TEXTS), st.sampled_from(["red", "go straight", "2017", "0.5", "12 %", "st. louis"]), st.sampled_from(["", ".", " .", "\n"]))
def test_case_space_and_a_full_stop_do_not_matter(name, gold, end):
    assert score(name, "  ".join(gold.upper().split()) + end, gold) == score(name, gold, f" {gold.title()}{end} ") == 1


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("said, gold", [("1", "2017"), ("10", "0"), ("nothing", "no"), ("no", "nothing"), ("cat", "catfish"), ("yes or no", "no"), ("n", "no"),
                                        ("not Canada", "Canada")])
def test_a_part_is_not_the_whole(name, said, gold):
    assert score(name, said, gold) == 0


@pytest.mark.parametrize("name", sorted(set(TEXTS) - {"ImageNet", "Places365"}))   # in names of classes a hyphen is a space
def test_a_sign_counts(name):
    assert score(name, "-4", "4") == score(name, "4", "-4") == 0


@pytest.mark.parametrize("name", TEXTS)
def test_any_of_several_references(name):
    for rules in RULES: assert score(name, "car", "auto", ("auto", "car"), rules=rules) == 1


def test_unknown_names():
    with pytest.raises(SpecError, match="Grounding"): score("Grouding", "a", "a")
    with pytest.raises(SpecError, match="strict"): score("AD", "a", "a", rules="strickt")
    with pytest.raises(SpecError, match="score_rows"): score("TextCaps", "a", "a")


def test_the_table_is_whole():
    from strlora.spec import EvalConfig
    assert list(SETS) == ["AD", "ChartQA", "Fin", "GQA", "Grounding", "ImageNet", "OCRVQA", "Places365", "RS", "TextCaps", "VQAv2"]
    assert {n for n, s in SETS.items() if not s.in_ap} == {"GQA", "ChartQA"}
    used = {m for s in SETS.values() for m in s.metrics.values()}
    assert used == {*PAIRS, *CORPUS} and all(s.max_new_tokens == 100 for s in SETS.values())
    versions = [s.versions for s in SETS.values()]
    assert not {v["released"] for v in versions} & {v["strict"] for v in versions} and 1 not in {v for pair in versions for v in pair.values()}
    assert set(typing.get_args(typing.get_type_hints(EvalConfig)["rules"])) == set(RULES) and EvalConfig().rules == "strict"


@few
@given(st.sampled_from(sorted(TASKS)), st.text(max_size=20), st.text(max_size=20))
def test_mini_tasks_are_scored_as_before(name, said, gold):
    for rules in RULES: assert score(name, said, gold, rules=rules) == mini_score(name, said, gold)
    assert version_of(name, "released") == version_of(name) == TASKS[name].version and metric_of(name) == TASKS[name].metric


# --- single rules --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, said, gold, released", [
    ("AD", "It is red.", "red", 0), ("AD", "it is red", "red", 1), ("AD", "redder", "red", 1), ("AD", "Unanswerable, or red", "red", 0),
    ("RS", "between 10 and 20", "10 and 20", 1), ("RS", "u.s.", "u.s.", 0), ("Fin", "Up.", "up", 1), ("Fin", "u p", "up", 1), ("OCRVQA", "A Novel", "a novel", 1),
    ("OCRVQA", "a novel.", "a novel", 0), ("GQA", "Yes..", "yes", 1), ("GQA", "yes it is", "yes", 0), ("ChartQA", "057", "0.57", 1), ("ImageNet", "TAB", "tabby", 1),
    ("VQAv2", "The two", "2", 1), ("Grounding", "0.1,0.1,0.9,0.9", "[0.1,0.1,0.9,0.9]", 0), ("Grounding", "nonsense", "[0.1,0.1,0.9,0.9]", 0),
    ("Grounding", "[0.10,0.10,0.90,0.90]", "[0.10,0.10,0.90,0.90]", 1)])
def test_released_rules(name, said, gold, released):
    assert score(name, said, gold, rules="released") == released


@few
@given(st.integers(1, 10**6), st.integers(0, 10**6))
def test_five_percent_of_a_number(gold, said):
    if 1800 <= gold < 2100: assert relaxed(str(said), str(gold)) == (said == gold)
    else: assert relaxed(str(said), str(gold)) == relaxed(f"{said:,}", f"${gold:,}") == (20 * abs(said - gold) <= gold)


@pytest.mark.parametrize("text, value", [("1,000.5", 1000.5), ("-3", -3), ("−3", -3), ("+.5", .5), ("50%", .5), ("$7", 7), ("$ 7", None), ("7.", 7), ("1,00", None), ("1e3", None),
                                         ("nan", None), ("inf", None), ("", None), ("12 million", None), ("٣", None), ("--3", None), ("1_000", None)])
def test_amounts(text, value):
    assert amount(text) == (None if value is None else pytest.approx(value))


@few
@given(WORDS)
def test_the_normal_form_of_vqa_is_stable(words):
    form = vqa_words(" ".join(words))
    assert vqa_words(form) == form and vqa_words(" ".join(words).upper()) == form


# --- boxes ---------------------------------------------------------------------------------------------------------

@few
@given(BOX, st.sampled_from(["[{}, {}, {}, {}]", "({} {} {} {})", "[[{},{}],[{},{}]]", "<box>({},{}),({},{})</box>", "{},{},{},{}", "It is at [ {} ; {} ; {} ; {} ]."]))
def test_boxes_are_read_however_they_are_written(box, form):
    text = form.format(*(f"{v:.2f}" for v in box))
    assert read_box(text) == read_box(text, (640, 480)) == pytest.approx(box)


@few
@given(BOX, BOX)
def test_boxes_are_right_above_half_overlap(a, b):
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = sum((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)) - shared
    if a != b and union and abs(shared / union - .5) > 1e-6: assert score("Grounding", written(a), written(b)) == (shared / union > .5)
    if a != b and not union: assert score("Grounding", written(a), written(b)) == 0


@pytest.mark.parametrize("text, size, wanted", [
    ("[10,20,30,40]", None, None), ("[10,20,30,40]", (640, 480), None), ("[10,20,30,40]", (20, 20), None),      # percent, per mille or pixels
    ("[100,200,300,400]", None, None), ("[100,200,300,400]", (640, 480), None), ("[100,200,300,400]", (200, 200), (.1, .2, .3, .4)),
    ("[1100,200,1200,400]", None, None), ("[1100,200,1200,400]", (2000, 1000), (.55, .2, .6, .4)), ("[1100,200,1200,400]", (640, 480), None),
    ("[0.1,0.2,0.3,0.4]", (1, 1), (.1, .2, .3, .4)), ("[0,0,1,1]", (640, 480), (0, 0, 1, 1)), ("[0.1,0.2,0.3,4]", None, None),
    ("[" + "9" * 400 + ",0,1,1]", (640, 480), None), ("[0.3,0.2,0.1,0.4]", None, None), ("[0.1,0.2,-0.3,0.4]", None, None), ("0.1 0.2 0.3 0.4 0.5", None, None),
    ("0.1 0.2 0.3 0.4 0.5%", None, None), ("[0.1,0.2,0.3,0.4] [0.1,0.2,0.3,0.4]", None, None), ("0.1.0.2.0.3.0.4", None, None), ("x1=0.1 y1=0.2 x2=0.3 y2=0.4", None, None)])
def test_only_boxes_of_one_possible_scale_are_read(text, size, wanted):
    assert read_box(text, size) == (wanted if wanted is None else pytest.approx(wanted))


def test_a_reference_that_is_no_box_is_an_error_under_both_rules():
    for rules in RULES:
        with pytest.raises(RecordError, match="reference of a Grounding"): score("Grounding", "[0.1,0.1,0.2,0.2]", "[10,10,20,20]", rules=rules)
    assert score("Grounding", "[100,200,300,400]", "[0.1,0.2,0.3,0.4]", size=(200, 200)) == 1 and score("Grounding", "[100,200,300,400]", "[0.1,0.2,0.3,0.4]") == 0


# --- captions ------------------------------------------------------------------------------------------------------

def test_cider_is_that_of_pycocoevalcap():
    "Stored values, since the package weighs 104 MB: for each caption and for the set, to nine digits."
    stored = json.loads((Path(__file__).parent/"oracle"/"cider.json").read_text(encoding="utf-8"))["sets"]
    for row in stored:
        ours = Cider(row["golds"], split_words)(row["said"])
        assert ours == pytest.approx(row["each"], abs=1e-9) and np.mean(ours) == pytest.approx(row["mean"], abs=1e-9)
    assert max(row["mean"] for row in stored) > 1 and len(stored[-1]["said"]) == 30



@few
@given(st.lists(st.tuples(CAPTIONS, st.lists(CAPTIONS, min_size=1, max_size=3)), min_size=1, max_size=5), st.sampled_from([split_words, plain_words]))
def test_cider_lies_between_zero_and_ten(pictures, tokens):
    for value in Cider([golds for _, golds in pictures], tokens)([said for said, _ in pictures]): assert 0 <= value <= highest("TextCaps") + 1e-9


def test_the_only_reference_is_perfect_if_it_is_long_enough():
    golds = [["a red bus stands still"], ["the sign says stop"], ["green", "green"]]
    said = [g[0] for g in golds]
    for rules in RULES: assert score_rows(rows_of(said, golds), rules) == pytest.approx([10, 10, 2.5])


def test_case_and_punctuation_of_captions_matter_to_the_released_rule_alone():
    golds = [["One red bus, near the street."], ["Its sign says stop."]]
    loud = [g[0].upper().replace(",", "").replace(".", " !") for g in golds]
    assert score_rows(rows_of(loud, golds)) == pytest.approx([10, 10]) and score_rows(rows_of(loud, golds), "released") == [0, 0]


def test_cider_is_nothing_wrong_but_rows_of_one_set():
    with pytest.raises(RecordError, match="picture 1"): Cider([["a"], []])
    with pytest.raises(ValueError): Cider([["a"], ["b"]])(["a"])


# --- rows ----------------------------------------------------------------------------------------------------------

GOLDS = [["a red bus", "the bus is red"], ["a sign that says stop", "stop sign"], ["a bottle of cola", "cola in a bottle"]]


def test_captions_are_scored_within_task_split_and_chunk():
    here, there, full = (rows_of([g[0] for g in GOLDS], GOLDS, chunk=c, split=s) for c, s in ((1, "proxy"), (2, "proxy"), (1, "full")))
    alone = score_rows(here)
    assert alone == Cider(GOLDS)([g[0] for g in GOLDS])
    mixed = [r for three in zip(here, there, full[:2] + [dict(full[2], references="other words")]) for r in three]
    random.Random(0).shuffle(mixed)
    found = {(r["after_chunk"], r["split"], r["sample_id"]): s for r, s in zip(mixed, score_rows(mixed))}
    assert [found[1, "proxy", f"s{i}"] for i in range(3)] == [found[2, "proxy", f"s{i}"] for i in range(3)] == alone
    assert found[1, "full", "s0"] != alone[0], "another set, other weights"


def test_rows_of_all_tasks_are_scored_in_order():
    rows = [*rows_of(["Two", "no"], [["2"], ["yes", "no"]], "VQAv2"), *rows_of(["10"], [["0"]], "RS"), *rows_of(["two"], [["2"]], "vqa"), *rows_of(["a red bus"], GOLDS[:1])]
    rows[0]["references"] = ""
    assert score_rows(rows) == [1, 1, 0, 0, 0] and score_rows(rows, "released") == [1, 1, 1, 0, 0] and score_rows([]) == []


@pytest.fixture
def released_run(tmp_path):
    "A stored run over RS and TextCaps, scored by the released rules."
    folder = specimen(tmp_path / "run", chunks=2, tasks=("rs", "textcaps"), experts=0, questions=3)
    frame = pd.read_parquet(folder / "predictions.parquet")
    frame["task"] = frame["task"].map({"rs": "RS", "textcaps": "TextCaps"})
    caption = frame["task"] == "TextCaps"
    number = frame["sample_id"].str[-1].astype(int)
    frame.loc[~caption, ["prediction", "answer"]] = ["10", "0"]
    frame.loc[caption, "references"] = number[caption].map(lambda i: "\n".join(GOLDS[i]))
    frame.loc[caption, "answer"] = number[caption].map(lambda i: GOLDS[i][0])
    frame.loc[caption, "prediction"] = number[caption].map(lambda i: GOLDS[i][0].title())
    frame["score"] = score_rows(frame.to_dict("records"), "released")
    frame["task_version"] = 101
    frame.to_parquet(folder / "predictions.parquet")
    write_json(folder / "run.json", {"method": "strlora", "status": "invented", "spec": {"method": "strlora", "seed": 0, "scale": "mini", "eval": {"rules": "released"}}})
    stream = {"name": "invented", "seed": 0, "tasks": ["RS", "TextCaps"], "tests": {}, "chunks": [
        {"index": k, "size": 2, "composition": {"RS": 1, "TextCaps": 1}} for k in (1, 2)]}
    write_json(folder / "stream.json", stream)
    return folder


def test_a_stored_run_is_read_by_its_own_rules_and_judged_by_both(released_run):
    run = load_run(released_run)
    strict = run.under("strict")
    assert run.rules == "released" and strict.rules == "strict" and set(strict.predictions["task_version"]) == {201}
    assert run.scores().loc[2].to_dict() == {"RS": 100, "TextCaps": 0} and strict.scores().loc[2, "RS"] == 0
    assert strict.scores().loc[2, "TextCaps"] == pytest.approx(100 * np.mean(Cider(GOLDS)([g[0] for g in GOLDS]))) and strict.scores().loc[2, "TextCaps"] > 100
    assert strict.under("released").scores().equals(run.scores())


def test_scores_of_other_rules_are_noticed(released_run):
    frame = pd.read_parquet(released_run / "predictions.parquet")
    with pytest.raises(CheckpointError, match="task version 201, found 101"): rescore(frame, "here", "strict")
    with pytest.raises(CheckpointError, match="score"): rescore(frame.assign(task_version=201), "here", "strict")
    assert rescore(frame, "here", "released")["score"].equals(frame["score"])


def test_runs_from_before_the_rules_could_be_chosen_are_strict(tmp_path):
    folder = specimen(tmp_path / "old", chunks=2, tasks=("rs",), experts=0, questions=3)
    run = load_run(folder)
    assert run.rules == "strict" == run.info["spec"]["eval"]["rules"] and run.under("released").scores().equals(run.scores())


def test_captions_alone_may_score_above_one():
    frame = pd.DataFrame({"after_chunk": 1, "split": "proxy", "task": ["TextCaps", "RS"], "sample_id": ["a", "b"], "score": [9.5, 1.0]})
    assert score_matrix(frame).loc[1].to_dict() == {"TextCaps": 950, "RS": 100}
    for wrong in ([10.5, 1], [9, 1.5], [-.1, 1], [math.nan, 1]):
        with pytest.raises(RecordError, match="scores in"): sample_scores(frame.assign(score=wrong))


def test_evaluation_scores_by_the_rules_of_the_spec(monkeypatch):
    from types import SimpleNamespace

    from strlora import evaluation
    samples = [SimpleNamespace(task=t, id=f"{t}{i}", form="", instruction="?", answer=g, references=r) for t, i, g, r in (
        ("TextCaps", 0, GOLDS[0][0], tuple(GOLDS[0])), ("RS", 0, "0", ()), ("TextCaps", 1, GOLDS[1][0], tuple(GOLDS[1])))]
    said = {"TextCaps0": "A  red bus\n", "RS0": "10", "TextCaps1": "stop sign"}
    monkeypatch.setattr(evaluation, "answers", lambda _, batches, *__: ((s, said[s.id]) for prompts in batches for s in prompts.samples))
    batches = [evaluation.Prompts(tuple(some), dict, (9,) * len(some)) for some in (samples[:2], samples[2:])]
    for rules in RULES:
        rows = evaluation.evaluate(None, batches, None, 3, "proxy", rules=rules)
        assert [r["task"] for r in rows] == ["RS", "TextCaps", "TextCaps"] and [r["task_version"] for r in rows] == [version_of("RS", rules)] * 3
        assert [r["score"] for r in rows] == score_rows(rows, rules) and rows[0]["score"] == (rules == "released") and rows[2]["score"] > 0
    assert [evaluation.limit_of(SimpleNamespace(task=t)) for t in ("TextCaps", "vqa")] == [100, TASKS["vqa"].max_new_tokens]
