"EWC, LwF, replay and O-LoRA: each acts, acts on what it should, leaves the rest alone, and survives a crash."
import contextlib
import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from small import make_base, session

from strlora import checkpoint
from strlora.core import SpecError
from strlora.data.stream import Lazy
from strlora.methods.ewc import Consolidation, EwcSettings
from strlora.methods.fisher import fisher_information, fisher_places
from strlora.methods.lwf import LwfSettings, distillation, teacher_logits
from strlora.methods.olora import OLoraSettings, banks, overlap, row_space
from strlora.methods.replay import Rehearsal, ReplaySettings, priorities, remembered
from strlora.trainer import Watcher, restore, training_state

STILL = ("lora_dropout=0.0", "warmup=0.0", "save_every=0")  # nothing random in a step


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def gap(a, b):
    return max((a[n] - b[n]).abs().max().item() for n in a)


class Rows(Watcher):
    "Rows of all steps, and the weights after each chunk."
    def __init__(self): self.rows, self.after = [], []
    def step_done(self, run, row): self.rows.append({k: v for k, v in row.items() if k != "seconds"})
    def chunk_trained(self, run): self.after.append(weights(run))


def learn(base, *pairs):
    "Rows and weights of a short run."
    s, seen = session(base, "grad_norm_every=1", *STILL, *pairs), Rows()
    s.trainer.fit(s.seen, seen)
    return s, seen


# --- every penalty acts -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, name, weight", [("ewc", "ewc", "ewc_weight=1e5"), ("lwf", "lwf", "lwf_weight=20.0"),
                                                  ("olora", "overlap", "olora_weight=5.0")])
def test_a_penalty_changes_the_gradient_and_the_weights_from_the_second_chunk_on(base, method, name, weight):
    pairs = [f"method={method}", "stream.chunks=2"] + (["num_experts=4"] if method == "olora" else [])
    (_, on), (_, off) = learn(base, *pairs, weight), learn(base, *pairs, f"{weight.partition('=')[0]}=0.0")
    first, second = ([row for row in on.rows if row["chunk"] == c] for c in (1, 2))
    assert not any(name in row for row in first) and not any(name in row for row in off.rows)
    assert on.rows[:3] == off.rows[:3] and gap(on.after[0], off.after[0]) == 0, "the first chunk has no past"
    assert second[-1][name] > 0 and second[-1][f"grad_norm_{name}"] > 0
    assert second[-1]["loss"] == pytest.approx(second[-1]["lm"] + second[-1][name])
    assert gap(on.after[1], off.after[1]) > 1e-4


@pytest.mark.parametrize("method", ["ewc", "lwf", "replay", "olora"])
def test_without_its_weight_a_method_is_sequential_lora(base, method):
    off = {"ewc": "ewc_weight=0.0", "lwf": "lwf_weight=0.0", "replay": "replay_share=0.0", "olora": "num_experts=1"}[method]
    (_, ours), (_, lora) = learn(base, f"method={method}", "stream.chunks=2", off), learn(base, "method=lora", "stream.chunks=2")
    assert gap(ours.after[1], lora.after[1]) == 0 and ours.rows == lora.rows


# --- killed and resumed -------------------------------------------------------------------------------------------

class Stop(Exception): "In the place of a crash."


class Crash(Rows):
    "Saves after a step, as the runner does, and dies one step later."
    def __init__(self, total, folder): super().__init__(); self.total, self.folder = total, folder
    def step_done(self, run, row):
        super().step_done(run, row)
        if run.total == self.total: checkpoint.save(self.folder, run.model, training_state(run), {})
        if run.total > self.total: raise Stop


@pytest.mark.parametrize("total", [5, 6], ids=["within a chunk", "at its end"])
@pytest.mark.parametrize("pairs", [("ewc",), ("ewc", "ewc_variant=separate"), ("lwf",), ("replay", "balance=template", "memory=7"),
                                   ("olora", "num_experts=4", "optimizer_state=carry")], ids=lambda p: "-".join(p[:2]))
def test_killed_and_resumed_is_uninterrupted(base, tmp_path, pairs, total):
    pairs = (f"method={pairs[0]}", *pairs[1:], "lora_dropout=0.1", "stream.chunks=3")
    whole, seen = session(base, *pairs), Rows()
    whole.trainer.fit(whole.seen, seen)
    crash = Crash(total, tmp_path/"checkpoint")
    with pytest.raises(Stop):
        dead = session(base, *pairs)
        dead.trainer.fit(dead.seen, crash)
    again, rest = session(base, *pairs), Rows()
    restore(again.trainer, *checkpoint.load(tmp_path/"checkpoint"))
    again.trainer.fit(again.seen, rest)
    assert crash.rows[:total] + rest.rows == seen.rows
    assert gap(rest.after[-1], seen.after[-1]) == 0


# --- EWC ----------------------------------------------------------------------------------------------------------

def moments(session_, chunk):
    "A trainer at the end of a chunk that it has not trained, as far as its parts can tell."
    t = session_.trainer
    t.chunk, t.samples = chunk, session_.seen.chunks[chunk - 1].samples
    return t


def test_the_fisher_is_a_mean_over_single_samples_in_evaluation_mode(base):
    s = session(base, "method=ewc", "lora_dropout=0.5")
    t = moments(s, 1)
    with torch.no_grad():
        for bank in banks(t.model).values(): torch.nn.init.normal_(bank.B, std=0.3)
    t.model.train()
    state = torch.get_rng_state()
    both, one, two = (fisher_information(t, places) for places in ([0, 1], [0], [1]))
    assert t.model.training and torch.equal(state, torch.get_rng_state()), "no dropout was drawn"
    assert all(p.grad is None for p in t.parameters)
    assert max(both[n].max() for n in both) > 0
    for n in both: torch.testing.assert_close(both[n], (one[n] + two[n]) / 2, rtol=1e-4, atol=1e-9)
    t.model.eval()
    square = lambda n: [(g / n).square() for g in torch.autograd.grad(t.answer_loss(t.batch(t.samples[:n])), t.parameters)]
    for mine, by_hand in zip(one.values(), square(1)): torch.testing.assert_close(mine, by_hand, rtol=1e-3, atol=1e-9)
    squared = dict(zip(both, square(2)))
    total = lambda x: sum(v.sum().item() for v in x.values())
    assert abs(total(both) - total(squared)) > 0.05 * total(both), "the squared gradient of a batch is something else"


class Half:
    "One of two processes; adds what the other has found."
    num_processes, device, autocast = 2, "cpu", contextlib.nullcontext
    def __init__(self, rank, other=None): self.process_index, self.other = rank, iter(other or ())
    def reduce(self, x, how): return x + next(self.other, torch.zeros(()))


def test_processes_share_the_samples_of_the_fisher(base):
    s = session(base, "method=ewc")
    t = moments(s, 1)
    places, true = fisher_places(12, 5, 0, 1), t.accelerator
    whole = fisher_information(t, places)
    t.accelerator = Half(1)
    other = [x * len(places) for x in fisher_information(t, places).values()]
    t.accelerator = Half(0, other)
    shared = fisher_information(t, places)
    t.accelerator = true
    for n in whole: torch.testing.assert_close(shared[n], whole[n], rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("variant", ["online", "separate"])
def test_the_penalty_is_its_formula(base, variant):
    "Three chunk ends at made-up weights against anchors and Fishers kept one by one."
    s = session(base, "method=ewc", f"ewc_variant={variant}", "ewc_weight=3.0", "ewc_decay=0.5", "fisher_samples=2")
    t, part, past = s.trainer, s.trainer.parts["penalty"], []
    for chunk in (1, 2, 3):
        moments(s, chunk)
        with torch.no_grad():
            for p in t.parameters: p.normal_(std=0.2)
        part.chunk_end(t)
        part.chunk_end(t)  # again, as after a crash in the middle of it
        past.append((fisher_information(t, fisher_places(12, 2, t.seed, chunk)), weights(t)))
    with torch.no_grad():
        for p in t.parameters: p.normal_(std=0.2)
    now = {n: p for n, p in t.model.named_parameters() if p.requires_grad}
    if variant == "online": past = [({n: 0.25 * past[0][0][n] + 0.5 * past[1][0][n] + past[2][0][n] for n in now}, past[2][1])]
    expected = 1.5 * sum((F[n].double() * (now[n].double() - anchor[n]) ** 2).sum() for F, anchor in past for n in now)
    found = part.loss(t, {}, None)["ewc"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-4) and found.requires_grad
    for a, b in zip(torch.autograd.grad(found, list(now.values())), torch.autograd.grad(expected, list(now.values()))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert {k: len(v) for k, v in part.state_dict().items() if isinstance(v, dict)} == {"fisher": len(now), "anchor": len(now)}


# --- LwF ----------------------------------------------------------------------------------------------------------

def started(base, *pairs):
    "A trainer at the start of chunk 2, and a batch."
    s = session(base, "method=lwf", *pairs)
    t = moments(s, 2)
    with torch.no_grad():
        for p in t.parameters: p.normal_(std=0.2)
    t.model.train()
    t.moment("chunk_start")
    return t, t.batch(t.samples[:4])


def test_the_teacher_leaves_no_trace(base):
    t, batch = started(base, "lora_dropout=0.5")
    objective, part = t.objective, t.parts["penalty"]
    with torch.no_grad():
        for p in t.parameters: p.add_(0.1 * torch.randn_like(p))
    def gradients(parts):
        objective.parts = parts
        torch.manual_seed(0)
        found = objective(batch, 8.0, 0.5)
        drawn, found = torch.get_rng_state(), found["lm"]
        return drawn, torch.autograd.grad(found, t.parameters)
    before, objects = weights(t), list(map(id, t.parameters))
    (drawn, with_teacher), (plain, without) = gradients({"penalty": part}), gradients({})
    assert torch.equal(drawn, plain) and all(torch.equal(a, b) for a, b in zip(with_teacher, without))
    assert gap(before, weights(t)) == 0 and objects == [id(p) for p in t.model.parameters() if p.requires_grad] and t.model.training
    assert all(p.grad is None for p in t.parameters)


def test_a_teacher_that_fails_puts_the_parameters_back(base):
    t, batch = started(base)
    snapshot, objects = t.parts["penalty"].snapshot, list(map(id, t.parameters))
    with pytest.raises(IndexError): teacher_logits(t.model, snapshot, {**batch, "input_ids": batch["input_ids"] + 10_000})
    assert objects == [id(p) for p in t.model.parameters() if p.requires_grad] and t.model.training


def test_the_divergence_is_zero_at_the_snapshot_and_counts_answer_tokens_once(base):
    t, batch = started(base, "lora_dropout=0.0")
    objective = lambda b: t.objective(b, 40.0, 0.3)["lwf"]
    assert objective(batch).abs() < 1e-6
    with torch.no_grad():
        for p in t.parameters: p.add_(0.2 * torch.randn_like(p))
    term = objective(batch)
    assert term > 1e-4 and max(g.abs().max() for g in torch.autograd.grad(term, t.parameters)) > 0
    halves = [t.batch(t.samples[i:i + 2]) for i in (0, 2)]
    assert sum(map(objective, halves)).item() == pytest.approx(term.item(), rel=1e-4), "whatever the cut"
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert objective(nothing).item() == 0


def test_the_best_words_of_the_teacher_bound_the_divergence():
    torch.manual_seed(0)
    old, new = torch.randn(2, 6, 30)
    full = distillation(old, new, 1.0)
    p, q = old.softmax(-1), new.softmax(-1)
    torch.testing.assert_close(full, (p * (p / q).log()).sum() / 6)
    torch.testing.assert_close(distillation(old, new, 1.0, 30), full)
    i = old.topk(4, -1).indices
    p, q = (x.gather(-1, i) / x.gather(-1, i).sum(-1, keepdim=True) for x in (p, q))
    torch.testing.assert_close(distillation(old, new, 1.0, 4), (p * (p / q).log()).sum() / 6)


# --- replay -------------------------------------------------------------------------------------------------------

def test_a_reservoir_is_a_uniform_draw_and_fifo_the_latest():
    kept = np.mean([np.bincount(remembered(priorities(60, seed, "reservoir"), 15), minlength=60) for seed in range(3000)], 0)
    assert abs(kept - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 3000)
    assert remembered(priorities(60, 0, "fifo"), 15) == list(range(45, 60))
    assert np.array_equal(priorities(60, 3, "reservoir")[:40], priorities(40, 3, "reservoir")), "the future plays no part"


@pytest.mark.parametrize("balanced", [False, True])
def test_what_has_left_a_memory_never_comes_back(balanced):
    for seed in range(5):
        priority, groups = priorities(120, seed, "reservoir"), np.random.default_rng(seed).integers(0, 5, 120).tolist()
        held = [set(remembered(priority[:n], 12, groups[:n] if balanced else None)) for n in range(1, 121)]
        assert all(later - earlier <= {n} for n, (earlier, later) in enumerate(zip(held, held[1:]), 1))
        assert all(len(memory) == min(n, 12) for n, memory in enumerate(held, 1))
    if balanced: assert max(np.bincount([groups[i] for i in held[-1]])) <= 3


@pytest.mark.parametrize("settings", [ReplaySettings(memory=9), ReplaySettings(memory=9, balance="template", policy="fifo")])
def test_replayed_samples_are_earlier_ones_and_new_ones_stay(base, settings):
    s = session(base, "method=replay", "stream.chunks=5", f"memory={settings.memory}", f"balance={settings.balance}", f"policy={settings.policy}")
    earlier: set[str] = set()
    for new, chunk, row in zip(s.stream.chunks, s.seen.chunks, s.seen.plan):
        ids, old = {x.id for x in new.samples}, chunk.samples[len(new.samples):]
        assert chunk.samples[:len(new.samples)] == new.samples and len(chunk.samples) == sum(row.values())
        assert {x.id for x in old} <= earlier and len(old) == (4 if earlier else 0), "a quarter of 12 and 4"
        earlier |= ids
    assert s.extra_samples == 16 and s.stream.plan == session(base, "method=lora", "stream.chunks=5").stream.plan
    fresh = Rehearsal(s.stream, settings, 0)
    assert fresh.chunk(4).samples == s.seen.chunks[4].samples, "the same without what came before"


def test_a_run_makes_no_chunk_twice(base):
    s, made = session(base, "method=replay", "stream.chunks=6", "memory=7", "balance=template"), []
    make = s.stream.chunks.make
    counted = dataclasses.replace(s.stream, chunks=Lazy(6, lambda i: made.append(i) or make(i)))
    rehearsal = Rehearsal(counted, ReplaySettings(memory=7, balance="template"), 0)
    for i in range(6): rehearsal.chunk(i)
    assert made == list(range(6)) and len(rehearsal.held) == 7


# --- O-LoRA -------------------------------------------------------------------------------------------------------

def test_only_the_current_pair_moves_bit_by_bit(base):
    s = session(base, "method=olora", "num_experts=4", "stream.chunks=3", "weight_decay=0.5", "optimizer_state=carry", *STILL)
    start, seen = weights(s.trainer), Rows()
    s.trainer.fit(s.seen, seen)
    for chunk, (before, after) in enumerate(zip([start, *seen.after], seen.after)):
        for name in after:
            moved = [i for i in range(4) if not torch.equal(before[name][i], after[name][i])]
            assert moved == [chunk], f"{name} after chunk {chunk + 1}"


def test_a_pair_has_the_scale_of_a_lora_of_its_rank(base):
    ours, lora = (session(base, f"method={m}", *p).trainer for m, p in (("olora", ["num_experts=4"]), ("lora", ["lora_alpha=512"])))
    with torch.no_grad():
        for a, b in zip(banks(ours.model).values(), banks(lora.model).values()):
            torch.nn.init.normal_(b.B)
            a.A.copy_(b.A.reshape(a.A.shape))
            a.B.copy_(b.B[0].unflatten(1, (4, -1)).transpose(0, 1))
    s = session(base, "method=lora")
    batch = lora.batch(s.seen.chunks[0].samples[:3])
    ours.model.eval(), lora.model.eval()
    assert ours.answer_loss(batch).item() == pytest.approx(lora.answer_loss(batch).item(), rel=1e-4)


def test_orthogonal_rows_pay_nothing():
    past = torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    past = torch.cat([past, past[:2] + past[2:4]])  # some directions twice
    basis = row_space(past)
    assert basis.shape == (5, 20) and (past - past @ basis.T @ basis).abs().max() < 1e-4
    A = torch.randn(3, 20)
    assert overlap(A, basis) > 0.1 and overlap(A - A @ basis.T @ basis, basis) < 1e-4


# --- settings -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [lambda: EwcSettings(ewc_weight=-1.0), lambda: EwcSettings(ewc_decay=1.5), lambda: EwcSettings(fisher_samples=0),
                                  lambda: LwfSettings(lwf_temperature=0.0), lambda: LwfSettings(lwf_top_k=1),
                                  lambda: ReplaySettings(memory=0), lambda: ReplaySettings(replay_share=1.0), lambda: OLoraSettings(olora_weight=-1.0)])
def test_settings_out_of_range_are_named(make):
    with pytest.raises(SpecError, match="settings: "): make()


def test_a_part_is_restored_from_what_a_checkpoint_holds(base):
    "Tensors and plain values only; what is loaded is not shared with what was saved."
    part = Consolidation(EwcSettings())
    part.fisher, part.anchor, part.spread, part.chunk = {"w": torch.ones(2)}, {"w": torch.zeros(2)}, 0.5, 3
    plain, tensors = checkpoint.pack(part.state_dict())
    again = Consolidation(EwcSettings())
    again.load_state_dict(checkpoint.unpack(copy.deepcopy(plain), tensors))
    assert (again.spread, again.chunk) == (0.5, 3) and torch.equal(again.fisher["w"], torch.ones(2))
