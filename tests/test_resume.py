"A run may die at any instant: what is resumed ends as if nothing had happened."
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from small import make_base, rows, session, short_spec, timeless

from strlora import again, checkpoint, evaluation, runs, trainer
from strlora.answered import Answered
from strlora.core import CheckpointError, SpecError, TrainingError, read_json, write_json
from strlora.job import load_model

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    "An undisturbed run, and how long it took."
    start = time.monotonic()
    return runs.start(short_spec(base), tmp_path_factory.mktemp("whole")/"run"), time.monotonic() - start


@pytest.fixture(autouse=True)
def as_in_a_terminal():
    "A background job of a shell ignores Ctrl-C from its start; these tests press it."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)


def child(job, *args):
    "Run a function in a forked process; its exit code, -9 after SIGKILL."
    process = FORK.Process(target=job, args=args)
    process.start()
    process.join()
    return process.exitcode


def go(base, folder):
    if runs.status_of(folder) == "absent": runs.start(short_spec(base), folder)
    else: runs.resume(folder)


def die_in_step(base, folder, total):
    "Die between backward pass and optimizer step of the step after `total`."
    true = trainer.apply_step
    trainer.apply_step = lambda run, share: die() if run.total == total else true(run, share)
    go(base, folder)


def die_while_saving(base, folder, count):
    "Die with the weights written and the state not."
    true, left = checkpoint.write_json, [count]
    def write(*args):
        left[0] -= 1
        return die() if left[0] == 0 else true(*args)
    checkpoint.write_json = write
    go(base, folder)


def die_after_rows(base, folder, chunk):
    "Die when a chunk's answers are written and its position is not."
    true = runs.Recorder.chunk_done
    runs.Recorder.chunk_done = lambda self, run: die() if run.chunk == chunk + 1 else true(self, run)
    go(base, folder)


def same(a, b):
    assert rows(a) == rows(b)
    assert timeless(rows(a, "train")) == timeless(rows(b, "train"))
    assert rows(a, "routing") == rows(b, "routing")


def test_killed_at_random_steps(base, whole, tmp_path):
    folder, steps = tmp_path/"run", sorted(random.Random(0).sample(range(9), 2))
    for total in steps: assert child(die_in_step, base, folder, total) == -signal.SIGKILL
    assert child(die_while_saving, base, folder, 2) == -signal.SIGKILL
    assert child(die_after_rows, base, folder, 3) == -signal.SIGKILL
    assert runs.status_of(folder) == "running"
    assert child(go, base, folder) == 0
    same(folder, whole[0])
    assert read_json(folder/"run.json")["resumed"] == 4 and not (folder/"parts").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["strlora", "strlora_released", "lora", "joint"])
def test_killed_at_random_instants(base, tmp_path, method):
    spec, draw = short_spec(base, f"method={method}", "stream.chunks=4", "kl_from_chunk=2") if method.startswith("strlora") else \
        short_spec(base, f"method={method}", "stream.chunks=4"), random.Random(method)
    start = time.monotonic()
    runs.start(spec, tmp_path/"whole")
    took, folder, killed = time.monotonic() - start, tmp_path/"run", 0
    for _ in range(40):
        if runs.status_of(folder) == "finished": break  # killed after its last word
        process = FORK.Process(target=lambda: runs.start(spec, folder) if runs.status_of(folder) == "absent" else runs.resume(folder))
        process.start()
        process.join((draw.uniform(0.2, 0.9) if killed else 0.3) * took)  # the first time surely before its end
        if process.exitcode is not None: break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += 1
    assert runs.status_of(folder) == "finished" and killed
    assert rows(folder) == rows(tmp_path/"whole")


def test_ctrl_c_saves_and_says_how_to_go_on(base, whole, tmp_path, monkeypatch):
    true = runs.Recorder.step_done
    def press(self, run, row):
        if run.total == 5: os.kill(os.getpid(), signal.SIGINT)
        true(self, run, row)
    monkeypatch.setattr(runs.Recorder, "step_done", press)
    folder = tmp_path/"run"
    with pytest.raises(runs.Interrupted, match="strlora resume"): runs.start(short_spec(base), folder)
    monkeypatch.undo()
    assert runs.status_of(folder) == "interrupted" and (folder/"predictions.parquet").exists()
    with pytest.raises(SpecError, match="strlora resume"): runs.start(short_spec(base), folder)
    _, state = checkpoint.load(folder/"checkpoint")
    assert state["position"]["total"] == 5
    refuses_another_spec(folder)
    runs.resume(folder)
    same(folder, whole[0])
    with pytest.raises(CheckpointError, match="finished"): runs.resume(folder)
    with pytest.raises(SpecError, match="finished"): runs.start(short_spec(base), folder)


# --- while questions are answered -----------------------------------------------------------------------------------

ASKS = ("eval.prompts=8", "full_every=2", "chunk_size=8", "stream.chunks=2")  # three batches a split, both splits at the end


@pytest.fixture(scope="module")
def asked(base, tmp_path_factory):
    "An undisturbed run with several batches in every evaluation, and how many it asked."
    with pytest.MonkeyPatch.context() as patch:
        calls = watch(patch, "answers")
        return runs.start(short_spec(base, *ASKS), tmp_path_factory.mktemp("asked")/"run"), len(calls)


def watch(patch, name, at=0, act=None):
    "Count the calls of a function of evaluation; before the one number `at`, act."
    true, calls = getattr(evaluation, name), []
    def watched(*args):
        calls.append(1)
        if len(calls) == at: act()
        return true(*args)
    patch.setattr(evaluation, name, watched)
    return calls


def press(): os.kill(os.getpid(), signal.SIGINT)


def same_end(a, b):
    same(a, b)
    (mine, at), (theirs, there) = checkpoint.load(a/"checkpoint"), checkpoint.load(b/"checkpoint")
    assert at["position"] == there["position"] and mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.mark.parametrize("name, at, position", [("answers", 2, None), ("answers", 12, (2, True)), ("routed", 2, (2, True))],
                         ids=["before training", "at the last batch", "within the record of routing"])
def test_ctrl_c_between_two_batches_of_questions(base, asked, tmp_path, monkeypatch, capsys, name, at, position):
    "It stops there, and asks no question twice when it goes on."
    calls, folder = watch(monkeypatch, "answers"), tmp_path/"run"
    reached = watch(monkeypatch, name, at, press)
    with pytest.raises(runs.Interrupted, match="saved.*strlora resume"): runs.start(short_spec(base, *ASKS), folder)
    assert len(reached) == at and "after this step or batch of questions" in capsys.readouterr().err
    assert runs.status_of(folder) == "interrupted" and len(list((folder/"parts").glob("*.answered.parquet"))) == 1
    found = checkpoint.load(folder/"checkpoint")[1]["position"] if position else {"chunk": 1, "trained": False}
    assert (found["chunk"], found["trained"]) == (position or (1, False)) and bool(position) == checkpoint.exists(folder/"checkpoint")
    runs.resume(folder)
    assert len(calls) == asked[1]
    same_end(folder, asked[0])


def test_a_second_ctrl_c_stops_within_a_batch(base, asked, tmp_path, monkeypatch):
    calls, folder = watch(monkeypatch, "answers", 11, lambda: (press(), press())), tmp_path/"run"
    with pytest.raises(KeyboardInterrupt): runs.start(short_spec(base, *ASKS), folder)
    assert len(calls) == 11 and runs.status_of(folder) == "interrupted" and not list((folder/"parts").glob("*.answered.parquet"))
    runs.resume(folder)
    assert len(calls) == asked[1] + 5  # the evaluation of the second chunk from its start
    same_end(folder, asked[0])


def die_in_evaluation(base, folder, at):
    "Die within a batch of questions, when those before it are written down."
    Answered.every = 0
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, "answers", at, die)
        runs.start(short_spec(base, *ASKS), folder)


def test_killed_within_an_evaluation(base, asked, tmp_path, monkeypatch):
    folder = tmp_path/"run"
    assert child(die_in_evaluation, base, folder, 11) == -signal.SIGKILL
    calls = watch(monkeypatch, "answers")
    runs.resume(folder)
    assert len(calls) == asked[1] - 10
    same_end(folder, asked[0])


@pytest.mark.slow
def test_answers_of_a_chunk_that_is_trained_anew_are_forgotten(base, asked, tmp_path, monkeypatch):
    "As after a folder was put together from parts of different age."
    folder = tmp_path/"run"
    true = runs.Recorder.step_done
    monkeypatch.setattr(runs.Recorder, "step_done", lambda self, run, row: (run.total == 3 and press(), true(self, run, row)))
    with pytest.raises(runs.Interrupted): runs.start(short_spec(base, *ASKS), folder)
    monkeypatch.undo()
    stale, questions = Answered(folder, 2), session(base, *ASKS).questions("proxy")
    stale.of("proxy", questions)[0] = ["old"] * 8
    stale.keep(at_once=True)
    runs.resume(folder)
    same_end(folder, asked[0])


def test_eval_that_is_stopped_changes_nothing(asked, tmp_path, monkeypatch):
    folder = shutil.copytree(asked[0], tmp_path/"run")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    watch(monkeypatch, "answers", 2, press)
    with pytest.raises(KeyboardInterrupt): again.ask_again(folder, ["proxy"])
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    monkeypatch.undo()
    again.ask_again(folder, ["proxy"])
    key = lambda r: (r["after_chunk"], r["split"], r["sample_id"])
    assert sorted(rows(folder), key=key) == sorted(rows(asked[0]), key=key)


def refuses_another_spec(folder):
    info = read_json(folder/"run.json")
    changed = {**info, "spec": {**info["spec"], "train": {**info["spec"]["train"], "lr": 0.5, "threads": 1}, "seed": 9}}
    write_json(folder/"run.json", changed)
    with pytest.raises(CheckpointError, match="seed is 9 here and 0 in the checkpoint; train.lr is 0.5 here"): runs.resume(folder)
    write_json(folder/"run.json", {**info, "status": "interrupted"})


def test_a_full_disk_leaves_the_last_checkpoint(base, whole, tmp_path, monkeypatch):
    true, calls = checkpoint.save_file, []
    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7: raise OSError(28, "No space left on device")
        return true(*args, **kwargs)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left.*before it is whole.*strlora resume"): runs.start(short_spec(base), tmp_path/"run")
    monkeypatch.undo()
    assert runs.status_of(tmp_path/"run") == "failed"
    checkpoint.load(tmp_path/"run"/"checkpoint")
    runs.resume(tmp_path/"run")
    same(tmp_path/"run", whole[0])


def test_a_card_that_cannot_be_written_costs_nothing(base, whole, tmp_path, monkeypatch):
    def full(folder): raise OSError(28, "No space left on device")
    monkeypatch.setattr(runs, "write_card", full)
    with pytest.raises(OSError, match="No space left"): runs.start(short_spec(base), tmp_path/"run")
    assert runs.status_of(tmp_path/"run") == "failed"
    monkeypatch.undo()
    runs.resume(tmp_path/"run")
    same(tmp_path/"run", whole[0])
    assert runs.status_of(tmp_path/"run") == "finished" and (tmp_path/"run"/"checkpoint"/"README.md").is_file()


def test_the_first_checkpoint_on_a_full_disk_says_that_there_is_none(tmp_path, monkeypatch):
    def full(*args, **kwargs): raise OSError(28, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="none before it"): checkpoint.save(tmp_path/"checkpoint", torch.nn.Linear(2, 2), {}, {})
    assert not list(tmp_path.iterdir())


def test_a_rate_that_blows_up_is_never_saved(base, tmp_path):
    with pytest.raises(TrainingError, match="finite"): runs.start(short_spec(base, "method=lora", "lr=1e30", "save_every=1"), tmp_path/"run")
    state = checkpoint.load(tmp_path/"run"/"checkpoint")[0]
    assert state and all(t.abs().max() < 1e3 for t in state.values())


@pytest.mark.parametrize("content", [{}, [], {"status": "running", "method": "lora", "spec": {}}, {"status": "running", "spec": {"seed": 1}}])
def test_a_damaged_run_is_one_error(content, tmp_path):
    write_json(tmp_path/"run.json", content)
    for verb in (runs.resume, runs.status_of, lambda f: again.ask_again(f, ["proxy"])):
        with pytest.raises(CheckpointError, match="run.json"): verb(tmp_path)


def test_a_damaged_tree_is_one_error(base, whole, tmp_path):
    shutil.copytree(whole[0]/"checkpoint", tmp_path/"checkpoint")
    write_json(tmp_path/"checkpoint"/"state.json", {"format": 1})
    with pytest.raises(CheckpointError, match="with spec and state"): checkpoint.load(tmp_path/"checkpoint", {})


def test_others_may_read_what_is_saved(whole):
    modes = {p.stat().st_mode & 0o777 for p in (whole[0]/"checkpoint").iterdir()}
    assert len(modes) == 1


FULL = """
import resource, signal, sys, torch
from strlora import checkpoint
from strlora.core import CheckpointError
folder, model = sys.argv[1], torch.nn.Linear(2, 2)
checkpoint.save(folder, model, {"position": 1, "moment": torch.ones(4)}, {})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try: checkpoint.save(folder, model, {"position": 2, "moment": torch.ones(100_000)}, {})
except CheckpointError as error: print("refused", checkpoint.load(folder)[1]["position"])
"""


def test_a_file_that_the_system_will_not_let_grow_is_an_error_and_the_old_checkpoint_stays(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path/"checkpoint")], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["refused", "1"], done.stderr


def test_the_checkpoint_is_an_adapter_for_peft(base, whole):
    from peft import PeftModel

    import strlora
    strlora.register()
    model, _ = load_model(base)
    loaded = PeftModel.from_pretrained(model, whole[0]/"checkpoint")
    state, _ = checkpoint.load(whole[0]/"checkpoint")
    mine = checkpoint.adapter_state(loaded)
    assert mine.keys() == state.keys() and all((mine[k] == state[k]).all() for k in mine)
    assert any("ema" in k for k in state)


def test_a_run_is_small(whole):
    assert sum(p.stat().st_size for p in whole[0].glob("*.*") if p.is_file()) < 100_000
