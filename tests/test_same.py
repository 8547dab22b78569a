"SAME: spectra over a stream, filtered updates, closed experts, routing by sample, and what a killed run needs."
import math
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from small import SHORT, make_base, rows, session, short_spec, timeless
from test_tuner import left_padded, padded
from tiny import batch, internvl, stir

import strlora
from strlora import checkpoint, runs
from strlora.methods.same import SameSettings
from strlora.methods.spectral import SpectralUpdate, removed, routers_of, weights_of
from strlora.methods.survey import Survey, Watch, exchanged, input_of, survey
from strlora.moe.mean_router import MeanRouter
from strlora.moe.spectrum import Spectrum, absorb, compress, damp_second, damping, leading, observe, ratios, relative
from strlora.tuner.state import layers_of
from strlora.trainer import Watcher, train_step

QUICK = ("method=same", "freeze_after=1", "survey=4", "eigenpairs=8", "lora_dropout=0.0")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def rule_of(s) -> SpectralUpdate: return s.trainer.parts["update"]


def inputs(n=600, d=48, seed=0, fall=0.8):
    "Tokens with falling variances and a strong mean, as hidden states have."
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=g)).Q
    return (torch.randn(n, d, generator=g) * fall ** torch.arange(d)) @ basis.T + 2 * basis[:, 0]


def stream(parts, keep):
    found = Spectrum.empty(parts[0].shape[1])
    for part in parts: found = observe(found, part, keep)
    return found


def moment(s): return (s.vectors * s.values) @ s.vectors.mT


# ---------------------------------------------------------------- spectra

@pytest.mark.parametrize("sizes", [[600], [200, 400], [7] * 85 + [5], [100] * 6])
def test_eigenpairs_over_a_stream_are_those_of_all_tokens(sizes):
    x = inputs()
    exact, vectors = torch.linalg.eigh(x.T @ x / len(x))
    found = stream(x.split(sizes), 16)
    assert ((found.values[:8] - exact.flip(0)[:8]).abs() / exact.flip(0)[:8]).max() < 0.02
    aligned = (vectors.flip(1)[:, :4].T @ found.vectors[:, :4]).abs().diagonal()
    assert aligned.min() > 0.99
    assert found.weight == len(x) and math.isclose(found.trace, float(exact.sum()), rel_tol=1e-4)


def test_nothing_is_lost_where_nothing_is_cut_off():
    x, whole = inputs(), None
    for parts in ([x], x.split(50), x.split(333)):
        found = stream(parts, 48)
        torch.testing.assert_close(moment(found), x.T @ x / len(x), atol=1e-4, rtol=1e-4)
        whole = whole or found
        torch.testing.assert_close(found.values, whole.values, atol=1e-4, rtol=1e-3)


def test_a_sketch_keeps_the_moment_of_a_batch():
    x = inputs(2000)
    full, few = x.T @ x, compress(x, 16)
    assert few.shape == (48, 16) and compress(x[:9], 16).shape == (48, 9)
    assert (few @ few.T - full).norm() < 0.005 * full.norm()
    lost = torch.linalg.eigvalsh(full - few @ few.T)
    assert lost.min() > -1e-3 * full.norm(), "nothing is invented"


def test_half_precision_inputs_are_counted_in_float32():
    x = inputs().bfloat16()
    found = stream(x.split(100), 16)
    assert found.values.dtype == found.vectors.dtype == torch.float32
    assert math.isclose(found.trace, float(x.float().square().sum(1).mean()), rel_tol=1e-5)


# ---------------------------------------------------------------- filters

def test_new_directions_pass_and_old_ones_are_damped():
    x = inputs()
    known = stream([x], 48)
    damp = damping(known, 0.9, 0.95)
    k = leading(known, 0.95)
    assert 1 < k < 48 and known.values[:k].sum() >= 0.95 * known.trace > known.values[:k - 1].sum()
    update = torch.randn(3, 8, 48)
    unseen = update - update @ known.vectors[:, :k] @ known.vectors[:, :k].T
    torch.testing.assert_close(damp(unseen), unseen, atol=1e-5, rtol=0)
    for i in (0, k - 1):
        gain = 0.9 / (known.values[i] / (known.trace / 48) + 0.9)
        torch.testing.assert_close(damp(known.vectors[:, i]), gain * known.vectors[:, i], atol=1e-5, rtol=0)
    assert relative(known, k)[0] > 10 and removed([torch.tensor([4.0, 1.0])]) == 0.5
    nothing = stream([torch.zeros(5, 48)], 8)
    assert torch.isfinite(damping(nothing, 0.9, 0.9)(update)).all() and torch.isfinite(ratios(nothing, 3, 0.9)(update)).all()


def test_the_scale_of_the_input_does_not_matter():
    x, update = inputs(), torch.randn(4, 48)
    small, large = (damping(stream([scale * x], 16), 0.9, 0.9)(update) for scale in (1e-2, 1e3))
    torch.testing.assert_close(small, large, atol=1e-4, rtol=1e-3)
    assert (damping(stream([x], 16), 1e9, 0.9)(update) - update).abs().max() < 1e-5


def test_ratios_are_as_published():
    known = Spectrum(torch.eye(6)[:, :4], torch.tensor([16.0, 9.0, 4.0, 1.0]), 30.0, 10.0)
    gain = ratios(known, 3, 1.0).gain
    torch.testing.assert_close(gain, torch.tensor([4 / 3.5, 3 / 3, 2 / 2, 1 / 1.5]))
    assert (ratios(known, 1, 1.0).gain == 1).all()


def test_the_second_factor_sees_what_the_first_lets_through():
    x = inputs()
    A, update = torch.randn(2, 5, 48), torch.randn(2, 7, 5)
    passed = damp_second(update, A, stream([x], 48), 0.9)
    change = lambda u: (x @ A.mT @ u.mT).square().sum()
    assert change(passed) < 0.3 * change(update)
    blind = damp_second(update, torch.zeros(2, 5, 48), stream([x], 48), 0.9)
    torch.testing.assert_close(blind, update)


@pytest.mark.parametrize("mode, low, high", [("project", 0.0, 0.25), ("paper", 0.5, 2.0)])
def test_a_filtered_router_stays_with_old_inputs(mode, low, high):
    "Planted: old and new inputs share their mean; a step on new inputs moves the old routing less if it is filtered."
    torch.manual_seed(0)
    router, old, new = MeanRouter(48, 0, 4), inputs(seed=0), inputs(seed=1) + inputs(seed=0).mean(0)
    everything = torch.ones(1, 600, dtype=torch.bool)
    p = lambda x: router.decide(x[None], everything).detach()
    before, start = p(old), router.weight.detach().clone()
    (-router.decide(new[None], everything)[0, 2].log()).backward()
    rule = damping(stream([old], 16), 0.9, 0.9) if mode == "project" else ratios(stream([old], 16), 3, 0.9)
    moved = {}
    for name, update in {"raw": -router.weight.grad, "filtered": rule(-router.weight.grad)}.items():
        with torch.no_grad(): router.weight.copy_(start + 0.05 * update)
        moved[name] = float((p(old) - before).abs().sum())
    assert low <= moved["filtered"] / moved["raw"] < high


# ---------------------------------------------------------------- routing in a real model

def wrapped():
    return get_peft_model(internvl(), strlora.StrLoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, router="mean", kl_weight=0.0,
                                                            router_options={"top_k": 2}))


def test_every_router_gets_a_gradient():
    torch.manual_seed(0)
    model, given = stir(wrapped()).train(), batch(internvl(), rows=6, words=8)
    model(**given).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not silent and sum(".strlora_router." in n for n, p in model.named_parameters()) == 8


def test_batch_mates_padding_and_answers_do_not_route():
    model, given = stir(wrapped()).eval(), batch(internvl(), rows=3)
    with torch.no_grad():
        together = model(**given).logits
        for i in range(3): assert torch.allclose(model(**{k: v[i:i + 1] for k, v in given.items()}).logits[0], together[i], atol=1e-5)
        wide = padded(given, 2, 3)
        position = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert torch.allclose(model(**wide, position_ids=position).logits[:, 2:-3], together, atol=1e-5)
        late = given["input_ids"].clone()
        late[:, -1] = 7
        assert torch.allclose(model(**(given | {"input_ids": late})).logits[:, :-1], together[:, :-1], atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_prefill_decides_for_cached_decoding(beams):
    model = stir(wrapped()).eval()
    given = left_padded(model, batch(model, labels=False), [18, 14])
    how = dict(max_new_tokens=6, do_sample=False, num_beams=beams)
    with model.base_model.record_routing() as found: cached = model.generate(**given, **how)
    assert torch.equal(cached, model.generate(**given, **how, use_cache=False))
    by_layer: dict = {}
    for name, _, routing in found: by_layer.setdefault(name, []).append(routing.weights[:, -1])
    assert all(len(steps) > 1 and all(torch.equal(w, steps[0]) for w in steps) for steps in by_layer.values())


def test_closed_experts_are_for_training_only():
    model, given = stir(wrapped()), batch(internvl())
    open_to_all = model.eval()(**given).logits
    for router in routers_of(model).values(): router.active.copy_(torch.tensor([True, False, True, False]))
    assert torch.equal(model.eval()(**given).logits, open_to_all)
    with model.base_model.record_routing() as found: model.train()(**given).loss.backward()
    assert found and all((r.weights[..., [1, 3]] == 0).all() for *_, r in found)
    for w in weights_of(model): assert not w.tensor.grad[[1, 3]].any() and w.tensor.grad[[0, 2]].any()
    assert not any("active" in name for name in checkpoint.adapter_state(model))


# ---------------------------------------------------------------- the survey

def test_a_survey_sees_real_tokens_once_whatever_the_training_does(base):
    s = session(base, *QUICK, "chunk_size=8", "survey=8")
    run = s.trainer
    run.samples = s.seen.chunks[0].samples
    found = survey(run, 8, 16)
    tokens = float(run.batch(list(run.samples))["attention_mask"].sum())
    assert len(found.spectra) == 8 and all(x.weight == tokens for x in found.spectra.values())
    assert len(found.usage) == 8 and all(abs(float(u.sum()) - 1) < 1e-5 for u in found.usage.values())
    run.model.train()
    run.model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = survey(run, 8, 16)
    for name, x in found.spectra.items(): torch.testing.assert_close(again.spectra[name].values, x.values)
    for name, x in found.importance.items():
        torch.testing.assert_close(again.importance[name], x)
        assert math.isclose(float(x.sum()), found.spectra[input_of(name)].trace, rel_tol=1e-4)
    assert run.model.training and not any(layer._forward_pre_hooks for layer in layers_of(run.model))


def test_a_spectrum_is_that_of_the_inputs_of_all_layers_that_read_it():
    model, given = stir(wrapped()).eval(), batch(internvl())
    given["attention_mask"][0, :2] = 0
    seen: dict = {}
    for layer in layers_of(model): layer.register_forward_pre_hook(lambda m, args: seen.update({m.name: args[0]}))
    with Watch(model, 32) as watch, torch.no_grad():
        watch.real = given["attention_mask"].bool()
        model(**given)
    for name, x in seen.items():
        real = x[watch.real].double()
        torch.testing.assert_close(moment(watch.spectra[input_of(name)]).double(), real.T @ real / len(real), atol=2e-3, rtol=1e-3)
    assert len(watch.spectra) == 8 and len(seen) == 14


def test_processes_together_see_what_one_sees():
    x, halves = inputs(), inputs().split([200, 400])
    parts = [stream([half], 16) for half in halves]

    class Two:
        "What the second process has is known beforehand."
        num_processes, device = 2, "cpu"
        def __init__(self): self.theirs = [torch.tensor([3.0, 400.0]), torch.tensor([400, 400 * parts[1].trace], dtype=torch.float64),
                                           torch.tensor([1.0, 5.0]), torch.tensor([2.0, 8.0])]
        def reduce(self, value, how): return value + self.theirs.pop(0)
        def gather(self, value): return torch.cat([value, parts[1].columns().mT])

    sums = Survey({"r": torch.tensor([3.0, 1.0])}, {"r": torch.tensor([4.0, 4.0])}, {"r": parts[0]})
    found = exchanged(Two(), sums, 2, 200, 16)
    whole = stream([x], 16)
    torch.testing.assert_close(found.spectra["r"].values[:8], whole.values[:8], rtol=1e-2, atol=0)
    assert found.spectra["r"].weight == 600 and math.isclose(found.spectra["r"].trace, whole.trace, rel_tol=1e-5)
    assert torch.allclose(found.usage["r"], torch.tensor([0.8, 1.2])) and torch.allclose(found.importance["r"], torch.tensor([0.01, 0.02]))


def test_the_past_is_a_mean_over_tokens():
    a, b = inputs(300, seed=0), inputs(100, seed=1)
    name = "block.o_proj"
    rule = SpectralUpdate(SameSettings())
    for i, x in enumerate((a, b), 1):
        rule.facts.add(Survey({}, {name: torch.tensor([float(i), 0.0])}, {name: stream([x], 48)}), i, 1.0, 48)
    both = torch.cat([a, b])
    torch.testing.assert_close(moment(rule.facts.spectra[name]), both.T @ both / 400, atol=1e-4, rtol=1e-4)
    assert torch.allclose(rule.facts.importance[name], torch.tensor([1.25, 0.0]))
    rule.facts.add(Survey({}, {name: torch.tensor([5.0, 0.0])}, {name: stream([b], 48)}), 3, 0.0, 48)
    assert rule.facts.importance[name][0] == 5 and rule.facts.spectra[name].weight == 100


# ---------------------------------------------------------------- training

def weights(run): return {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}


def begun(base, *pairs):
    "A run after its first chunk, and the steps of the second."
    s = session(base, *QUICK, "chunk_size=12", *pairs)
    class Stop(Exception): pass
    class First(Watcher):
        def chunk_done(self, run): raise Stop
    with pytest.raises(Stop): s.trainer.fit(s.seen, First())
    t = s.trainer
    steps, t.samples = t.batches(s.seen.chunks[1]), s.seen.chunks[1].samples
    t.model.train()
    t.optimizer.state.clear()
    t.moment("chunk_start")
    return s, steps


def take(t, make):
    row = train_step(t, make(), 1.0)
    t.step += 1
    return row


def test_closed_experts_do_not_move_and_open_ones_do(base):
    s, steps = begun(base)
    t, rule = s.trainer, rule_of(s)
    assert all(r.active.all() for r in routers_of(t.model).values())
    take(t, steps[0])
    masks = {name: r.active for name, r in routers_of(t.model).items()}
    assert rule.facts.usage and all(2 <= int(m.sum()) < 4 for m in masks.values())
    for name, mask in masks.items(): assert mask[rule.facts.usage[name].argmax()]
    before = {id(w.tensor): w.tensor.detach().clone() for w in weights_of(t.model)}
    row = take(t, steps[1])  # AdamW's running means of the first step would move closed experts, too
    for w in weights_of(t.model):
        still = (w.tensor == before[id(w.tensor)]).flatten(1).all(1)
        assert still[~masks[w.router]].all(), "a closed expert moved"
        if w.kind != "router": assert not still[masks[w.router]].all()
    assert 2 <= row["open_experts"] < 4 and 0 < row["removed_experts"] < 1 and 0 < row["removed_router"] < 1
    t.moment("chunk_end")
    assert all(r.active.all() for r in routers_of(t.model).values()) and rule.facts.chunk == 2


def test_a_step_is_the_optimizers_step_filtered(base):
    found = {}
    for name, pairs in {"free": ("mu=1e9",), "damped": (), "A only": ("damp_second=false",)}.items():
        s, steps = begun(base, "threshold=-2.0", "clip=0.0", *(("mu=1e9",) if name == "free" else pairs))
        start = weights(s.trainer)  # the same for all: the first chunk knows no rule
        take(s.trainer, steps[0])
        found[name] = {n: p - start[n] for n, p in weights(s.trainer).items()}
        filters, spectra = rule_of(s).filters, rule_of(s).facts.spectra
    names = {id(p): n for n, p in s.trainer.model.named_parameters()}
    for w in weights_of(s.trainer.model):
        n = names[id(w.tensor)]
        if w.kind == "second":
            torch.testing.assert_close(found["A only"][n], found["free"][n], atol=1e-6, rtol=1e-3)
            wanted = damp_second(found["free"][n], start[names[id(w.first)]], spectra[w.input], 0.9)
        else: wanted = filters[w.input, w.kind](found["free"][n])
        torch.testing.assert_close(found["damped"][n], wanted, atol=1e-6, rtol=1e-3)
        assert (found["damped"][n] - found["free"][n]).abs().max() > 1e-5


def test_gradients_can_be_filtered_instead(base):
    s, steps = begun(base, "apply_to=grad", "threshold=-2.0")
    row = take(s.trainer, steps[0])
    assert 0 < row["removed_experts"] < 1 and math.isfinite(row["loss"])


def test_a_rule_that_is_switched_off_is_the_plain_mixture(base):
    "Against the neighbour: the same layers without weight decay and without a rule."
    off = session(base, *QUICK, "mu=1e9", "damp_second=false", "threshold=-2.0", "stream.chunks=2")
    plain = session(base, *QUICK, "stream.chunks=2", "weight_decay=0.0")
    plain.trainer.parts.pop("update")
    on = session(base, *QUICK, "stream.chunks=2")
    for s in (off, plain, on): s.trainer.fit(s.seen)
    a, b, c = (weights(s.trainer) for s in (off, plain, on))
    assert max((a[n] - b[n]).abs().max() for n in a) < 1e-5 < max((c[n] - b[n]).abs().max() for n in a)


def test_everything_moves_and_the_state_is_bounded(base):
    s = session(base, *QUICK, "stream.chunks=4", "freeze_after=0")
    start, sizes = weights(s.trainer), []
    class Measure(Watcher):
        def chunk_done(self, run):
            _, tensors = checkpoint.pack(run.parts["update"].state_dict())
            sizes.append(sum(x.numel() for x in tensors.values()))
    s.trainer.fit(s.seen, Measure())
    assert not [n for n, p in weights(s.trainer).items() if torch.equal(p, start[n])]
    assert sizes[0] > 0 and set(sizes) == {sizes[0]}
    assert sizes[0] <= 2 * (3 * 8 * 33 + 8 * 65) + 8 * 4, "eight pairs of each input, four numbers of each router"


def test_the_end_of_a_chunk_counts_once(base):
    s, _ = begun(base)
    t, rule = s.trainer, rule_of(s)
    t.moment("chunk_end")
    once = {name: x.weight for name, x in rule.facts.spectra.items()}
    t.moment("chunk_end")
    assert once == {name: x.weight for name, x in rule.facts.spectra.items()}


def test_killed_within_a_chunk_and_resumed(base, tmp_path, monkeypatch):
    "Experts are closed when the run dies; the optimizer goes on as if nothing had happened."
    spec = short_spec(base, *QUICK, "save_every=1")
    whole = runs.start(spec, tmp_path/"whole")
    true = runs.Recorder.step_done
    for total in (5, 6):
        def press(self, run, row, total=total):
            if run.total == total: os.kill(os.getpid(), signal.SIGINT)
            true(self, run, row)
        monkeypatch.setattr(runs.Recorder, "step_done", press)
        go = runs.resume if total > 5 else lambda folder: runs.start(spec, folder)
        with pytest.raises(runs.Interrupted): go(tmp_path/"run")
        _, state = checkpoint.load(tmp_path/"run"/"checkpoint")
        assert state["parts"]["update"]["usage"] and state["parts"]["update"]["chunk"] == 1
    monkeypatch.undo()
    runs.resume(tmp_path/"run")
    assert rows(tmp_path/"run") == rows(whole) and rows(tmp_path/"run", "routing") == rows(whole, "routing")
    assert timeless(rows(tmp_path/"run", "train")) == timeless(rows(whole, "train"))
    assert {"removed_router", "removed_experts", "open_experts"} <= rows(whole, "train")[-1].keys()


@pytest.mark.slow
def test_two_processes_train_as_one(base, tmp_path):
    words = [x for pair in (f"model.base={base!r}", *SHORT[:-1], *QUICK, "chunk_size=10") for x in ("--set", pair)]
    run = "import sys; from strlora.cli import main; sys.exit(main(sys.argv[1:]))"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python", sys.executable, "-c", run]
    for out, more, start in (("one", [], [sys.executable, "-c", run]), ("two", ["--set", "batch_size=2", "--set", "accumulation=2"], launch)):
        done = subprocess.run([*start, "run", *words, *more, "--out", str(tmp_path/out)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    for a, b in zip(rows(tmp_path/"one", "train"), rows(tmp_path/"two", "train"), strict=True):
        for name in ("lm", "grad_norm", "removed_router", "removed_experts", "open_experts"):
            assert (a.get(name) is None) == (b.get(name) is None)
            if a.get(name) is not None: assert math.isclose(a[name], b[name], rel_tol=2e-2, abs_tol=1e-5), (name, a, b)


def test_absorbing_nothing_changes_nothing():
    known = stream([inputs()], 8)
    assert absorb(known, torch.zeros(48, 0), 0, 0.0, 8) is known and SimpleNamespace(**vars(known)).weight == 600


def test_a_process_without_samples_adds_nothing_to_a_survey():
    from types import SimpleNamespace

    from strlora.methods.survey import Survey, nothing, share_of
    from strlora.moe.spectrum import Spectrum, observe
    ranks = [SimpleNamespace(seed=0, chunk=1, samples="ab", accelerator=SimpleNamespace(process_index=r, num_processes=3)) for r in range(3)]
    shares = [share_of(run, 8) for run in ranks]
    assert sorted(s for mine, own in shares if own for s in mine) == ["a", "b"] and [own for _, own in shares] == [True, True, False]
    assert len(shares[2][0]) == 1, "it goes along"
    sums = nothing(Survey({"q": torch.ones(4)}, {"q": torch.ones(4)}, {"q": observe(Spectrum.empty(6), torch.randn(20, 6), 3)}))
    assert not sums.usage["q"].any() and not sums.importance["q"].any() and not sums.spectra["q"].columns().any()
