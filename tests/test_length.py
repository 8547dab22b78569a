"A limit on the tokens of a training sample, and lengths that are known without decoding a picture."
import contextlib
import io

import pytest
import torch
from chats import idefics, internvl
from PIL import Image
from small import make_base, rows, short_spec, timeless
from test_families import SAMPLES

from strlora import report, runs
from strlora.backbones.collate import Collator
from strlora.core import RecordError, SpecError, read_json
from strlora.data.images import ImageFile
from strlora.data.mini.export import export_mini
from strlora.evaluation import lengths_of
from strlora.job import Job
from strlora.trainer import Watcher

SIZE = {"chunks": 3, "chunk_size": 12, "test_size": 2, "proxy_size": 2}  # of `small.SHORT`


@pytest.fixture(scope="module")
def base(tmp_path_factory): return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    where = tmp_path_factory.mktemp("mini")/"mini"
    export_mini(where, seed=0, **SIZE)
    return where


def lengths(job, chunk): return [int(job.collate([s], pixels=False)["attention_mask"].sum()) for s in job.seen.chunks[chunk - 1].samples]


@pytest.fixture(params=["in memory", "in files"])
def spec_of(request, base, copy):
    "The same short run on either kind of stream."
    data = [f"stream.data={str(copy)!r}"] if request.param == "in files" else []
    return lambda *pairs: short_spec(base, *data, "stream.chunks=2", "eval.before=false", "method=lora", *pairs)


def test_longer_samples_are_left_out_by_name_and_questions_are_not(spec_of, tmp_path):
    job = Job(spec_of())
    found = [(n, c, i) for c in (1, 2) for i, n in enumerate(lengths(job, c))]
    asked = [n for p in job.questions("proxy") for n in p.lengths]
    most = max(asked) - 1
    gone = {(c, i) for n, c, i in found if n > most}
    assert 0 < len(gone) < 12 and len(asked) == 22, "the limit cuts through samples and questions"
    with contextlib.redirect_stderr(io.StringIO()) as err: runs.start(spec_of(f"train.max_length={most}"), tmp_path/"run")
    skipped, info, steps = rows(tmp_path/"run", "skipped"), read_json(tmp_path/"run"/"run.json"), rows(tmp_path/"run", "train")
    assert {(r["chunk"], r["place"]) for r in skipped} == gone and {r["reason"] for r in skipped} == {
        f"too long: {n} tokens, more than {most}" for n, c, i in found if (c, i) in gone}
    assert info["left_out"] == {"too long": len(gone)} and info["longer_questions"] == {"proxy": sum(n > most for n in asked)}
    assert err.getvalue().count("left out: sample ") == len(gone) and sum(r["samples"] for r in steps) == 24 - len(gone)
    assert {r["sample_id"] for r in rows(tmp_path/"run")} == {s.id for p in job.questions("proxy") for s in p.samples}, "every question is answered"
    assert f"{len(gone)} training samples left out (too long: {len(gone)})" in report.table(report.load_run(tmp_path/"run"))


def test_a_limit_that_nothing_exceeds_changes_nothing(base, tmp_path):
    for name, pairs in (("without", []), ("with", ["train.max_length=4096"])):
        short = short_spec(base, "stream.chunks=1", "eval.before=false", "method=lora", "save_every=0", *pairs)
        with contextlib.redirect_stderr(io.StringIO()): runs.start(short, tmp_path/name)
    assert timeless(rows(tmp_path/"with", "train")) == timeless(rows(tmp_path/"without", "train"))
    assert rows(tmp_path/"with") == rows(tmp_path/"without") and not (tmp_path/"with"/"skipped.parquet").exists()
    assert not {"left_out", "longer_questions"} & read_json(tmp_path/"with"/"run.json").keys()


def test_both_reasons_in_one_chunk_and_workers_find_the_same(base, copy, tmp_path):
    def left(*pairs):
        job, found = Job(short_spec(base, f"stream.data={str(copy)!r}", "stream.chunks=1", "method=lora", *pairs)), []
        class Rows(Watcher):
            def left_out(self, run, rows): found.extend(rows)
        job.trainer.train_chunk(job.seen.chunks[0], Rows())
        return [(r["place"], r["reason"].partition(":")[0]) for r in found]

    job = Job(short_spec(base, f"stream.data={str(copy)!r}", "method=lora"))
    sizes = lengths(job, 1)
    most, place = sorted(sizes)[-3], sizes.index(min(sizes))
    image = job.seen.chunks[0].samples[place].images[0]
    hidden = (image.root/image.path).rename(tmp_path/"hidden.png")
    pairs = [f"train.max_length={most}", "bad_images=skip"]
    expected = sorted([(i, "too long") for i, n in enumerate(sizes) if n > most] + [(place, "image missing")])
    try:
        assert left(*pairs) == left(*pairs, "train.workers=2") == expected
        with pytest.raises(RecordError, match="no such file.*bad_images=skip"): left(pairs[0])
    finally: hidden.rename(image.root/image.path)


def test_half_a_chunk_is_too_much(base):
    job = Job(short_spec(base, "method=lora", "train.max_length=3"))
    with pytest.raises(RecordError, match="chunk 1: expected a chunk of which at least half.*found 12 of 12.*too long.*Raise train.max_length"):
        job.trainer.fit(job.seen)


def test_lengths_are_known_before_a_method_has_seen_the_tasks(base):
    job = Job(short_spec(base, "stream.chunks=1", "method=branchlora", "settings.oracle_task_id=true", "train.max_length=4096"))
    job.trainer.fit(job.seen)
    assert job.trainer.total


def test_the_limit_is_a_number_of_tokens():
    with pytest.raises(SpecError, match="train.max_length"): short_spec("mini", "train.max_length=-1")


@pytest.mark.parametrize("make", [lambda: internvl(crop_to_patches=True), idefics])
def test_lengths_need_no_pixels(make, tmp_path, monkeypatch):
    "Tokens of tiles follow from width and height, which the head of a file tells."
    def filed(sample):
        files = []
        for i, image in enumerate(sample.images):
            image.save(tmp_path/f"{sample.id}{i}.png")
            files.append(ImageFile(tmp_path, f"{sample.id}{i}.png", "train/data_001.json", 0, "images[0]"))
        return type(sample)(**{**vars(sample), "images": tuple(files)})

    collate, samples = Collator(make()), [filed(s) for s in SAMPLES]
    whole, known = collate(samples), Collator(make())
    monkeypatch.setattr(ImageFile, "__call__", lambda self: pytest.fail("a picture was decoded"))
    monkeypatch.setattr(Image.Image, "convert", lambda self, *_, **__: self)
    light = known(samples, pixels=False)
    assert all(torch.equal(light[name], whole[name]) for name in light) and "pixel_values" not in light
    assert lengths_of(samples, known) == Collator(make())(SAMPLES, answers=False)["attention_mask"].sum(1).tolist()


def test_a_head_that_is_missing_is_an_error_like_any_other(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path/"a.png")
    image = lambda path, **how: ImageFile(tmp_path, path, "test/GQA/test.json", 7, "image", **how)
    assert image("a.png").measure() == (30, 20)
    (tmp_path/"b.png").write_text("no picture")
    for one, words in ((image("b.png"), "b.png"), (image("c.png"), "no such file"), (image("a.png", max_pixels=10), "30 x 20")):
        with pytest.raises(RecordError, match=f"record 7.*{words}"): one.measure()
