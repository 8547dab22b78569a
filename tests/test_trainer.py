"One pass over a stream: tokens, accumulation, moments, penalties, chunk boundaries, what is not a number."
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import SHORT, make_base, rows, session, short_spec, timeless

from strlora import runs
from strlora.core import RecordError, SpecError, TrainingError
from strlora.data.stream import Chunk
from strlora.methods.base import Part
from strlora.spec import TrainConfig
from strlora.schedule import course, plan
from strlora.trainer import train_step

RECIPES = Path(__file__).parents[1]/"recipes"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def first_steps(base, *pairs, steps=2):
    "Rows and parameters after some steps of chunk 1."
    s = session(base, "lora_dropout=0.0", "warmup=0.0", *pairs)
    s.trainer.moment("stream_start")
    s.trainer.model.train()
    s.trainer.moment("chunk_start")
    found = [train_step(s.trainer, make(), 1.0) for make in s.trainer.batches(s.seen.chunks[0])[:steps]]
    return found, weights(s.trainer)


def test_a_step_does_not_depend_on_how_it_is_cut(base):
    whole, a = first_steps(base, "chunk_size=16", "batch_size=8")
    cut, b = first_steps(base, "chunk_size=16", "batch_size=4", "accumulation=2")
    for x, y in zip(whole, cut, strict=True):
        for name in ("loss", "lm", "kl", "grad_norm", "grad_norm_lm"):
            if x.get(name) is not None: assert math.isclose(x[name], y[name], rel_tol=2e-4, abs_tol=1e-7), name
        assert (x["samples"], x["tokens"]) == (y["samples"], y["tokens"]) == (8, x["tokens"])
    assert max((a[n] - b[n]).abs().max() for n in a) < 2e-4


def test_the_penalty_reaches_the_gradient_and_keeps_its_weight(base):
    s = session(base, "lora_dropout=0.0", "kl_weight=10.0", "chunk_size=8", "ema_decay=0.5", "grad_norm_every=1", "accumulation=2")
    t = s.trainer
    t.moment("stream_start"), t.model.train(), t.moment("chunk_start")
    step = t.batches(s.seen.chunks[0])[0]
    found = [train_step(t, step(), 1.0) for t.total in range(4)]
    assert found[0]["kl"] == pytest.approx(0, abs=1e-6) and found[-1]["kl"] > 0 and found[-1]["grad_norm_kl"] > 0
    assert found[-1]["loss"] == pytest.approx(found[-1]["lm"] + found[-1]["kl"])


def test_everything_declared_trainable_moves(base):
    for method in ("strlora", "strlora_released", "lora"):
        s = session(base, f"method={method}", "lora_dropout=0.0")
        t, before = s.trainer, weights(s.trainer)
        t.moment("stream_start"), t.model.train(), t.moment("chunk_start")
        for make in t.batches(s.seen.chunks[0]): train_step(t, make(), 1.0)
        still = [n for n, p in weights(t).items() if torch.equal(p, before[n])]
        assert not still, f"{method}: {still[:3]}"


def test_the_moments_come_in_order(base):
    class Spy(Part):
        def __init__(self): self.seen = []
        def __getattribute__(self, name):
            if name in ("stream_start", "chunk_start", "loss", "after_backward", "after_step", "chunk_end"): object.__getattribute__(self, "seen").append(name)
            return object.__getattribute__(self, name)
    s, spy = session(base, "method=lora", "stream.chunks=2", "chunk_size=5", "accumulation=1"), Spy()
    s.trainer.parts["spy"] = s.trainer.objective.parts["spy"] = spy
    s.trainer.fit(s.seen)
    step = ["loss", "after_backward", "after_step"]
    assert spy.seen == ["stream_start"] + 2 * ["chunk_start", *step, *step, "chunk_end"]


def test_no_sample_is_dropped_and_small_chunks_train(base):
    s = session(base, "method=lora", "stream.chunks=2", "chunk_size=3", "batch_size=8")
    s.trainer.fit(s.seen)
    assert s.trainer.total == 2
    samples = s.seen.chunks[0].samples
    one_task = [x for x in samples if x.task == samples[0].task]
    s.trainer.chunk = 1
    s.trainer.step, s.trainer.trained = 0, False
    s.trainer.fit(SimpleNamespace(chunks=[Chunk(1, one_task, {one_task[0].task: len(one_task)})]))
    assert s.trainer.total == 3


def test_an_empty_chunk_is_an_error(base):
    s = session(base, "method=lora")
    with pytest.raises(RecordError, match="chunk 7"): s.trainer.batches(Chunk(7, [], {}))


def test_optimizer_state_restarts_or_carries(base):
    kept = {}
    for choice in ("restart", "carry"):
        s = session(base, "method=lora", "stream.chunks=2", "chunk_size=4", f"optimizer_state={choice}")
        s.trainer.fit(s.seen)
        kept[choice] = max(int(v["step"]) for v in s.trainer.optimizer.state.values())
    assert kept == {"restart": 1, "carry": 2}


def test_rates_of_first_and_later_chunks():
    config = TrainConfig(lr=1.0, lr_later=0.1)
    assert course(config, 1, 0, 100) < course(config, 1, 4, 100) and course(config, 1, 99, 100) < 0.01
    assert {course(config, 2, s, 100) for s in range(100)} == {1.0}
    constant = TrainConfig(schedule="constant", warmup=0.0, schedule_later="cosine")
    assert course(constant, 1, 50, 100) == 1.0 and course(constant, 2, 50, 100) == pytest.approx(0.5)


def test_plans_share_a_step_among_processes():
    assert plan(16, 1, 0, 4, 2, 2) != plan(16, 2, 0, 4, 2, 2)
    whole = [sorted(sum(s, [])) for s in plan(2000, 1, 0, 32, 1)]
    for batch, accumulation, processes in ((2, 16, 1), (2, 16, 4), (2, 16, 8), (4, 8, 2), (1, 32, 32)):
        steps = plan(2000, 1, 0, batch, accumulation, processes)
        assert [sorted(sum(s, [])) for s in steps] == whole, "the samples of a step follow from the spec, not from the launch"
        assert {len(s) for s in steps[:-1]} == {accumulation} and len(steps) == 63


@pytest.mark.parametrize("cut, fits", [((2, 16, 3), "divides 16"), ((8, 1, 2), "batch_size=4 and train.accumulation=2"),
                                       ((8, 2, 16), "batch_size=1 and train.accumulation=16"), ((6, 2, 4), "batch_size=3 and train.accumulation=4")])
def test_processes_that_cannot_share_a_step_are_refused(cut, fits):
    with pytest.raises(SpecError, match=f"divides train.accumulation.*{fits}"): plan(100, 1, 0, *cut)
    batch, accumulation, processes = cut
    if "and" in fits: plan(100, 1, 0, *(int(word.split("=")[1]) for word in fits.split(" and ")), processes)


def test_a_launch_that_cannot_train_is_refused_before_a_model_is_loaded(base, monkeypatch):
    from strlora import job, trainer
    launched = SimpleNamespace(num_processes=4, distributed_type=trainer.DistributedType.MULTI_GPU, device="cpu")
    monkeypatch.setattr(trainer, "Accelerator", lambda **_: launched)
    assert trainer.make_accelerator(TrainConfig()) is launched
    monkeypatch.setattr(job, "load_model", lambda *_: (_ for _ in ()).throw(AssertionError("a model was loaded")))
    with pytest.raises(SpecError, match="divides train.accumulation = 6, found 4"): session(base, "batch_size=2", "accumulation=6")
    with pytest.raises(AssertionError, match="was loaded"): session(base, "method=zero_shot", "accumulation=6")
    launched.distributed_type = trainer.DistributedType.DEEPSPEED
    with pytest.raises(SpecError, match="recipes/ddp.yaml"): session(base, "batch_size=2", "accumulation=16")
    launched.distributed_type = trainer.DistributedType.MULTI_GPU
    for name, value, said in (("FSDP_VERSION", "1", "fsdp_version: 2"), ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: false")):
        with monkeypatch.context() as m:
            for pair in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), (name, value)): m.setenv(*pair)
            with pytest.raises(SpecError, match=said): session(base, "batch_size=2", "accumulation=16")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(SpecError, match="model.quantize: expected no"): session(base, "batch_size=2", "accumulation=16", "quantize='4bit'")


def test_gradient_checkpointing_changes_no_number(base):
    plain, a = first_steps(base, "kl_weight=10.0")
    again, b = first_steps(base, "kl_weight=10.0", "gradient_checkpointing=true")
    for x, y in zip(plain, again, strict=True): assert [x[n] for n in ("lm", "kl", "grad_norm")] == [y[n] for n in ("lm", "kl", "grad_norm")]
    assert all(torch.equal(a[n], b[n]) for n in a)
    blocks = [m for m in session(base, "gradient_checkpointing=true").model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert blocks and not [m for m in session(base).model.modules() if getattr(m, "gradient_checkpointing", False)]


def test_one_limit_for_all_answers(base):
    for pairs, most in (((), None), (("max_new_tokens=7",), 7)):
        limits = {n for prompts in session(base, "method=lora", *pairs).questions("proxy") for n in prompts.limits}
        assert limits == {7} if most else len(limits) > 1


def test_a_released_router_freezes(base):
    s = session(base, "method=strlora_released", "freeze_from_chunk=2", "kl_from_chunk=2", "stream.chunks=2", "chunk_size=8")
    seen = {}
    class Watch(runs.Watcher):
        def chunk_done(self, run): seen[run.chunk - 1] = weights(run)
    s.trainer.fit(s.seen, Watch())
    moved = {n for n in seen[1] if not torch.equal(seen[1][n], seen[2][n])}
    assert moved and not [n for n in moved if "router" in n]


def test_projector_trains_at_its_own_rate(base):
    s = session(base, "method=lora", "train_projector=true", "stream.chunks=1", "chunk_size=8", "projector_lr=0.01")
    assert s.encode is None
    before = weights(s.trainer)
    s.trainer.fit(s.seen)
    projector = [n for n in before if "modules_to_save" in n]
    assert projector and all(not torch.equal(before[n], weights(s.trainer)[n]) for n in projector)


def test_nan_stops_with_the_place_and_keeps_the_state(base, tmp_path, monkeypatch):
    spec = short_spec(base, "method=lora")
    true = runs.Trainer.batches
    def poisoned(self, chunk, *out):
        steps = true(self, chunk, *out)
        def broken():
            made = steps[2][0]()
            return {**made, "features": made["features"] * math.nan}
        return steps if chunk.index < 2 else [*steps[:2], [broken]]
    monkeypatch.setattr(runs.Trainer, "batches", poisoned)
    with pytest.raises(TrainingError, match="chunk 2, step 3.*finite lm"): runs.start(spec, tmp_path/"run")
    assert runs.status_of(tmp_path/"run") == "failed"
    assert len(rows(tmp_path/"run", "train")) == 3, "the rows of the finished chunk are kept"
    monkeypatch.undo()
    runs.resume(tmp_path/"run")
    runs.start(spec, tmp_path/"whole")
    assert rows(tmp_path/"run") == rows(tmp_path/"whole")
    assert timeless(rows(tmp_path/"run", "train")) == timeless(rows(tmp_path/"whole", "train"))


def test_bounds(base, tmp_path):
    joint, zero = (runs.start(short_spec(base, f"method={m}"), tmp_path/m) for m in ("joint", "zero_shot"))
    assert {r["after_chunk"] for r in rows(joint)} == {0, 3} and {r["after_chunk"] for r in rows(zero)} == {0}
    assert sum(r["samples"] for r in rows(joint, "train")) == 33, "three of each task: 36 samples over 11 tasks"
    assert not (zero/"train.parquet").exists() and not (zero/"checkpoint").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(base, tmp_path, recipe):
    pairs = [x for pair in (f"model.base={base!r}", *SHORT, "lora_dropout=0.0", "chunk_size=10", "grad_norm_every=1") for x in ("--set", pair)]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(RECIPES/f"{recipe}.yaml"), "--num_processes", "2",
              "--mixed_precision", "no", "-m", "strlora"]
    for out, words, start in (("one", [], [sys.executable, "-m", "strlora"]), ("two", ["--set", "batch_size=2", "--set", "accumulation=2"], launch)):
        done = subprocess.run([*start, "run", *pairs, *words, "--out", str(tmp_path/out)], capture_output=True, text=True,
                              env={**os.environ, "PYTHONPATH": str(RECIPES.parent)})
        assert done.returncode == 0 and "MAP" in done.stdout and done.stdout.count("artefacts") == 1, done.stderr
    info = json.loads((tmp_path/"two"/"run.json").read_text())
    assert info["processes"] == 2 and info["shares"] == (recipe == "fsdp2")
    one, two = (rows(tmp_path/out, "train") for out in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert (a["samples"], a["tokens"]) == (b["samples"], b["tokens"])
        for name in ("lm", "kl", "grad_norm", "grad_norm_lm", "grad_norm_kl"): assert math.isclose(a[name], b[name], rel_tol=1e-3, abs_tol=1e-6), name
    assert [r["sample_id"] for r in rows(tmp_path/"one")] == [r["sample_id"] for r in rows(tmp_path/"two")]
    if recipe == "ddp": asks_once(launch, tmp_path/"two")


def asks_once(launch, folder):
    "`strlora eval` of two processes: one table, and one of them writes."
    before = sorted(rows(folder), key=str)
    done = subprocess.run([*launch, "eval", str(folder), "--split", "both", "--json"], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(RECIPES.parent)})
    assert done.returncode == 0 and set(json.loads(done.stdout)) == {"proxy", "full"}, done.stderr
    after = sorted(rows(folder), key=str)
    assert [r for r in after if r["split"] == "proxy"] == [r for r in before if r["split"] == "proxy"]
