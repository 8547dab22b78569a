"The mini benchmark: records, scorers, plans, streams, and that training never shows what the tests ask."
import dataclasses
import functools
import hashlib
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from strlora.core import RecordError, SpecError
from strlora.data.mini import bench, captions, pictures, plans, questions, scenes
from strlora.data.records import Sample, validate
from strlora.data.stream import Lazy
from strlora.data.tasks import TASKS, iou, lcs, parse_box, rouge_l, score

ROOT = Path(__file__).resolve().parents[1]
small = functools.partial(bench.mini_stream, chunks=6, chunk_size=64, test_size=30, proxy_size=10)
few = settings(max_examples=60, deadline=None, derandomize=True)


def pixels(sample: Sample) -> str:
    return hashlib.sha1(sample.images[0].tobytes()).hexdigest()


def all_samples(stream) -> list[Sample]:
    return [sample for chunk in stream.chunks for sample in chunk.samples]


# --- records -------------------------------------------------------------------------------------------------------

GOOD = Sample("vqa-1", (Image.new("RGB", (4, 4)),), "what color ? one word .", "red", "vqa")


@pytest.mark.parametrize("field,value", [("images", ()), ("images", (None,)), ("instruction", ""), ("instruction", " \n"),
                                         ("answer", ""), ("answer", "\t"), ("answer", None), ("answer", 3)])
def test_a_record_with_something_missing_is_refused_by_name(field, value):
    with pytest.raises(RecordError) as caught: validate(dataclasses.replace(GOOD, **{field: value}), where="chunk 7")
    assert "vqa-1" in str(caught.value) and field in str(caught.value) and "chunk 7" in str(caught.value)


def test_a_good_record_passes():
    assert validate(GOOD) is GOOD
    for sample in all_samples(small()): validate(sample)


# --- scorers -------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from("a b c red of .".split()), max_size=8)
BOXES = st.tuples(*[st.integers(0, 8)] * 4).filter(lambda b: b[0] < b[2] and b[1] < b[3])


@few
@given(st.sampled_from(sorted(TASKS)), st.text(max_size=30), st.text(max_size=30))
def test_scores_are_between_zero_and_one_whatever_is_said(task, prediction, answer):
    assert 0 <= score(task, prediction, answer) <= 1
    assert score(task, "", answer) == score(task, " \n", answer) == 0


@few
@given(WORDS.filter(bool), st.sampled_from([t for t in TASKS if t != "grounding"]))
def test_gold_scores_one_in_any_case_and_spacing(words, task):
    assert score(task, " ".join(words), " ".join(words)) == 1
    assert score(task, "  ".join(words).upper() + " ", " ".join(words)) == 1


@few
@given(WORDS.filter(bool), WORDS.filter(bool))
def test_exact_match_gives_nothing_for_more_or_less_words(gold, more):
    assert score("vqa", " ".join(gold + more), " ".join(gold)) == 0
    assert score("vqa", " ".join(gold[:-1]), " ".join(gold)) == 0


@few
@given(BOXES, BOXES)
def test_overlap_of_boxes_counts_cells(a, b):
    def cells(box): return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}
    wanted = len(cells(a) & cells(b)) / len(cells(a) | cells(b))
    assert iou(a, b) == pytest.approx(wanted) and iou(a, b) == iou(b, a)
    text = "[ {} {} {} {} ]".format(*a)
    assert parse_box(text) == a and score("grounding", text, "[ {} {} {} {} ]".format(*b)) == (wanted > .5)


@pytest.mark.parametrize("text", ["", "[ ]", "[ 1 2 3 ]", "[ 1 2 3 4 5 ]", "[ 3 0 1 2 ]", "[ 0 0 0 0 ]", "1 2 3 4", "[ a b c d ]",
                                  "box [ 0 0 1 1 ]", "[ -1 0 1 1 ]", "[ nan 0 1 1 ]", "[ " + "9" * 400 + " 0 1 1 ]"])
def test_what_is_no_box_is_wrong(text):
    assert parse_box(text) is None and score("grounding", text, "[ 0 0 1 1 ]") == 0


@few
@given(WORDS, WORDS)
def test_longest_common_subsequence(a, b):
    @functools.cache
    def slow(i, j):
        if i == len(a) or j == len(b): return 0
        return 1 + slow(i + 1, j + 1) if a[i] == b[j] else max(slow(i + 1, j), slow(i, j + 1))
    assert lcs(a, b) == slow(0, 0) == lcs(b, a)
    if a and b: assert rouge_l(" ".join(a), [" ".join(b)]) == pytest.approx(2 * slow(0, 0) / (len(a) + len(b)))


def test_references_take_the_place_of_the_answer():
    assert score("textcaps", "b b", "a a", ("a a", "b b")) == 1 and score("vqa", "car", "auto", ("auto", "car")) == 1


def test_unknown_task():
    with pytest.raises(SpecError, match="grounding"): score("grunding", "a", "a")


# --- plans ---------------------------------------------------------------------------------------------------------

@few
@given(st.lists(st.floats(0, 5), min_size=1, max_size=9).filter(lambda w: sum(w) > .01), st.integers(0, 500), st.integers(0, 9))
def test_shares_sum_up_and_stay_near(weights, total, seed):
    for rng in (None, random.Random(seed)):
        parts = plans.shares(weights, total, rng)
        assert sum(parts) == total and all(p >= 0 for p in parts)
        assert all(abs(p - w / sum(weights) * total) < 1 + 1e-6 for p, w in zip(parts, weights, strict=True))


@few
@given(st.sampled_from(sorted(plans.PLANS)), st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 500))
def test_plans_have_exact_chunks_and_repeat(name, seed, chunks, size):
    table = plans.plan(name, seed, chunks, size, bench.TASK_NAMES)
    assert table.shape == (chunks, 11) and (table.sum(1) == size).all() and (table >= 0).all()
    assert (table == plans.plan(name, seed, chunks, size, bench.TASK_NAMES)).all()


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_what_they_promise(seed):
    table = plans.plan("windows", seed, 25, 400, bench.TASK_NAMES)
    present = table > 0
    assert np.ptp(table.sum(0)) <= 20, "equal totals"
    assert present.sum(1).min() >= 2 and present.sum(1).max() <= 8, "a few tasks in every chunk"
    first = present.argmax(0)
    assert len(set(first)) >= 8 and first.max() >= 12, "staggered entries"
    gone = [t for t in range(11) if not present[17:, t].any()]
    assert 3 <= len(gone) <= 5, "some vanish"
    returns = [(np.diff(present[:, t].astype(int)) == 1).sum() + present[0, t] for t in range(11)]
    assert sum(r >= 2 for r in returns) >= 7, "most come back"


def test_short_windows_still_hold_every_task():
    for seed in range(20):
        for chunks, size in ((6, 64), (10, 100), (25, 200)):
            assert plans.plan("windows", seed, chunks, size, bench.TASK_NAMES).sum(0).min() > 0


def test_released_table():
    table = plans.plan("strcvit", 3, 25, 2000, bench.TASK_NAMES)
    column = {name: table[:, i] for i, name in enumerate(bench.TASK_NAMES)}
    released = plans.released()
    for i, name in enumerate(plans.RELEASED_COLUMNS[1:], 1): assert (column[name] == released[:, i]).all()
    assert (sum(column[name] for name in plans.SHORT_TASKS) == released[:, 0]).all()
    assert all(column[name].sum() > 1500 for name in plans.SHORT_TASKS)
    half = plans.plan("strcvit", 3, 50, 1000, bench.TASK_NAMES)
    assert np.abs(half.reshape(25, 2, 11).sum(1)[:, 4] - released[:, 1]).max() <= 2


# --- streams -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", sorted(plans.PLANS))
def test_streams_repeat_and_differ_by_seed(name):
    one, same, other = (all_samples(small(name, seed=seed)) for seed in (3, 3, 4))
    assert [(s.id, pixels(s), s.instruction, s.answer) for s in one] == [(s.id, pixels(s), s.instruction, s.answer) for s in same]
    assert not {s.id for s in one} & {s.id for s in other}
    assert len({s.id for s in one}) == len(one) == 6 * 64


@pytest.mark.parametrize("name", sorted(plans.PLANS))
def test_chunks_hold_what_the_manifest_says(name):
    stream = small(name)
    for chunk, row in zip(stream.chunks, stream.manifest()["chunks"], strict=True):
        assert chunk.index == row["index"] and len(chunk.samples) == row["size"] == 64
        assert dict(Counter(s.task for s in chunk.samples)) == row["composition"] == chunk.composition
    assert stream.manifest()["tests"] == {task: {"full": 30, "proxy": 10} for task in TASKS}


def test_chunks_are_made_in_any_order():
    stream, again = small(), small()
    last = [s.id for s in stream.chunks[5].samples]
    assert [s.id for s in list(again.chunks)[5].samples] == last == [s.id for s in stream.chunks[-1].samples]


@pytest.mark.parametrize("chunks,size", [(1, 1), (1, 400), (3, 2), (7, 13)])
def test_odd_sizes(chunks, size):
    for name in plans.PLANS:
        stream = bench.mini_stream(name, 0, chunks, size, test_size=4, proxy_size=1)
        assert [len(chunk.samples) for chunk in stream.chunks] == [size] * chunks


@pytest.mark.parametrize("change", [{"chunks": 0}, {"chunk_size": -1}, {"test_size": 0}, {"proxy_size": 0}, {"chunks": 2.5},
                                    {"chunks": True}, {"proxy_size": 11, "test_size": 10}])
def test_sizes_that_cannot_be(change):
    with pytest.raises(SpecError, match=next(iter(change))): bench.mini_stream(**change)


@pytest.mark.parametrize("name", bench.ALIKE)
def test_ambiguous_words_change_nothing_else(name):
    plain, alike = small(), small(name)
    assert alike.plan == plain.plan and alike.name == name
    for one, other in zip(all_samples(plain), all_samples(alike), strict=True):
        assert (one.task, one.form, one.answer, pixels(one)) == (other.task, other.form, other.answer, pixels(other))
    texts = {stream.name: len({s.instruction for s in all_samples(stream)}) for stream in (plain, alike)}
    assert texts[name] <= texts["windows"] and texts[name] > 10


def test_steps_of_ambiguity_are_steps():
    "With every step fewer words tell tasks apart."
    words = [len({word for s in all_samples(small(name)) for word in s.instruction.split()}) for name in ("windows", *bench.ALIKE)]
    assert words == sorted(words, reverse=True) and len(set(words)) == 5


def test_all_names_of_streams_are_known_everywhere():
    from typing import get_args, get_type_hints

    from strlora.data.layout import NAMES
    from strlora.settings import StreamConfig
    assert set(bench.STREAMS) == set(NAMES) == set(get_args(get_type_hints(StreamConfig)["name"]))


def test_unknown_stream():
    with pytest.raises(SpecError, match="windows"): bench.mini_stream("windwos")


def test_seeds_for_tuning_and_reporting_are_apart():
    assert not set(bench.TUNING_SEEDS) & set(bench.REPORTING_SEEDS)


def test_the_same_stream_in_another_process():
    command = ("from strlora.data.mini import bench; import hashlib; s = bench.mini_stream('strcvit', 5, 3, 40, 4, 2); "
               "print(hashlib.sha1(''.join(x.id + hashlib.sha1(x.images[0].tobytes()).hexdigest() "
               "for c in s.chunks for x in c.samples).encode()).hexdigest())")
    outs = {subprocess.run([sys.executable, "-W", "ignore", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True,
                           env=dict(os.environ, PYTHONHASHSEED=seed)).stdout for seed in ("1", "2")}
    assert len(outs) == 1 and len(outs.pop()) == 41


def test_lazy_keeps_few():
    made = []
    items = Lazy(9, lambda i: made.append(i) or i, keep=2)
    assert list(items) == list(range(9)) and items[7] == 7 and len(made) == 9
    assert items[0] == 0 and len(made) == 10 and items[2:4] == [2, 3]
    with pytest.raises(IndexError): items[9]


# --- tests and training are apart ------------------------------------------------------------------------------------

def content(facts: dict) -> str:
    return repr(sorted((k, v) for k, v in facts.items() if k not in scenes.LOOKS))


@pytest.mark.parametrize("task", sorted(TASKS))
def test_no_scene_is_in_both_splits(task):
    drawn = {split: {content(questions.draw_question(form, random.Random(f"{split} {form.name} {i}"), split).facts)
                     for form in questions.FORMS[task] for i in range(400)} for split in ("train", "test")}
    assert len(drawn["test"]) > 40 and not drawn["train"] & drawn["test"]


def test_no_test_question_is_ever_trained():
    asked = {(pixels(s), s.instruction) for task in TASKS for style in ("own", "shared") for s in bench.test_set(task, style=style).samples}
    shown = {pixels(s) for s in bench.joint_samples(150, seed=1)} | {pixels(s) for s in all_samples(small("strcvit"))}
    assert not shown & {picture for picture, _ in asked}
    assert not {hashlib.sha1(image.tobytes()).hexdigest() for image, _ in captions.captions(800, 3)} & {picture for picture, _ in asked}


def test_shared_pictures_keep_one_split():
    "What is a test scene for one of the four tasks about shapes is one for all."
    form = {f.name: f for task in ("textcaps", "vqa", "gqa", "grounding") for f in questions.FORMS[task]}
    for name in form:
        for i in range(50): assert scenes.split_of(questions.draw_question(form[name], random.Random(i), "test").facts) == "test"


def test_test_sets_do_not_depend_on_seed_or_stream():
    a, b = small("windows", seed=1), small("abrupt", seed=2)
    for task in TASKS: assert [s.id for s in a.tests[task].samples] == [s.id for s in b.tests[task].samples]


@pytest.mark.parametrize("task", sorted(TASKS))
def test_proxies_hold_every_form_in_proportion(task):
    test = bench.test_set(task)
    assert len(test.samples) == 200 and len(test.proxy) == len(set(test.proxy)) == 40 and max(test.proxy) < 200
    full, proxy = Counter(s.form for s in test.samples), Counter(s.form for s in test.proxy_samples)
    assert all(proxy[form] * 5 == full[form] for form in full)
    assert len({s.id for s in test.samples}) == 200 and {s.task for s in test.samples} == {task}


# --- what is asked, and how ------------------------------------------------------------------------------------------

def test_sentences():
    own = {task: questions.SENTENCES[task] for task in TASKS}
    assert len(set(own.values())) == 11
    shared = bench.mini_stream("strcvit", 0, 25, 40, test_size=4, proxy_size=2)
    samples = all_samples(shared) + [s for test in shared.tests.values() for s in test.samples]
    for sample in samples: assert sample.instruction.endswith(questions.SHORT) == (sample.task in ("ad", "gqa", "rs", "vqa"))
    for sample in all_samples(small()): assert sample.instruction.endswith(own[sample.task])


def test_held_out_phrasings_are_never_trained():
    held = {(task, i) for task in TASKS for i in {s.instruction for s in bench.test_set(task, 60, 10, held_out=True).samples}}
    assert not held & {(s.task, s.instruction) for s in bench.joint_samples(150, seed=2)}
    with pytest.raises(SpecError, match="shared"): questions.instruct("vqa", questions.FORMS["vqa"][0], None, 0, "shard")


def test_vocabulary_holds_every_word():
    words = set(bench.vocabulary())
    assert 250 <= len(words) <= 350 and bench.vocabulary() == sorted(words)
    for sample in bench.joint_samples(150, seed=3): assert set(f"{sample.instruction} {sample.answer}".split()) <= words
    for task in TASKS:
        for held_out in (False, True):
            for sample in bench.test_set(task, held_out=held_out).samples:
                assert set(f"{sample.instruction} {sample.answer} {' '.join(sample.references)}".split()) <= words
    for _, caption in bench.captions(1500, 4): assert set(caption.split()) <= words
    for prompt in captions.PROMPTS: assert set(prompt.split()) <= words


@pytest.mark.parametrize("task", sorted(TASKS))
def test_gold_scores_one_and_fits_the_token_limit(task):
    for sample in bench.test_set(task).samples:
        assert score(task, sample.answer, sample.answer, sample.references) == 1
        assert len(sample.answer.split()) < TASKS[task].max_new_tokens
        assert f"{sample.instruction} {sample.answer}" == " ".join(f"{sample.instruction} {sample.answer}".lower().split())


def test_no_constant_answer_does_well():
    constant = bench.frequent_answers(bench.joint_samples(300, seed=5))
    for task in TASKS:
        samples = bench.test_set(task).samples
        value = np.mean([score(task, constant[task, s.form], s.answer, s.references) for s in samples])
        assert value < (.6 if task == "textcaps" else .45), task
    exists = [s for s in bench.test_set("vqa").samples if s.form == "exists"]
    assert len(exists) <= 100, "yes or no is at most half of the task"


def test_captions_are_no_answers():
    answers = {s.answer for task in TASKS for s in bench.test_set(task).samples}
    said = [text for _, text in bench.captions(1500, 6) if not text.startswith("a blank page")]
    assert not answers & set(said)
    assert not any(set(text.split()) & set("0123456789[]") for text in said)
    for sample in bench.test_set("textcaps").samples[:20]:
        assert np.mean([score("textcaps", text, sample.answer) for text in said[:200]]) < .4


def test_blank_pictures_keep_the_question():
    (one,) = bench.blanked(bench.test_set("vqa", 4, 2).samples[:1])
    assert len(one.images[0].getcolors()) == 1 and one.instruction == bench.test_set("vqa", 4, 2).samples[0].instruction


# --- pictures --------------------------------------------------------------------------------------------------------

def test_photographs_are_small_credited_and_licensed():
    folder, text = ROOT / "strlora/assets/photos", pictures.credits()
    assert sum(f.stat().st_size for f in folder.iterdir()) < 600_000
    for row in pictures.photo_sources()["photos"]:
        assert row["licence"] in {"CC0 1.0", "public domain", "CC BY 2.0"}
        assert hashlib.sha256((folder / row["file"]).read_bytes()).hexdigest() == row["sha256"]
        assert row["author"] in text and row["title"] in text and row["licence"] in text
        assert max(pictures.photo(row["file"].removesuffix(".jpg")).size) <= 320


def test_a_changed_or_unknown_photograph_is_refused(tmp_path, monkeypatch):
    for file in (ROOT / "strlora/assets/photos").iterdir(): (tmp_path / file.name).write_bytes(file.read_bytes())
    with open(tmp_path / "grass.jpg", "ab") as file: file.write(b"x")
    monkeypatch.setattr(pictures, "_photos", lambda: tmp_path)
    pictures.photo.cache_clear()
    with pytest.raises(RecordError, match="grass.jpg"): pictures.photo("grass")
    with pytest.raises(RecordError, match="brick"): pictures.photo("bricks")
    assert pictures.photo("brick").size == (320, 320)
    pictures.photo.cache_clear()


@pytest.mark.parametrize("kind", sorted(scenes.DRAW))
def test_pictures_have_one_size_and_repeat(kind):
    facts = captions.MAKERS[kind](random.Random(1))
    image = scenes.draw(facts)
    assert image.size == (pictures.SIZE, pictures.SIZE) and image.mode == "RGB"
    assert image.tobytes() == scenes.draw(dict(facts)).tobytes()
    assert len({scenes.draw(captions.MAKERS[kind](random.Random(i))).tobytes() for i in range(30)}) == 30


def test_the_data_layer_needs_no_torch():
    command = ("import sys; from strlora.data.mini import bench; s = bench.mini_stream(chunks=2, chunk_size=11, test_size=2, proxy_size=1); "
               "len(s.chunks[0].samples); print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_same_questions_in_words_that_training_never_shows():
    stream = bench.mini_stream("windows", 0, chunks=2, chunk_size=22, test_size=12, proxy_size=4)
    usual, other = stream.tested("full"), stream.tested("held_out")
    assert {task: len(found) for task, found in stream.tested("proxy").items()} == dict.fromkeys(stream.tasks, 4)
    for task in stream.tasks:
        assert [(s.answer, s.form) for s in usual[task]] == [(s.answer, s.form) for s in other[task]]
        asked = {form.name: form for form in questions.FORMS[task]}
        for s in other[task]: assert not asked[s.form].held_out or s.instruction not in {u.instruction for u in usual[task]}
    with pytest.raises(SpecError, match="split"): stream.tested("hidden")
    with pytest.raises(SpecError, match="other phrasings"): dataclasses.replace(stream, rephrased=None).tested("held_out")
