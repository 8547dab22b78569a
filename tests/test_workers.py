"Batches made ahead by other processes: the same bits, the same errors, and an end whatever happens."
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small import make_base, rows, short_spec, timeless

from strlora import folder, runs
from strlora.core import RecordError, TrainingError
from strlora.data.mini.export import export_mini
from strlora.data.released import released_stream
from strlora.job import Job
from strlora.trainer import Watcher
from strlora.workers import ahead

SIZE = {"chunks": 2, "chunk_size": 12, "test_size": 2, "proxy_size": 2}
PAIRS = ("method=lora", "train_projector=true", "stream.chunks=2", "eval.before=false", "eval.every=2", "batch_size=2", "accumulation=2", "grad_norm_every=0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")/"mini"
    export_mini(folder, seed=0, **SIZE)
    return folder


def on_files(base, copy, *pairs):
    return short_spec(base, f"stream.data={str(copy)!r}", *PAIRS, *pairs)


class Stop(Exception): "Ends a training."


class Steps(Watcher):
    "Rows of the steps; acts at one of them."

    def __init__(self, at=0, act=lambda: None): self.rows, self.at, self.act = [], at, act

    def step_done(self, run, row):
        self.rows.append({k: v for k, v in row.items() if k != "seconds"})
        if row["step"] == self.at: self.act()


def trained(spec, *args):
    job, steps = Job(spec), Steps(*args)
    job.trainer.fit(job.seen, steps)
    return [p.detach().clone() for p in job.trainer.parameters], steps.rows


def test_two_workers_make_what_none_makes(base, copy, tmp_path, monkeypatch):
    "All weights after two chunks with dropout, to the last bit; and a run that stops within a chunk and goes on with another number."
    (a, first), (b, second) = (trained(on_files(base, copy, f"workers={n}")) for n in (0, 2))
    assert first == second and len(first) == 6 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    true = runs.Recorder.step_done
    def press(self, run, row):
        assert len(multiprocessing.active_children()) == 2
        if run.total == 2: self.stop = signal.SIGINT
        true(self, run, row)
    monkeypatch.setattr(runs.Recorder, "step_done", press)
    with pytest.raises(runs.Interrupted): runs.start(on_files(base, copy, "workers=2"), tmp_path/"run")
    assert not multiprocessing.active_children()
    monkeypatch.undo()
    runs.resume(tmp_path/"run", {"train.workers": 1})
    assert timeless(rows(tmp_path/"run", "train")) == first


def test_a_worker_that_dies_is_an_error_with_its_place(base, copy, tmp_path, monkeypatch):
    "The run that it belongs to goes on from its checkpoint."
    true = runs.Recorder.step_done
    def kill(self, run, row):
        true(self, run, row)
        if run.total == 2:
            for worker in multiprocessing.active_children(): os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.5)
    monkeypatch.setattr(runs.Recorder, "step_done", kill)
    with pytest.raises(TrainingError, match=r"chunk 1, step \d: .*worker.*train.workers=N.*strlora resume"):
        runs.start(on_files(base, copy, "workers=2"), tmp_path/"run")
    assert runs.status_of(tmp_path/"run") == "failed" and not multiprocessing.active_children()
    monkeypatch.undo()
    assert runs.status_of(runs.resume(tmp_path/"run")) == "finished"


def test_an_error_in_a_worker_is_the_one_that_the_main_process_would_raise(base, copy):
    sample = released_stream(copy).chunks[1].samples[3]
    place = copy/"images"/sample.images[0].path
    whole, said = place.read_bytes(), []
    place.write_bytes(whole[:60])
    for n in (0, 2):
        with pytest.raises(RecordError) as caught: trained(on_files(base, copy, f"workers={n}"))
        said.append((type(caught.value), str(caught.value), str(caught.value.where), caught.value.remedy))
        del caught
    place.write_bytes(whole)
    assert said[0] == said[1] and "record 3" in said[0][1] and not multiprocessing.active_children()


def test_anything_else_ends_the_workers_too(base, copy):
    def stop(): raise Stop
    with pytest.raises(Stop): trained(on_files(base, copy, "workers=2"), 1, stop)
    assert not multiprocessing.active_children()


def test_features_stay_in_the_main_process(base, monkeypatch):
    monkeypatch.setattr("strlora.workers.DataLoader", lambda *_, **__: pytest.fail("workers without pictures"))
    trained(short_spec(base, "method=lora", "stream.chunks=1", "workers=2"))


def test_a_programming_error_keeps_its_class():
    def wrong(): return {}["nothing"]
    with pytest.raises(KeyError), ahead([wrong], 1, lambda: "here") as items: next(items)


def test_no_shared_memory_is_said(monkeypatch):
    def full(self): raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(TrainingError, match="No space left.*/dev/shm"), \
            ahead([functools.partial(dict, x=torch.zeros(2))], 1, lambda: "here") as items: next(items)


def workers_of(process):
    "The children of a process."
    return [int(c) for c in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="finds the workers of a run in /proc")
def test_a_signal_to_the_whole_group_saves_the_run_and_ends_its_workers(base, copy, tmp_path, number):
    "As a terminal or a scheduler sends it: workers leave it to the main process; if that is killed, they end by themselves."
    pairs = (f"stream.data={str(copy)!r}", f"model.base={base!r}", *PAIRS, "workers=2", "batch_size=1", "accumulation=1", "threads=1", "save_every=1")
    words = ["run", *(x for pair in pairs for x in ("--set", pair)), "--out", str(tmp_path/"run")]
    path = os.pathsep.join([str(folder.PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", "import sys; from strlora.cli import main; sys.exit(main(sys.argv[1:]))", *words],
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True,
                               env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path))
    deadline, found = time.monotonic() + 200, []
    while time.monotonic() < deadline and process.poll() is None and not (found := workers_of(process)): time.sleep(0.05)
    assert found, process.stderr.read()[-2000:]
    while time.monotonic() < deadline and process.poll() is None and not (tmp_path/"run"/"checkpoint").exists(): time.sleep(0.05)
    if number == signal.SIGKILL: process.kill()
    else: os.killpg(process.pid, number)
    _, err = process.communicate(timeout=100)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and err.count("stopping after this step") == 1, err
        assert runs.status_of(tmp_path/"run") == "interrupted"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in found): time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)
    assert runs.status_of(runs.resume(tmp_path/"run")) == "finished"
