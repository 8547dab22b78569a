"MoELoRA and SMoLoRA in a whole model: who learns, and that routing is a matter of the sample alone."
import pytest
import torch
from peft import PeftModel, get_peft_model
from small import make_base, session
from test_tuner import left_padded, padded, plain, prompt
from tiny import IMAGE, batch, internvl, stir

from strlora import penalties_of
from strlora.core import SignalError, SpecError
from strlora.methods.table import METHODS
from strlora.spec import resolve
from strlora.trainer import train_step
from strlora.tuner.state import layers_of

VARIANTS = {"moelora": ("moelora", {}), "moelora_top2": ("moelora", {"top_k": 2}), "moelora_renormalized": ("moelora", {"top_k": 2, "renormalize": True}),
            "moelora_balanced": ("moelora", {"balance_weight": 0.5}), "smolora": ("smolora", {}), "smolora_released": ("smolora_released", {}),
            "smolora_shared": ("smolora", {"share_routers": True})}
GATES = {"visual_gate", "instruction_gate"}
every_variant = pytest.mark.parametrize("name", VARIANTS)
generated = pytest.mark.parametrize("name", ["moelora", "moelora_top2", "smolora", "smolora_released"])
every_method = pytest.mark.parametrize("name", ["moelora", "smolora", "smolora_released"])


def config(name):
    method, settings = VARIANTS[name]
    return METHODS[method].adapter(METHODS[method].settings(r=8, lora_alpha=16.0, **settings))


def wrapped(name):
    "Random experts and fusion, as after some training; gates that tell samples apart."
    torch.manual_seed(0)
    model = stir(get_peft_model(internvl(), config(name))).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".strlora_router." in n: p.mul_(4)
    return model


def some(given, rows):
    return {k: v[rows] for k, v in given.items()}


# ---------------------------------------------------------------- who learns

@every_variant
@pytest.mark.parametrize("checkpointing", [False, True])
def test_everything_declared_trainable_has_a_gradient_after_one_step(name, checkpointing):
    torch.manual_seed(0)
    model = get_peft_model(internvl(), config(name)).train()
    if checkpointing: model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n.rpartition(".")[2] for n, p in model.named_parameters() if ".strlora_" in n and not p.requires_grad}
    routers = [r for layer in layers_of(model) for r in layer.strlora_router.values()]
    assert frozen == (GATES if name == "smolora_released" else set()) and all(r.frozen_names == frozen for r in routers)
    assert len(routers) == (8 if name == "smolora_shared" else 14)
    given, optimizer = batch(model, rows=6, words=8), torch.optim.SGD(trainable.values(), lr=0.5)
    model(**given).loss.backward()
    optimizer.step()  # B leaves zero, and with it what stands behind B gets a gradient
    optimizer.zero_grad()
    model(**given).loss.backward()
    assert not [n for n, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trainable)


@every_method
def test_training_moves_all_but_frozen_gates(name, tmp_path):
    s = session(make_base(tmp_path), f"method={name}", "lora_dropout=0.0")
    t, before = s.trainer, {n: p.detach().clone() for n, p in s.model.named_parameters()}
    t.moment("stream_start"), t.model.train(), t.moment("chunk_start")
    for make in t.batches(s.seen.chunks[0]): train_step(t, make(), 1.0)
    moved = {n for n, p in s.model.named_parameters() if not torch.equal(p, before[n])}
    gates = {n for n in before if n.rpartition(".")[2] in GATES} if name == "smolora_released" else set()
    assert moved == {n for n in before if ".strlora_" in n} - gates and all(p.requires_grad == (n in moved) for n, p in t.model.named_parameters())


def test_the_load_balance_has_its_weight_in_the_loss_and_teaches_the_router(tmp_path):
    base = make_base(tmp_path)
    s = session(base, "method=moelora", "balance_weight=0.5", "grad_norm_every=1", "lora_dropout=0.0", "accumulation=1", "batch_size=8")
    t = s.trainer
    t.moment("stream_start"), t.model.train(), t.moment("chunk_start")
    found = train_step(t, t.batches(s.seen.chunks[0])[0](), 1.0)
    assert 0.5 <= found["balance"] < 2 and found["grad_norm_balance"] > 0, "0.5 times a number from 1 to e"
    assert found["loss"] == pytest.approx(found["lm"] + found["balance"])
    model, given = wrapped("moelora_balanced"), batch(internvl())
    out = model(**given)
    with pytest.raises(SignalError): model(**plain(given))  # padding must be told from tokens
    longer = model(**padded(given, 0, 5))
    assert torch.allclose(out.penalties["balance"], longer.penalties["balance"], atol=1e-6)
    unbalanced = wrapped("moelora")
    assert penalties_of(unbalanced(**given)) == {}
    assert torch.equal(unbalanced(**plain(given)).logits, out.logits), "without the penalty no instruction is needed"


# ---------------------------------------------------------------- a matter of the sample alone

@every_variant
def test_neighbours_and_padding_change_nothing(name):
    model, given = wrapped(name), batch(internvl(), rows=4)
    with torch.no_grad():
        whole = model(**given).logits
        for i in range(4): torch.testing.assert_close(model(**some(given, slice(i, i + 1))).logits[0], whole[i], atol=1e-4, rtol=1e-4)
        for left, right in ((3, 0), (0, 4)):
            wide = padded(given, left, right)
            position = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
            got = model(**wide, position_ids=position).logits[:, left:left + whole.shape[1]]
            torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["smolora", "smolora_released"])
def test_the_answer_does_not_choose_the_experts(name):
    model, given = wrapped(name), batch(internvl(), rows=6, answer=8)
    short = {k: v[:, :15] if k != "pixel_values" else v for k, v in prompt(given).items()}
    with torch.no_grad():
        with model.base_model.record_routing() as with_answer: long = model(**given).logits
        with model.base_model.record_routing() as without: torch.testing.assert_close(model(**short).logits, long[:, :15], atol=1e-4, rtol=1e-4)
    used = torch.zeros(4, dtype=torch.bool)
    for (_, _, a), (_, _, b) in zip(with_answer, without, strict=True):
        assert torch.equal(a.selected, b.selected) and (a.selected.unflatten(1, (2, 2)).sum(-1) == 1).all()
        used |= a.selected.any(0)
    assert used.all(), "all samples fall to the same experts: this test would not notice"


@generated
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_generation_is_uncached_generation(name, beams):
    model = wrapped(name)
    given = left_padded(model, batch(model, rows=3, labels=False), [15, 12, 14])
    how = dict(max_new_tokens=6, do_sample=False, num_beams=beams, num_return_sequences=beams, suppress_tokens=[IMAGE])
    both = model.generate(**given, **how)
    assert both.shape[0] == 3 * beams and torch.equal(both, model.generate(**given, **how, use_cache=False))
    for i, w in enumerate([15, 12, 14]):
        one = model.generate(**{k: v[i:i + 1, -w:] if k != "pixel_values" else v[i:i + 1] for k, v in given.items()}, **how)
        n = min(both.shape[1] - 15, one.shape[1] - w)
        assert torch.equal(one[:, w:w + n], both[i * beams:(i + 1) * beams, 15:15 + n])


@generated
def test_generation_is_what_training_sees(name):
    "The tokens of greedy decoding are the best ones of one forward pass over prompt and answer; so is the choice of experts."
    model = wrapped(name)
    given = left_padded(model, batch(model, rows=6, labels=False, seed=3), [15, 12, 14, 15, 13, 15])
    new = 6
    with torch.no_grad():
        with model.base_model.record_routing() as steps: ids = model.generate(**given, max_new_tokens=new, min_new_tokens=new, do_sample=False, suppress_tokens=[IMAGE])
        grown = given | {"input_ids": ids} | {k: torch.nn.functional.pad(given[k], (0, new), value=v) for k, v in (("attention_mask", 1), ("instruction_mask", False))}
        position = (grown["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with model.base_model.record_routing() as forced: logits = model(**grown, position_ids=position).logits
    logits[..., [1, IMAGE]] = -torch.inf  # neither an end nor a picture, as in generate
    assert torch.equal(logits[:, 14:14 + new].argmax(-1), ids[:, 15:])
    assert len(steps) == new * len(forced)
    for n, (layer, _, routing) in enumerate(steps):
        where, _, once = forced[n % len(forced)]
        assert layer == where and torch.equal(routing.selected, once.selected)


@pytest.mark.parametrize("name", ["smolora", "smolora_released"])
def test_a_step_without_its_prompt_is_refused(name):
    model, given = wrapped(name), prompt(batch(internvl(), labels=False))
    token = torch.full((2, 1), 5)
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        with pytest.raises(SignalError): model(input_ids=token, past_key_values=cache)
        with model.base_model.instructed(given["instruction_mask"], given["input_ids"]):
            with pytest.raises(SignalError, match="no earlier decision"): model(input_ids=token, past_key_values=cache)
            cache = model(**plain(given), use_cache=True).past_key_values
            assert model(input_ids=token, past_key_values=cache).logits.isfinite().all()


# ---------------------------------------------------------------- saving, switching off

@every_variant
def test_saved_is_loaded_and_disabled_is_the_base(name, tmp_path):
    model, given = wrapped(name), batch(internvl())
    expected = model(**given).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(internvl(), tmp_path, is_trainable=True).eval()
    assert torch.equal(loaded(**given).logits, expected)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    base = internvl()(**plain(given)).logits
    assert not torch.allclose(expected, base, atol=1e-2)
    with loaded.disable_adapter(): assert torch.equal(loaded(**plain(given)).logits, base)
    fresh = get_peft_model(internvl(), config(name)).eval()
    assert torch.equal(fresh(**given).logits, base), "an untrained adapter changes nothing"


@pytest.mark.parametrize("method, settings, word", [
    ("moelora", {"top_k": 5}, "top_k"), ("moelora", {"top_k": 1, "renormalize": True}, "every weight is 1"),
    ("smolora", {"num_experts": 2}, "at least 4"), ("smolora", {"num_experts": 5, "r": 10}, "even number"),
    ("smolora", {"routing": "frozen"}, "frozen_hash"), ("smolora", {"instruction_norm": "batch"}, "layer, none")])
def test_settings_that_cannot_work_are_refused_early(method, settings, word):
    with pytest.raises(SpecError, match=word): resolve({"method": method, "settings": settings})
