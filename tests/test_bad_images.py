"Pictures that cannot be read: a training sample is left out by name, a test sample stops the run, and nothing else moves."
import contextlib
import io
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from small import make_base, rows, short_spec, timeless
from test_released import huge

from strlora import folder, report, runs
from strlora.cli import main
from strlora.core import RecordError, SpecError, read_json
from strlora.data.mini.export import export_mini
from strlora.data.released import released_stream
from strlora.job import Job
from strlora.trainer import Watcher

SIZE = {"chunks": 3, "chunk_size": 12, "test_size": 2, "proxy_size": 2}  # of `small.SHORT`


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy(tmp_path):
    export_mini(tmp_path/"mini", seed=0, **SIZE)
    return tmp_path/"mini"


def cut(path): path.write_bytes(path.read_bytes()[:60])
def remove(path): path.unlink()
def words(path): path.write_text("no picture")
def bomb(path): path.write_bytes(huge())
def deep(path): Image.new("I;16", (8, 8)).save(path)


def spoil(folder, broken):
    "Break the picture of samples, given as (chunk, place) → how; their ids."
    stream, ids = released_stream(folder), {}
    for (chunk, place), how in broken.items():
        sample = stream.chunks[chunk - 1].samples[place]
        how(folder/"images"/sample.images[0].path)
        ids[chunk, place] = sample.id
    return ids


def spec_on(folder, base, *pairs):
    return short_spec(base, f"stream.data={str(folder)!r}", "stream.bad_images=skip", *pairs)


def quietly(job, *args):
    "What a job says on stderr."
    with contextlib.redirect_stderr(io.StringIO()) as err: job(*args)
    return err.getvalue()


def test_samples_are_left_out_by_name_and_the_rest_stays(copy, base, tmp_path, monkeypatch):
    "The same steps without five samples; stopped in between and resumed, the same numbers, each named once."
    broken = {(1, 3): cut, (1, 8): words, (2, 0): remove, (2, 5): bomb, (2, 7): deep}
    ids, short = spoil(copy, broken), spec_on(copy, base, "stream.chunks=2", "eval.before=false")
    said = quietly(runs.start, short, tmp_path/"whole")
    assert {(r["chunk"], r["place"]): r["sample_id"] for r in rows(tmp_path/"whole", "skipped")} == ids
    reasons = " ".join(r["reason"] for r in rows(tmp_path/"whole", "skipped"))
    assert all(word in reasons for word in ("OSError", "no such file", "pixels", "mode I;16", "UnidentifiedImageError"))
    assert sorted(re.findall(r"^left out: sample (\S+) \(train/data_00\d.json, record \d+\), image", said, re.M)) == sorted(ids.values())
    steps = rows(tmp_path/"whole", "train")
    assert len(steps) == 6 and [sum(r["samples"] for r in steps if r["chunk"] == c) for c in (1, 2)] == [10, 9]
    shown = report.load_run(tmp_path/"whole")
    assert "5 training samples left out" in report.table(shown) and '"skipped": 5' in report.summary_json(shown)
    card = (tmp_path/"whole"/"checkpoint"/"README.md").read_text()
    assert re.search(r"^Left out of these samples: 5 \(", card, re.M), card

    true = runs.Recorder.step_done
    def press(self, run, row):
        if run.total == 4: self.stop = 2
        true(self, run, row)
    monkeypatch.setattr(runs.Recorder, "step_done", press)
    def stopped():
        with pytest.raises(runs.Interrupted): runs.start(short, tmp_path/"cut")
    first = quietly(stopped)
    monkeypatch.undo()
    assert len(rows(tmp_path/"cut", "skipped")) == 5
    again = quietly(runs.resume, tmp_path/"cut")
    assert first.count("left out") == 5 and again.count("left out") == 0
    for name in ("predictions", "skipped"): assert rows(tmp_path/"cut", name) == rows(tmp_path/"whole", name)
    assert timeless(rows(tmp_path/"cut", "train")) == timeless(rows(tmp_path/"whole", "train"))


@pytest.mark.slow
def test_a_run_that_stopped_at_a_picture_goes_on_without_it(copy, base, tmp_path):
    ids = spoil(copy, {(2, 4): cut})
    with pytest.raises(RecordError, match=r"train/data_002.json, record 4.*bad_images=skip"):
        runs.start(short_spec(base, f"stream.data={str(copy)!r}", "method=lora", "stream.chunks=2", "eval.before=false"), tmp_path/"run")
    assert runs.status_of(tmp_path/"run") == "failed"
    said = quietly(runs.resume, tmp_path/"run", {"stream.bad_images": "skip"})
    assert [r["sample_id"] for r in rows(tmp_path/"run", "skipped")] == list(ids.values()) and said.count("left out") == 1


def trained(spec):
    "A trained job and the numbers of its steps."
    found = []
    class Steps(Watcher):
        def step_done(self, run, row): found.append({k: v for k, v in row.items() if k not in ("seconds", "grad_norm")})
    job = Job(spec)
    job.trainer.fit(job.seen, Steps())
    return job, found


METHODS = ["ewc", "strlora_prototypes", *(pytest.param(m, marks=pytest.mark.slow) for m in ("branchlora", "replay", "same", "lwf", "olora", "smolora"))]


@pytest.mark.parametrize("method", METHODS)
def test_parts_that_look_at_samples_outside_steps_see_the_readable_ones(copy, base, method):
    spoil(copy, {(1, i): cut for i in range(4)} | {(2, 1): remove})
    pairs = {"replay": ["memory=8", "replay_share=0.5"], "same": ["freeze_after=1"], "olora": ["r=32"], "strlora_prototypes": ["r=32"]}.get(method, [])
    job, steps = trained(spec_on(copy, base, f"method={method}", "stream.chunks=2", "save_every=0", *pairs))
    size = sum(sum(row.values()) for row in job.seen.plan)
    assert sum(row["samples"] for row in steps) <= size - 5 and all(torch.isfinite(torch.tensor(row["loss"])) for row in steps)
    assert len(steps) == sum(-(-sum(row.values()) // 4) for row in job.seen.plan)


@pytest.mark.slow
def test_two_processes_leave_out_what_one_does(copy, base, tmp_path):
    "With workers on each of them, and pictures that pass at every step."
    ids = spoil(copy, {(1, 3): cut, (1, 4): remove, (2, 0): remove})
    pairs = (f"model.base={base!r}", f"stream.data={str(copy)!r}", "bad_images=skip", "method=lora", "stream.chunks=2", "eval.before=false",
             "batch_size=2", "accumulation=2", "train_projector=true", "workers=2", "lora_dropout=0.0", "threads=1")
    words = ["run", *(x for pair in pairs for x in ("--set", pair))]
    assert main([*words, "--out", str(tmp_path/"one")]) == 0
    code = "import sys; from strlora.cli import main; sys.exit(main(sys.argv[1:]))"
    path = os.pathsep.join([str(folder.PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python", sys.executable, "-c", code]
    done = subprocess.run([*launch, *words, "--out", str(tmp_path/"two")], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path))
    assert done.returncode == 0 and all(done.stderr.count(f"left out: sample {one} ") == 1 for one in ids.values()), done.stderr[-2000:]
    one, two = (rows(tmp_path/name, "train") for name in ("one", "two"))
    assert rows(tmp_path/"one", "skipped") == rows(tmp_path/"two", "skipped") and len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert (a["samples"], a["tokens"]) == (b["samples"], b["tokens"]) and a["loss"] == pytest.approx(b["loss"], abs=1e-4)


def test_a_step_without_samples_moves_nothing(copy, base):
    short = spec_on(copy, base, "stream.chunks=1", "batch_size=1", "optimizer_state=carry")
    spoil(copy, {(1, i): cut for i in (0, 5)})
    job, moved = Job(short), []
    class Steps(Watcher):
        def step_done(self, run, row): moved.append((row["samples"], torch.cat([p.detach().flatten() for p in run.parameters])))
    job.trainer.fit(job.seen, Steps())
    assert sorted(n for n, _ in moved) == [0, 0] + [1] * 10
    for (_, before), (n, after) in zip(moved, moved[1:]): assert torch.equal(before, after) == (n == 0)


def test_half_a_chunk_is_no_accident(copy, base):
    spoil(copy, {(1, i): remove for i in range(7)})
    with pytest.raises(RecordError, match="chunk 1: expected a chunk of which at least half.*found 7 of 12.*data verify"):
        trained(spec_on(copy, base, "stream.chunks=1"))


def test_a_test_sample_is_never_left_out(copy, base, tmp_path):
    sample = next(iter(released_stream(copy).tests.values())).proxy_samples[0]
    cut(copy/"images"/sample.images[0].path)
    with pytest.raises(RecordError, match="test/") as caught: runs.start(spec_on(copy, base), tmp_path/"run")
    assert "bad_images" not in str(caught.value)


def test_only_files_have_broken_pictures(base):
    with pytest.raises(SpecError, match="stream.bad_images"): short_spec(base, "stream.bad_images=skip")


def test_a_record_of_a_stream_in_memory_is_as_it_was(base, tmp_path):
    folder = runs.start(short_spec(base, "method=zero_shot"), tmp_path/"run")
    assert "bad_images" not in read_json(folder/"run.json")["spec"]["stream"] and not (folder/"skipped.parquet").exists()
