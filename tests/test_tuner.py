"The PEFT method on tiny random InternVL and Gemma 3: what PEFT promises, and what routing must not disturb."
import copy
import gc
import threading
import weakref

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import PAD, batch, gemma3, internvl, stir

import strlora
from strlora.core import CheckpointError, SignalError, SpecError, StrLoraError
from strlora.tuner.call import CALL
from strlora.tuner.layer import MergeError, StrLoraLinear
from strlora.tuner.root import PROMPT, root_of
from strlora.tuner.state import layers_of

MODELS = {"internvl": internvl, "gemma3": gemma3}


def config(**settings):
    return strlora.StrLoraConfig(**(dict(r=8, lora_alpha=16, lora_dropout=0.0, attention_dim=8) | settings))


def released(**settings):
    return strlora.StrLoraConfig.released(**(dict(r=8, lora_alpha=16, lora_dropout=0.0, attention_dim=8) | settings))


def wrapped(base=internvl, settings=None, **kwargs):
    return stir(get_peft_model(base(), settings or config(), **kwargs)).eval()


def prompt(given):
    return {k: v for k, v in given.items() if k != "labels"}


def plain(given):
    return {k: v for k, v in given.items() if k != "instruction_mask"}


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model, *batches):
    "Gradients of the summed losses: all forwards first, then one backward."
    model.zero_grad()
    sum(model(**b).loss for b in batches).backward()
    return gradients(model)


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


# ---------------------------------------------------------------- wrapping

@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("name", MODELS)
def test_fresh_adapter_is_the_base_model(name, task_type):
    model, given = MODELS[name](), batch(MODELS[name]())
    with torch.no_grad():
        base = model(**plain(given)).logits
        adapted = get_peft_model(model, config(task_type=task_type)).eval()
        assert torch.allclose(adapted(**given).logits, base, atol=1e-6)
        assert len(layers_of(adapted)) == 14
        stir(adapted)
        assert not torch.allclose(adapted(**given).logits, base, atol=1e-2)
        with adapted.disable_adapter():
            assert torch.equal(adapted(**given).logits, base)
            assert torch.equal(adapted(**plain(given)).logits, base)  # the base model asks for no signal


def test_targets():
    everything = get_peft_model(internvl(), config(target_modules="all-linear"))
    names = {layer.name for layer in layers_of(everything)}
    assert any("vision_tower" in n for n in names) and any("projector" in n for n in names) and not any("lm_head" in n for n in names)
    given = batch(everything)
    assert torch.isfinite(stir(everything)(**given).loss)
    some = get_peft_model(internvl(), config(target_modules="all-linear", exclude_modules=r".*(vision_tower|multi_modal_projector).*"))
    assert {layer.name for layer in layers_of(some)} == {layer.name for layer in layers_of(get_peft_model(internvl(), config()))}
    assert len(layers_of(get_peft_model(internvl(), config(target_modules=["q_proj", "v_proj"], exclude_modules=r".*vision_tower.*")))) == 4
    with pytest.raises(SpecError, match="linear layers"): get_peft_model(internvl(), config(target_modules=["input_layernorm"]))
    with pytest.raises(SpecError, match="Name the layers"): get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), config())


def test_pictures_without_a_sample_are_refused():
    model = wrapped(settings=config(target_modules="all-linear"))
    picture, word = torch.full((1, 9), 60), torch.full((1, 9), 5)
    ids = torch.cat([torch.cat([picture, picture, word], 1), torch.cat([picture, word, word], 1)])  # 2 pictures, 1 picture
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    mask[:, -3:] = True
    with pytest.raises(SignalError, match="exclude_modules"): model(input_ids=ids, pixel_values=torch.randn(3, 3, 24, 24), instruction_mask=mask)
    ids[1] = ids[0]
    model(input_ids=ids, pixel_values=torch.randn(4, 3, 24, 24), instruction_mask=mask)  # 4 pictures, 2 each


# ---------------------------------------------------------------- the signal

@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_missing_or_wrong_mask(task_type):
    model, given = wrapped(settings=config(task_type=task_type)), batch(internvl())
    mask = given["instruction_mask"]
    with pytest.raises(SignalError, match="Collator"): model(**plain(given))
    with pytest.raises(SignalError, match="Collator"): model.generate(**plain(prompt(given)), max_new_tokens=1)
    with pytest.raises(SignalError, match="shape"): model(**(given | {"instruction_mask": mask[:, 1:]}))
    with pytest.raises(SignalError, match="row 1"): model(**(given | {"instruction_mask": mask & torch.tensor([[True], [False]])}))
    with pytest.raises(SignalError, match="row 1"): model.generate(**(prompt(given) | {"instruction_mask": mask & torch.tensor([[True], [False]])}))
    with pytest.raises(SignalError, match="truth values"): model(**(given | {"instruction_mask": mask.float()}))
    with pytest.raises(SignalError, match="image tokens"): model(**(given | {"instruction_mask": torch.ones_like(mask)}))
    assert CALL.get() is None and PROMPT.get() is None
    expected = model(**given).logits
    assert torch.equal(model(**(given | {"instruction_mask": mask.long()})).logits, expected)


def test_embeddings_instead_of_ids():
    model, given = wrapped(), batch(internvl(), labels=False)
    ids = given["input_ids"].masked_fill(given["input_ids"] == 60, 5)
    embeddings = model.get_input_embeddings()(ids).detach()
    a = model(input_ids=ids, instruction_mask=given["instruction_mask"]).logits
    b = model(inputs_embeds=embeddings, instruction_mask=given["instruction_mask"]).logits
    assert torch.allclose(a, b, atol=1e-6)
    how = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids), instruction_mask=given["instruction_mask"])
    assert torch.equal(model.generate(input_ids=ids, **how)[:, 18:], model.generate(inputs_embeds=embeddings, **how))


def test_signal_decides_routing_and_only_the_mask_is_read():
    model, given = wrapped(), batch(internvl())
    with torch.no_grad():
        base = model(**given).logits
        other = given["instruction_mask"].clone()
        other[:, 12] = False
        assert not torch.allclose(model(**(given | {"instruction_mask": other})).logits, base, atol=1e-4)
        late = given["input_ids"].clone()
        late[:, -1] = 7
        assert torch.allclose(model(**(given | {"input_ids": late})).logits[:, :-1], base[:, :-1], atol=1e-5)  # answers do not route


def test_nothing_is_left_behind():
    model, given = wrapped(), batch(internvl())
    out = model(**given)
    seen = weakref.ref(out.penalties["kl"])
    context = []
    layer = layers_of(model)[0]
    original = layer.strlora_router["default"].forward
    layer.strlora_router["default"].forward = lambda h, c: (context.append(weakref.ref(c)), original(h, c))[1]
    out = model(**given)
    del out
    gc.collect()
    assert CALL.get() is None and context[0]() is None and seen() is None


# ---------------------------------------------------------------- bridges

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", [config, released])
def test_batch_of_two_is_two_batches_of_one(name, preset):
    model = wrapped(MODELS[name], preset())
    given = batch(model)
    with torch.no_grad():
        both = model(**given).logits
        for i in range(2):
            one = model(**{k: v[i:i + 1] for k, v in given.items()}).logits
            assert torch.allclose(one[0], both[i], atol=1e-5)


def padded(given, left, right):
    def pad(x, value):
        b = x.shape[0]
        return torch.cat([x.new_full((b, left), value), x, x.new_full((b, right), value)], 1)
    values = {"input_ids": PAD, "attention_mask": 0, "instruction_mask": False, "labels": -100, "token_type_ids": 0}
    return {k: pad(v, values[k]) if k in values else v for k, v in given.items()}


@pytest.mark.parametrize("left, right", [(3, 0), (0, 4), (2, 2)])
def test_padding_changes_nothing(left, right):
    model = wrapped()
    given = batch(model)
    given_padded = padded(given, left, right)
    position = (given_padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    a, b = model(**given), model(**given_padded, position_ids=position)
    n = given["input_ids"].shape[1]
    assert torch.allclose(b.logits[:, left:left + n], a.logits, atol=1e-5)
    assert torch.allclose(a.penalties["kl"], b.penalties["kl"], atol=1e-6) and torch.allclose(a.loss, b.loss, atol=1e-5)


def test_released_counts_padding_as_the_official_code_does():
    model = wrapped(settings=released())
    given = batch(model)
    assert not torch.allclose(model(**given).penalties["kl"], model(**padded(given, 0, 6)).penalties["kl"], atol=1e-4)


def test_permuting_experts_changes_nothing():
    model = wrapped()
    given = batch(model)
    a = model(**given)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for layer in layers_of(model):
            own = [*layer.strlora_experts.values()]
            if "default" in layer.strlora_router: own += [(r := layer.strlora_router["default"]), r.ema]
            for module in own:
                for name, p in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                    if name in ("A", "B", "text_router", "prototypes"): p.copy_(p[order].clone())
    b = model(**given)
    assert torch.allclose(a.logits, b.logits, atol=1e-5) and torch.allclose(a.penalties["kl"], b.penalties["kl"], atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_expert_and_a_constant_router_is_lora(dropout):
    targets = config().target_modules
    lora = get_peft_model(internvl(), LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=r".*language_model.*_proj"))
    ours = get_peft_model(internvl(), config(router="constant", num_experts=1, lora_dropout=dropout))
    stir(ours)
    theirs = dict(lora.named_modules())
    with torch.no_grad():
        for name, layer in ours.named_modules():
            if not isinstance(layer, StrLoraLinear): continue
            theirs[name].lora_A["default"].weight.copy_(layer.strlora_experts["default"].A[0])
            theirs[name].lora_B["default"].weight.copy_(layer.strlora_experts["default"].B[0])
    given = batch(internvl())
    lora.train(), ours.train()
    torch.manual_seed(0)
    a = step(lora, plain(given))
    torch.manual_seed(0)
    b = step(ours, plain(given))  # routes by nothing, so it asks for no signal
    pairs = {n.replace("strlora_experts.default.A", "lora_A.default.weight").replace("strlora_experts.default.B", "lora_B.default.weight"): g[0]
             for n, g in b.items()}
    assert targets is None and largest_difference(a, pairs) < 1e-6
    assert torch.allclose(lora.eval()(**plain(given)).logits, ours.eval()(**given).logits, atol=1e-6)


# ---------------------------------------------------------------- gradients

@pytest.mark.parametrize("settings", [
    config(), released(), config(stage1="straight_through"), config(stage1="frozen"), config(attention_dim=0), released(attention_dim=0),
    config(sub_top_k=0), released(sub_top_k=0), config(sub_top_k=1), config(top_k=None), config(kl_weight=0.0), config(router="constant"),
    config(share_routers="block")],
    ids=lambda s: "-".join(str(getattr(s, n)) for n in ("router", "top_k", "sub_top_k", "attention_dim", "stage1", "kl_weight", "share_routers")))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trainable_parameter_is_trained(settings, checkpointing):
    torch.manual_seed(0)
    model = get_peft_model(internvl(), copy.deepcopy(settings)).train()
    if checkpointing: model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=0.5)
    given = batch(model, rows=6, words=8)
    model(**given).loss.backward()
    optimizer.step()  # B leaves zero
    optimizer.zero_grad()
    model.base_model.update_ema()
    model(**given).loss.backward()
    silent = [n for n, p in trainable.items() if p.grad is None or not p.grad.any()]
    assert not silent
    frozen = {n.rpartition(".")[2] for n, p in model.named_parameters() if ".strlora_" in n and not p.requires_grad}
    assert frozen == ({"text_router"} if settings.stage1 == "frozen" and settings.router == "two_stage" else set())
    model.set_adapter("default")
    model.base_model.set_requires_grad("default", True)
    with model.disable_adapter(): pass
    assert trainable.keys() == {n for n, p in model.named_parameters() if p.requires_grad}


def test_loss_is_language_loss_plus_weighted_penalty():
    model, given = wrapped(settings=config(kl_weight=0.25)), batch(internvl())
    out = model(**given)
    logits = out.logits[:, :-1].float()
    lm = torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"][:, 1:].flatten(), ignore_index=-100)
    assert out.penalties.keys() == {"kl"} and "penalties" not in out.keys() and out.penalties["kl"] > 0.01
    assert torch.allclose(out.loss, lm + 0.25 * out.penalties["kl"], atol=1e-6)
    assert strlora.penalties_of(type(out)(dict(out))) == out.penalties  # rebuilt, as libraries do
    with model.base_model.collect_penalties() as terms: raw = dict(model(**prompt(given)))
    assert "penalties" not in raw and torch.equal(terms["kl"], out.penalties["kl"]) and terms["kl"].requires_grad
    with torch.no_grad():
        silent = model(**given)
        assert torch.allclose(silent.loss, lm, atol=1e-6) and strlora.penalties_of(silent) == {}
    assert "kl" in model(**prompt(given)).penalties  # for a loss of one's own
    model.base_model.root.scale["kl"] = 0.5
    assert torch.allclose(model(**given).loss, lm + 0.125 * out.penalties["kl"], atol=1e-6)
    model.base_model.root.scale["kl"] = 0.0
    assert strlora.penalties_of(model(**given)) == {}
    model.base_model.root.scale.clear()
    assert torch.allclose(model(**given, return_dict=False)[0], out.loss)


def test_penalty_of_an_accumulated_batch_does_not_depend_on_the_accumulation():
    model, given = wrapped(), batch(internvl(), rows=4)
    total = (given["labels"][:, 1:] != -100).sum()
    whole = step(model, given | {"num_items_in_batch": total})
    parts = [{k: v[i:i + 2] for k, v in given.items()} | {"num_items_in_batch": total} for i in (0, 2)]
    assert largest_difference(whole, step(model, *parts)) < 1e-5
    assert largest_difference(whole, step(model, given)) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_is_exact(reentrant, when):
    one, two = batch(internvl(), seed=1), batch(internvl(), seed=2)
    model = wrapped(settings=config(lora_dropout=0.3, kl_weight=5.0)).train()

    def run(m):
        torch.manual_seed(3)
        return step(m, one, two)
    m = internvl()
    expected = run(model)
    if when == "after":
        checkpointed = model
        checkpointed.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        m.activation_checkpointing_enable({"use_reentrant": reentrant})
        checkpointed = stir(get_peft_model(m, config(lora_dropout=0.3, kl_weight=5.0))).train()
        checkpointed.load_state_dict(model.state_dict())
    got = run(checkpointed)
    assert largest_difference(expected, got) <= (1e-6 if reentrant else 0.0)  # the reentrant kind sums in another order
    without = wrapped(settings=config(lora_dropout=0.3, kl_weight=0.0)).train()
    without.load_state_dict(model.state_dict(), strict=False)
    assert largest_difference(expected, run(without) | {n: 0 * g for n, g in expected.items() if n not in gradients(without)}) > 1e-3


def test_reentrant_checkpointing_without_a_path_for_the_penalty_is_refused():
    model, given = wrapped().train(), batch(internvl())
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": True})
    model.base_model.model.disable_input_require_grads()
    with pytest.raises(StrLoraError, match="enable_input_require_grads"), pytest.warns(UserWarning): model(**given)
    assert CALL.get() is None


def test_backward_in_another_thread():
    model, given = wrapped().train(), batch(internvl())
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    expected = step(model, given)
    model.zero_grad()
    loss = model(**given).loss
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert largest_difference(expected, gradients(model)) == 0.0


def test_recording():
    model, given = wrapped().train(), batch(internvl())
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    with model.base_model.record_routing() as rows:
        model(**given).loss.backward()
    owners = [layer.name for layer in layers_of(model) if "default" in layer.strlora_router]
    assert [name for name, _, _ in rows] == owners and len(owners) == 8  # 4 of 7 a block: q for k and v, gate for up
    for _, adapter, routing in rows:
        assert adapter == "default" and routing.weights.shape == (2, 18, 4) and not routing.weights.requires_grad
        assert torch.allclose(routing.weights.sum(-1), torch.ones(2, 18)) and routing.selected.sum(-1).eq(2).all()
    model(**given)
    assert len(rows) == 8


# ---------------------------------------------------------------- save, load, several adapters

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", [{}, {"is_trainable": True}, {"low_cpu_mem_usage": True}], ids=str)
def test_save_and_load(name, how, tmp_path):
    model = wrapped(MODELS[name], config(modules_to_save=["multi_modal_projector"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".modules_to_save." in n: p.add_(0.1)
    given = batch(model)
    expected = model(**given)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    loaded = PeftModel.from_pretrained(MODELS[name](), tmp_path, **how).eval()
    got = loaded(**given)
    assert torch.equal(got.logits, expected.logits) and torch.equal(got.penalties["kl"], expected.penalties["kl"])
    assert isinstance(loaded.peft_config["default"], strlora.StrLoraConfig)
    trainable = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == ({n for n, p in model.named_parameters() if p.requires_grad} if how.get("is_trainable") else set())
    state, other = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(state[n], other[n]) for n in state) and any(".ema." in n for n in state)
    with loaded.disable_adapter(): assert torch.equal(loaded(**given).logits, MODELS[name]()(**plain(given)).logits)


def test_released_preset_survives_saving(tmp_path):
    wrapped(settings=released()).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(internvl(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].stage1 == "frozen"
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if "text_router" in n)
    assert any(p.requires_grad for n, p in loaded.named_parameters() if "prototypes" in n)


def test_several_adapters(tmp_path):
    model, given = wrapped(), batch(internvl())
    first = model(**given).logits
    model.add_adapter("second", config(num_experts=2, stage1="frozen", top_k=None, kl_weight=0.0))
    assert torch.equal(model(**given).logits, first)
    model.set_adapter("second")
    fresh = model(**given)
    assert torch.equal(fresh.logits, internvl()(**plain(given)).logits) and strlora.penalties_of(fresh) == {}
    assert all("second" in n and "text_router" not in n for n, p in model.named_parameters() if p.requires_grad)
    stir(model, 5)
    second = model(**given).logits
    model.base_model.set_adapter(["default", "second"])
    both = model(**given)
    assert both.penalties.keys() == {"kl"} and not torch.allclose(both.logits, second, atol=1e-3)
    model.set_adapter("second")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(internvl(), tmp_path / "second").eval()
    assert torch.equal(loaded(**given).logits, second)
    with pytest.warns(UserWarning, match="default"): model.delete_adapter("second")
    assert model.active_adapters == ["default"] and not any("second" in n for n in model.state_dict())
    assert model.get_model_status().peft_types == {"default": "STRLORA"}


def slow(model, adapter):
    "The slow routers of an adapter, by their names in a file."
    return {n.replace(f".{adapter}.", "."): b for n, b in model.named_buffers() if f".strlora_router.{adapter}.ema." in n}


def test_an_adapter_keeps_its_slow_routers_under_any_name(tmp_path):
    model = wrapped()
    model.add_adapter("second", config())
    model.set_adapter("second")
    stir(model, 5)
    model.save_pretrained(tmp_path)
    kept = {name: slow(model, name) for name in ("default", "second")}
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        one = PeftModel.from_pretrained(internvl(), folder, adapter_name="other")
        one.load_adapter(folder, "third")
        for found in (slow(one, "other"), slow(one, "third")):
            assert found.keys() == kept[name].keys() and found
            assert all(torch.equal(found[n], kept[name][n]) for n in found)
    assert not any(torch.equal(kept["default"][n], kept["second"][n]) for n in kept["second"])


def test_an_incomplete_file_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    save_file({n: t for n, t in state.items() if ".ema." not in n}, file)
    with pytest.raises(CheckpointError, match=r"without .*ema"): PeftModel.from_pretrained(internvl(), tmp_path)


def test_a_second_adapter_needs_no_targets():
    "Also for an architecture that PEFT has no targets for: its linears are wrapped already."
    model = get_peft_model(strlora.load_base()[0], config())
    model.add_adapter("second", config())
    assert all(set(layer.strlora_experts) == {"default", "second"} for layer in layers_of(model))


def test_unload_and_merge():
    model, given = wrapped(settings=config(modules_to_save=["multi_modal_projector"])), batch(internvl())
    for merge in (model.merge_and_unload, model.merge_adapter, model.base_model.merge_and_unload, layers_of(model)[0].merge):
        with pytest.raises(MergeError, match="depends on the instruction"): merge()
    assert torch.isfinite(model(**given).loss)
    base = model.unload()
    assert root_of(base) is None and not base._forward_hooks and "generate" not in vars(base) and not layers_of(base)
    assert torch.equal(base(**plain(given)).logits, internvl()(**plain(given)).logits)
    assert torch.equal(base.generate(**plain(prompt(given)), max_new_tokens=3), internvl().generate(**plain(prompt(given)), max_new_tokens=3))
    again = get_peft_model(base, config()).eval()
    assert torch.allclose(again(**given).logits, internvl()(**plain(given)).logits, atol=1e-6)


def test_deepcopy_is_independent():
    model, given = wrapped(), batch(internvl())
    other = copy.deepcopy(model)
    expected = model(**given)
    assert root_of(other.base_model.model) is not root_of(model.base_model.model)
    assert root_of(other.base_model.model).model is other.base_model.model
    assert torch.equal(other(**given).logits, expected.logits)
    stir(other, 9)
    assert torch.equal(model(**given).logits, expected.logits) and not torch.equal(other(**given).logits, expected.logits)
    a = other.generate(**prompt(given), max_new_tokens=3)
    other.base_model.model.eval()
    assert torch.equal(a, other.base_model.model.generate(**prompt(given), max_new_tokens=3))


def test_transformers_own_add_adapter():
    model, given = internvl(), batch(internvl())
    model.add_adapter(config())
    stir(model)
    reference = wrapped()
    reference.load_state_dict({f"base_model.model.{n}": v for n, v in model.state_dict().items()})
    assert torch.equal(model.eval()(**given).logits, reference(**given).logits)
    assert torch.equal(model.generate(**prompt(given), max_new_tokens=3), reference.generate(**prompt(given), max_new_tokens=3))


def test_freezing_later_survives_switching():
    model = wrapped()
    tuner = model.base_model
    all_names = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    tuner.freeze(["query", "key", "prototypes"])
    with model.disable_adapter(): pass
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == all_names - {"query", "key", "prototypes"}
    tuner.freeze()
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == all_names
    with pytest.raises(SpecError, match="prototypes"): tuner.freeze(["prototype"])


def test_sharing_a_router_is_copying_it():
    shared, own = wrapped(), wrapped(settings=config(share_routers=False))
    given = batch(shared)
    with torch.no_grad():
        for a, b in zip(layers_of(shared), layers_of(own), strict=True):
            b.strlora_experts.load_state_dict(a.strlora_experts.state_dict())
            b.strlora_router.load_state_dict(a.strlora_owner.get("default", a).strlora_router.state_dict())
    assert torch.allclose(shared(**given).logits, own(**given).logits, atol=1e-6)
    some = get_peft_model(internvl(), config(target_modules=["k_proj", "v_proj", "up_proj"], exclude_modules=".*vision_tower.*"))
    assert [layer.name.rpartition(".")[2] for layer in layers_of(some) if "default" in layer.strlora_router] == ["k_proj", "up_proj"] * 2
    assert torch.isfinite(some(**given).loss)


@pytest.mark.parametrize("name", MODELS)
def test_one_router_a_block(name, tmp_path):
    model = wrapped(MODELS[name], config(share_routers="block"))
    given = batch(model)
    with model.base_model.record_routing() as rows: out = model(**given)
    assert [layer.rpartition(".")[2] for layer, _, _ in rows] == ["q_proj"] * 2 and len(layers_of(model)) == 14
    assert sum("default" in layer.strlora_router for layer in layers_of(model)) == 2
    pick = lambda layers: {layer.name: layer for layer in layers}["model.language_model.layers.0.mlp.down_proj"]
    own = wrapped(MODELS[name], config(share_routers=False))
    assert pick(layers_of(model)).strlora_owner["default"].name.endswith("layers.0.self_attn.q_proj")
    for a, b in zip(layers_of(model), layers_of(own), strict=True):
        b.strlora_experts.load_state_dict(a.strlora_experts.state_dict())
        if "default" in a.strlora_router: b.strlora_router.load_state_dict(a.strlora_router.state_dict())
        if not a.name.endswith("q_proj"):  # what the block decided, put in by hand
            decided = next(r for n, _, r in rows if n == a.strlora_owner["default"].name)
            b.strlora_router["default"].forward = lambda h, context, decided=decided: decided
    assert torch.allclose(own(**given).logits, out.logits, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(MODELS[name](), tmp_path).eval()
    assert torch.equal(again(**given).logits, out.logits) and torch.equal(copy.deepcopy(model)(**given).logits, out.logits)
    asked = left_padded(model, batch(model, labels=False), [18, 14])
    how = dict(max_new_tokens=6, do_sample=False, num_beams=2)
    assert torch.equal(model.generate(**asked, **how), model.generate(**asked, **how, use_cache=False))
    model.train()
    expected = step(model, given, given)
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    assert largest_difference(expected, step(model, given, given)) == 0
    model.delete_adapter("default")
    assert not any(layer.strlora_owner or layer.strlora_follows for layer in layers_of(model))


def test_a_layer_that_follows_needs_its_block():
    model = wrapped(settings=config(share_routers="block"))
    given = batch(model)
    down = next(layer for layer in layers_of(model) if layer.name.endswith("layers.1.mlp.down_proj"))
    hook = next(layer for layer in layers_of(model) if layer.name.endswith("layers.1.self_attn.q_proj"))
    hook.forward = hook.base_layer.forward  # the layer that decides for the block is passed over
    with pytest.raises(SignalError, match="layers.1.*layers.1.self_attn.q_proj|layers.1.self_attn.q_proj"): model(**given)
    del hook.forward
    drop = lambda module, args: (args[0][:, 1:],)
    handle = down.register_forward_pre_hook(drop)
    with pytest.raises(SignalError, match="tokens that were routed"): model(**given)
    handle.remove()
    assert torch.isfinite(model(**given).loss) and CALL.get() is None
    with pytest.raises(SpecError, match="'block'"): config(share_routers="blok")


def test_one_router_a_block_also_where_all_tokens_have_the_same_weights():
    model = wrapped(settings=config(router="constant", share_routers="block"))
    assert torch.isfinite(model(**batch(model)).loss)


def test_state_and_counts():
    model = wrapped(settings=config(modules_to_save=["multi_modal_projector"]))
    tuner, counts = model.base_model, model.base_model.parameter_counts()
    assert counts["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["trainable"] == counts["experts"] + counts["router"] + counts["modules_to_save"]
    state = {n: t.clone() for n, t in tuner.trainable_state().items()}
    given = batch(model)
    expected = model(**given).logits
    stir(model, 3)
    assert not torch.equal(model(**given).logits, expected)
    tuner.load_trainable_state(state)
    assert torch.equal(model(**given).logits, expected)
    with pytest.raises(StrLoraError, match="adapter state"): tuner.load_trainable_state(dict(list(state.items())[1:]))


def test_ema_update():
    model = wrapped(settings=config(ema_decay=0.9))
    router = layers_of(model)[0].strlora_router["default"]
    expected = 0.9 * router.ema["query"] + 0.1 * router.query
    model.base_model.update_ema()
    assert torch.allclose(router.ema["query"], expected)


# ---------------------------------------------------------------- generation

def left_padded(model, given, widths):
    "Rows of different length, padded on the left."
    n = max(widths)
    out = {"input_ids": torch.full((len(widths), n), PAD), "attention_mask": torch.zeros(len(widths), n, dtype=torch.long),
           "instruction_mask": torch.zeros(len(widths), n, dtype=torch.bool), "pixel_values": given["pixel_values"]}
    for i, w in enumerate(widths):
        for k in ("input_ids", "attention_mask", "instruction_mask"): out[k][i, n - w:] = given[k][i, :w]
    if "token_type_ids" in given: out["token_type_ids"] = (out["input_ids"] == 60).long()
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_generation_with_cache_is_generation_without(name, beams, task_type):
    model = wrapped(MODELS[name], config(task_type=task_type))
    given = left_padded(model, batch(model, labels=False), [18, 14])
    how = dict(max_new_tokens=6, do_sample=False, num_beams=beams, num_return_sequences=beams)
    both = model.generate(**given, **how)
    assert both.shape[0] == 2 * beams
    assert torch.equal(both, model.generate(**given, **how, use_cache=False))
    for i, w in enumerate([18, 14]):
        one = model.generate(**{k: v[i:i + 1, -w:] if k != "pixel_values" else v[i:i + 1] for k, v in given.items()}, **how)
        n = min(both.shape[1] - 18, one.shape[1] - w)
        assert torch.equal(one[:, w:w + n], both[i * beams:(i + 1) * beams, 18:18 + n])
    assert PROMPT.get() is None
    base = MODELS[name]().generate(**plain(given), **how)
    with model.disable_adapter(): assert torch.equal(model.generate(**given, **how), base)


def test_a_generation_reads_the_instruction_once(monkeypatch):
    from strlora.moe.layer import TwoStageRouter
    model = wrapped()
    given, reads, read = batch(model, labels=False), [], TwoStageRouter.read
    monkeypatch.setattr(TwoStageRouter, "read", lambda self, *args: reads.append(self) or read(self, *args))
    first = model.generate(**given, max_new_tokens=5, do_sample=False)
    routers = sum("default" in layer.strlora_router for layer in layers_of(model))
    assert len(reads) == len(set(reads)) == routers
    other = given | {"instruction_mask": given["instruction_mask"].roll(1, 1)}
    model.generate(**other, max_new_tokens=5, do_sample=False)
    assert len(reads) == 2 * routers, "another generation reads anew"
    assert torch.equal(first, model.generate(**given, max_new_tokens=5, do_sample=False, use_cache=False))


def test_greedy_by_hand_is_generate():
    model = wrapped()
    given = prompt(batch(model, labels=False))
    expected = model.generate(**given, max_new_tokens=5, do_sample=False)
    ids, mask = given["input_ids"], given["instruction_mask"]
    with torch.no_grad():
        for _ in range(5):
            logits = model(input_ids=ids, pixel_values=given["pixel_values"], instruction_mask=mask).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
            mask = torch.nn.functional.pad(mask, (0, 1))
        assert torch.equal(ids[:, :expected.shape[1]], expected)
        step = model(**given, use_cache=True)
        with pytest.raises(SignalError): model(input_ids=ids[:, 18:19], past_key_values=step.past_key_values)
        with pytest.raises(SignalError, match="instructed"):
            model(input_ids=ids[:, 18:19], past_key_values=step.past_key_values, instruction_mask=given["instruction_mask"])
        with model.base_model.instructed(given["instruction_mask"], given["input_ids"]):
            cache = model(**plain(given), use_cache=True).past_key_values
            logits = model(input_ids=ids[:, 18:19], past_key_values=cache).logits
        assert torch.equal(logits[:, -1].argmax(-1), ids[:, 19])


def test_threads_do_not_disturb_each_other():
    model = wrapped()
    inputs = [prompt(batch(model, seed=i, labels=False)) for i in range(4)]
    expected = [model.generate(**x, max_new_tokens=5, do_sample=False) for x in inputs]
    got: dict = {}

    def serve(i):
        for _ in range(3): got.setdefault(i, []).append(model.generate(**inputs[i], max_new_tokens=5, do_sample=False))
    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert all(torch.equal(x, expected[i]) for i in range(4) for x in got[i]) and all(len(v) == 3 for v in got.values())


# ---------------------------------------------------------------- number formats, other shapes, Trainer

def test_bfloat16_base_keeps_float32_adapters_and_slow_routers():
    model = wrapped(lambda: internvl().to(torch.bfloat16))
    assert all(t.dtype == torch.float32 for n, t in model.state_dict().items() if ".strlora_" in n)
    out = model(**(batch(model) | {"pixel_values": batch(model)["pixel_values"].bfloat16()}))
    out.loss.backward()
    assert torch.isfinite(out.loss) and out.logits.dtype == torch.bfloat16
    low = wrapped(lambda: internvl().to(torch.bfloat16), autocast_adapter_dtype=False)
    assert {t.dtype for n, t in low.state_dict().items() if ".strlora_experts." in n} == {torch.bfloat16}
    assert {t.dtype for n, t in low.state_dict().items() if ".ema." in n} == {torch.float32}
    low.base_model.update_ema()
    assert torch.isfinite(low(**(batch(model) | {"pixel_values": batch(model)["pixel_values"].bfloat16()})).loss)


def test_autocast():
    model, given = wrapped().train(), batch(internvl())
    expected = model(**given)
    with torch.autocast("cpu", torch.bfloat16): out = model(**given)
    out.loss.backward()
    assert abs(out.loss - expected.loss) < 0.2 and torch.allclose(out.penalties["kl"], expected.penalties["kl"], rtol=0.1)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


class Flat(torch.nn.Module):
    "A text model whose block flattens its hidden states to `[tokens, d]`."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up_proj, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 20)

    def get_input_embeddings(self): return self.embed

    def forward(self, input_ids, flat=True):
        x = self.embed(input_ids)
        y = self.up_proj(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if flat else self.up_proj(x)
        return self.head(x + y)


def test_default_targets_of_a_text_model():
    assert [layer.name for layer in layers_of(get_peft_model(Flat(), config()))] == ["up_proj"]


def test_flat_hidden_states():
    model = stir(get_peft_model(Flat(), config(target_modules=["up_proj"])))
    ids = torch.randint(1, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 5, dtype=torch.bool)
    assert torch.allclose(model(input_ids=ids, instruction_mask=mask), model(input_ids=ids, flat=False, instruction_mask=mask), atol=1e-6)
    assert torch.allclose(model(ids, instruction_mask=mask), model(input_ids=ids, instruction_mask=mask))


def test_hugging_face_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments
    rows = batch(internvl(), rows=8)
    data = [{k: v[i] for k, v in rows.items()} for i in range(8)]

    def train(size, accumulation, checkpointing):
        torch.manual_seed(0)
        model = get_peft_model(internvl(), config())
        args = TrainingArguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=3, report_to=[],
                                 remove_unused_columns=False, learning_rate=1e-2, use_cpu=True, save_strategy="no", disable_tqdm=True,
                                 logging_strategy="no", gradient_checkpointing=checkpointing, lr_scheduler_type="constant", weight_decay=0.0)
        Trainer(model, args, train_dataset=data, callbacks=[strlora.EmaCallback()]).train()
        return model.base_model.trainable_state()
    one = train(4, 1, False)
    assert largest_difference(one, train(2, 2, False)) < 1e-4
    assert largest_difference(one, train(4, 1, True)) < 1e-5
    layers = [n for n in one if ".ema." in n and n.endswith("query")]
    assert layers and not torch.equal(one[layers[0]], one[layers[0].replace(".ema.", ".")])


def test_plain_string_registration_as_fallback(monkeypatch, tmp_path):
    from strlora.tuner import register as module
    mapping = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    assert mapping["STRLORA"] is strlora.StrLoraConfig
    for name in ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING"):
        monkeypatch.delitem(getattr(peft.mapping, name), "STRLORA")

    def locked(*_): raise TypeError("locked")
    monkeypatch.setattr(module, "add_member", locked)
    monkeypatch.setattr(module, "register_peft_method", locked)
    module.register()
    settings = config()
    settings.peft_type = "STRLORA"
    model = wrapped(settings=settings)
    model.save_pretrained(tmp_path)
    given = batch(model)
    assert torch.equal(PeftModel.from_pretrained(internvl(), tmp_path).eval()(**given).logits, model(**given).logits)
