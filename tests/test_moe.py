"""The mixture-of-experts core: what must hold for every router, experts and dtype."""
import copy

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from strlora.core import SignalError, SpecError
from strlora.moe.experts import Experts
from strlora.moe.layer import ROUTERS, ConstantRouter, MoELinear, TwoStageRouter, released
from strlora.moe.signal import Context, Penalties, pool_instruction

D_IN, D_OUT, D_TEXT, E, B, T = 32, 24, 20, 4, 3, 7

VARIANTS = {
    "default": {},
    "prior_hard": dict(sub_top_k=1),
    "prior_dense": dict(top_k=None),
    "prior_linear": dict(attention_dim=0),
    "prior_select_only": dict(sub_top_k=0),
    "prior_cool": dict(temperature=2.0),
    "prior_plain_instruction": dict(instruction_norm="none"),
    "straight_through": dict(stage1="straight_through"),
    "straight_through_hard": dict(stage1="straight_through", sub_top_k=1),
    "straight_through_one": dict(stage1="straight_through", top_k=1),
    "straight_through_select_only": dict(stage1="straight_through", sub_top_k=0),
    "straight_through_linear": dict(stage1="straight_through", attention_dim=0),
    "frozen": dict(stage1="frozen"),
    "frozen_select_only": dict(stage1="frozen", sub_top_k=0),
    "frozen_one": dict(stage1="frozen", sub_top_k=0, top_k=1),
    "released": released(attention_dim=16),
    "released_soft": released(attention_dim=16, sub_top_k=2),
    "released_dense": released(attention_dim=16, top_k=0, sub_top_k=4),
    "released_linear": released(attention_dim=0),
    "released_text_only": released(sub_top_k=0),
    "released_text_only_dense": released(sub_top_k=0, top_k=0),
}
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())


def make(settings=None, seed=0, dropout=0.0, drifted=False, random_b=True) -> MoELinear:
    "A layer; `drifted` moves the live router away from its slow copy."
    torch.manual_seed(seed)
    layer = MoELinear(nn.Linear(D_IN, D_OUT), Experts(D_IN, D_OUT, E, 16, 32, dropout), TwoStageRouter(D_IN, D_TEXT, E, **(settings or {})))
    with torch.no_grad():
        if random_b: layer.experts.A.normal_(), layer.experts.B.normal_()
        if drifted:
            for name, p in layer.router.live.items():
                if name not in layer.router.frozen_names: p.add_(torch.randn_like(p), alpha=0.3 * p.std().item())
    return layer


def inputs(seed=1, b=B, t=T):
    torch.manual_seed(seed)
    return torch.randn(b, t, D_IN), torch.randn(b, D_TEXT)


def call(layer, x, instruction, tokens=None, collect=True):
    "Output, weights and penalties of one call."
    context = Context(instruction, tokens, penalties=Penalties() if collect else None)
    return layer(x, context), layer.router(x, context), context.penalties.close() if collect else {}


# ---------------------------------------------------------------- what trains


@every_variant
@pytest.mark.parametrize("loss_on", ["task", "task and divergence"])
def test_everything_declared_trainable_gets_a_gradient_after_one_step(settings, loss_on):
    layer = make(settings, random_b=False)
    x, instruction = inputs()
    target = torch.randn(B, T, D_OUT)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    for step in range(2):
        optimizer.zero_grad()
        y, _, penalties = call(layer, x, instruction)
        loss = (y - target).square().mean()
        if loss_on != "task": loss = loss + 0.1 * sum(penalties.values())
        loss.backward()
        assert all(p.grad is not None for p in trained.values())  # DDP needs no search for unused parameters
        if step == 0:
            optimizer.step()
            layer.router.update_ema()
    silent = [n for n, p in trained.items() if not p.grad.any()]
    assert not silent, f"no gradient: {silent}"


@every_variant
def test_frozen_parameters_are_declared_and_the_others_are_not_frozen(settings):
    router = make(settings).router
    assert {n for n, p in router.named_parameters() if not p.requires_grad} == router.frozen_names
    if settings.get("stage1") == "frozen": assert router.frozen_names == {"text_router"}
    if router.ema is not None: assert not set(router.ema.names) & router.frozen_names


@every_variant
def test_only_what_is_used_exists(settings):
    names = {n for n, _ in make(settings).router.named_parameters()}
    linear, alone = settings.get("attention_dim") == 0, settings.get("sub_top_k") == 0
    assert ("token_router" in names) == (linear and not alone)
    assert ("query" in names) == (not linear and not alone)


@every_variant
def test_fresh_layer_is_its_base(settings):
    layer = make(settings, random_b=False)
    x, instruction = inputs()
    y, _, penalties = call(layer, x, instruction)
    assert torch.equal(y, layer.base(x))
    assert all(v.item() == 0 for v in penalties.values())


# ---------------------------------------------------------------- bridges


def test_one_expert_with_constant_router_is_the_lora_of_peft():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3)
    theirs = peft.tuners.lora.Linear(nn.Linear(D_IN, D_OUT), "default", config, r=8, lora_alpha=16)
    theirs.base_layer.requires_grad_(False)
    nn.init.normal_(theirs.lora_B["default"].weight)
    ours = MoELinear(copy.deepcopy(theirs.base_layer), Experts(D_IN, D_OUT, 1, 8, 16, dropout=0.3), ConstantRouter(1))
    with torch.no_grad():
        ours.experts.A[0].copy_(theirs.lora_A["default"].weight)
        ours.experts.B[0].copy_(theirs.lora_B["default"].weight)
    x, _ = inputs()
    for mode in (False, True):
        grads = []
        for layer, args in ((theirs.train(mode), (x,)), (ours.train(mode), (x, None))):
            torch.manual_seed(3)
            layer.zero_grad()
            y = layer(*args)
            y.square().sum().backward()
            grads.append((y, *(p.grad.reshape(-1) for p in layer.parameters() if p.requires_grad)))
        for a, b in zip(*grads): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_constant_router_is_the_mean_of_the_experts():
    torch.manual_seed(0)
    layer = MoELinear(nn.Linear(D_IN, D_OUT), Experts(D_IN, D_OUT, E, 16, 32), ConstantRouter(E))
    nn.init.normal_(layer.experts.B)
    x, _ = inputs()
    each = [layer.experts.scale * x @ a.T @ b.T for a, b in zip(layer.experts.A, layer.experts.B)]
    torch.testing.assert_close(layer(x, None) - layer.base(x), torch.stack(each).mean(0), atol=1e-5, rtol=1e-4)


@every_variant
def test_permuting_experts_changes_nothing(settings):
    layer, order = make(settings, drifted=True), torch.tensor([2, 0, 3, 1])
    other = copy.deepcopy(layer)
    rows = {"A", "B", "text_router", "prototypes", "token_router"}
    state = {k: v[order] if k.rsplit(".", 1)[-1] in rows else v for k, v in layer.state_dict().items()}
    other.load_state_dict(state)
    x, instruction = inputs()
    (y, routing, kl), (y2, routing2, kl2) = call(layer, x, instruction), call(other, x, instruction)
    torch.testing.assert_close(y2, y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(routing2.weights, routing.weights[..., order], atol=1e-5, rtol=1e-4)
    assert torch.equal(routing2.selected, routing.selected[:, order])
    for name in kl: torch.testing.assert_close(kl2[name], kl[name], atol=1e-6, rtol=1e-4)


@every_variant
def test_batch_of_two_is_two_batches_of_one(settings):
    layer = make(settings, drifted=True)
    x, instruction = inputs(b=2)
    y, routing, _ = call(layer, x, instruction)
    parts = [call(layer, x[i:i + 1], instruction[i:i + 1]) for i in range(2)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), y, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([p[1].weights for p in parts]), routing.weights, atol=1e-5, rtol=1e-4)
    if routing.kl is not None: torch.testing.assert_close(torch.cat([p[1].kl for p in parts]), routing.kl, atol=1e-6, rtol=1e-4)


@every_variant
def test_gradients_of_a_batch_are_the_sum_of_its_samples(settings):
    layer = make(settings)
    x, instruction = inputs(b=2)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def grads(rows): return torch.autograd.grad(call(layer, x[rows], instruction[rows], collect=False)[0].sin().sum(), trained)
    for whole, first, second in zip(grads(slice(None)), grads(slice(0, 1)), grads(slice(1, 2))):
        torch.testing.assert_close(first + second, whole, atol=2e-3, rtol=1e-3)


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(settings, side):
    settings = settings | {"padding": False}
    layer = make(settings, drifted=True)
    x, instruction = inputs()
    y, _, kl = call(layer, x, instruction, torch.ones(B, T, dtype=torch.bool))
    noise, none = 50 * torch.randn(B, 4, D_IN), torch.zeros(B, 4, dtype=torch.bool)
    parts = [(noise, none), (x, ~none.new_zeros(B, T))]
    padded, tokens = (torch.cat(p, 1) for p in zip(*(parts if side == "left" else parts[::-1])))
    y2, _, kl2 = call(layer, padded, instruction, tokens)
    torch.testing.assert_close(y2[tokens].view_as(y), y, atol=1e-3, rtol=1e-4)
    for name in kl: torch.testing.assert_close(kl2[name], kl[name], atol=1e-6, rtol=1e-4)


def test_padding_counts_in_the_released_mean_only():
    x, instruction = inputs()
    tokens = torch.arange(T).expand(B, -1) < torch.tensor([[3], [5], [7]])
    for padding in (False, True):
        _, routing, means = call(make(dict(padding=padding), drifted=True), x, instruction, tokens)
        expected = routing.kl.mean() if padding else routing.kl[tokens].mean()
        torch.testing.assert_close(means["kl"], expected)


@every_variant
def test_unselected_experts_get_exactly_zero(settings):
    layer = make(settings)
    x, instruction = inputs()
    _, routing, _ = call(layer, x, instruction)
    k = settings.get("top_k", 2) or E
    assert (routing.selected.sum(-1) == k).all()
    assert not routing.weights.masked_select(~routing.selected[:, None].expand_as(routing.weights)).any()
    torch.testing.assert_close(routing.weights.sum(-1), torch.ones(B, T))
    if settings.get("sub_top_k") == 1: assert ((routing.weights > 0).sum(-1) == 1).all()


@pytest.mark.parametrize("name", ["default", "prior_linear", "prior_select_only", "straight_through", "frozen", "released_soft"])
def test_equal_scores_are_uniform_weights(name):
    layer = make(VARIANTS[name])
    with torch.no_grad():
        for p in ("text_router", "prototypes", "token_router"):
            if hasattr(layer.router, p): getattr(layer.router, p).zero_()
    _, routing, _ = call(layer, *inputs())
    torch.testing.assert_close(routing.weights, routing.selected[:, None].expand_as(routing.weights) / routing.selected.sum(-1)[:, None, None])


def test_prior_and_straight_through_differ_in_the_gradient_alone():
    prior, estimate = make(dict(stage1="prior")), make(dict(stage1="straight_through"))
    x, instruction = inputs()
    ys = [call(layer, x, instruction)[0] for layer in (prior, estimate)]
    torch.testing.assert_close(*ys, atol=1e-5, rtol=1e-5)
    for y in ys: y.sin().sum().backward()
    assert not torch.allclose(prior.router.text_router.grad, estimate.router.text_router.grad)


def test_experts_cost_two_products_whatever_their_number():
    x, _ = inputs()
    flops = []
    for e in (1, 4, 16):
        bank = Experts(D_IN, D_OUT, e, 16, 32)
        with FlopCounterMode(display=False) as counter: bank(x, torch.ones(B, T, e))
        flops.append(counter.get_total_flops())
    assert len(set(flops)) == 1 and flops[0] == 2 * B * T * 16 * (D_IN + D_OUT)


@pytest.mark.parametrize("settings", [{}, dict(sub_top_k=1), dict(sub_top_k=0), released(attention_dim=16), dict(attention_dim=0)])
@pytest.mark.parametrize("flat", [False, True])
def test_picking_few_of_many_experts_gives_the_same_numbers_and_gradients(settings, flat, monkeypatch):
    torch.manual_seed(0)
    layer = MoELinear(nn.Linear(D_IN, D_OUT), Experts(D_IN, D_OUT, 16, 32, 64), TwoStageRouter(D_IN, D_TEXT, 16, **settings))
    nn.init.normal_(layer.experts.B)
    x, instruction = inputs(t=40)
    results = []
    for picks in (True, False):
        if not picks: monkeypatch.setattr("strlora.moe.experts.is_grouped", lambda *shape: False)
        layer.zero_grad()
        y = layer(x.flatten(0, 1) if flat else x, Context(instruction))
        y.sin().sum().backward()
        results.append([y, *(p.grad for p in layer.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_picking_costs_what_the_picked_experts_cost():
    x, _ = inputs(b=2, t=64)
    indices, flops = torch.tensor([[0, 1], [2, 3]]), []
    for e in (16, 64):
        with FlopCounterMode(display=False) as counter: Experts(D_IN, D_OUT, e, 4 * e, 32)(x, torch.ones(e), indices)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] == 2 * 2 * 64 * 8 * (D_IN + D_OUT)


def test_straight_through_over_all_experts_never_picks():
    for stage1, picks in (("prior", True), ("straight_through", False)):
        routing = make(dict(stage1=stage1)).router(inputs()[0], Context(inputs()[1]))
        assert (routing.indices is not None) == picks


# ---------------------------------------------------------------- divergence and slow copy


@every_variant
def test_divergence_is_zero_at_first_and_positive_after_a_drift(settings):
    still, moved = make(settings), make(settings, drifted=True)
    x, instruction = inputs()
    if still.router.ema is None: pytest.skip("this variant has nothing to regularize")
    assert call(still, x, instruction)[2]["kl"].abs() < 1e-7
    assert call(moved, x, instruction)[2]["kl"] > 1e-5


@every_variant
def test_divergence_teaches_the_router_alone(settings):
    layer = make(settings, drifted=True)
    if layer.router.ema is None: pytest.skip("this variant has nothing to regularize")
    x, instruction = inputs()
    x.requires_grad_(), instruction.requires_grad_()
    call(layer, x, instruction)[2]["kl"].backward()
    assert layer.experts.A.grad is None and layer.experts.B.grad is None and instruction.grad is None
    assert (x.grad is not None) == layer.router.kl_through_hidden
    for name, p in layer.router.live.items(): assert (p.grad is not None and p.grad.any()) == (name not in layer.router.frozen_names)


def test_drift_of_stage_one_is_penalised():
    layer = make()
    with torch.no_grad(): layer.router.text_router.add_(torch.randn_like(layer.router.text_router))
    assert call(layer, *inputs())[2]["kl"] > 1e-3


@every_variant
def test_forward_is_pure(settings):
    layer = make(settings, drifted=True)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    first, second = call(layer, *inputs()), call(layer, *inputs())
    assert torch.equal(first[0], second[0]) and torch.equal(first[1].weights, second[1].weights)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in before.items())


def test_slow_copy_moves_once_per_update_and_is_saved():
    layer = make(dict(ema_decay=0.9), drifted=True)
    slow, live = layer.router.ema["prototypes"].clone(), layer.router.prototypes.detach()
    layer.router.update_ema()
    torch.testing.assert_close(layer.router.ema["prototypes"], 0.9 * slow + 0.1 * live)
    other = make(dict(ema_decay=0.9), seed=5)
    other.load_state_dict(load_bytes(save_bytes(layer.state_dict())))
    x, instruction = inputs()
    assert torch.equal(call(other, x, instruction)[2]["kl"], call(layer, x, instruction)[2]["kl"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slow_copy_stays_float32_and_exact(dtype):
    layer = make(drifted=True)
    layer.router.update_ema()
    before = layer.router.ema["query"].clone()
    layer.to(dtype)
    assert layer.router.query.dtype == dtype
    assert layer.router.ema["query"].dtype == torch.float32 and torch.equal(layer.router.ema["query"], before)
    layer.router.update_ema()
    assert not torch.equal(layer.router.ema["query"], before)


def test_nothing_is_computed_when_nobody_collects():
    layer = make(drifted=True)
    x, instruction = inputs()
    _, routing, _ = call(layer, x, instruction, collect=False)
    assert routing.kl is None and routing.penalties == {}


# ---------------------------------------------------------------- calls


@every_variant
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_under_checkpointing_gives_the_same_gradients(settings, dropout):
    layer = make(settings, dropout=dropout, drifted=True).train()
    x, instruction = inputs()
    results = []
    for recompute in (False, True):
        layer.zero_grad()
        torch.manual_seed(7)
        context, inp = Context(instruction, penalties=Penalties()), x.clone().requires_grad_()
        y = checkpoint(layer, inp, context, use_reentrant=False) if recompute else layer(inp, context)
        assert all(len(v) == 1 for v in context.penalties.values.values())
        (y.sin().sum() + sum(context.penalties.close().values())).backward()
        assert context.penalties.values == {}
        results.append([inp.grad, *(p.grad for p in layer.parameters() if p.requires_grad)])
    for plain, recomputed in zip(*results): assert torch.equal(plain, recomputed)


def test_two_forwards_before_one_backward_keep_their_own_context():
    layer = make(drifted=True)
    (x1, t1), (x2, t2) = inputs(1), inputs(2)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def loss(x, t):
        y, _, kl = call(layer, x, t)
        return y.sin().sum() + kl["kl"]
    together = torch.autograd.grad(loss(x1, t1) + loss(x2, t2), trained)
    apart = [torch.autograd.grad(loss(x, t), trained) for x, t in ((x1, t1), (x2, t2))]
    for a, b, c in zip(together, *apart): torch.testing.assert_close(a, b + c, atol=1e-4, rtol=1e-4)


@every_variant
def test_decoding_token_by_token_is_the_full_pass(settings):
    layer = make(settings)
    x, instruction = inputs(t=40)
    y = call(layer, x, instruction, collect=False)[0]
    steps = [call(layer, x[:, :30], instruction, collect=False)[0]]
    steps += [call(layer, x[:, i:i + 1], instruction, torch.ones(B, 30, dtype=torch.bool), collect=False)[0] for i in range(30, 40)]
    torch.testing.assert_close(torch.cat(steps, 1), y, atol=1e-4, rtol=1e-4)


@every_variant
def test_hidden_states_without_batch_axis(settings):
    layer = make(settings, drifted=True)
    x, instruction = inputs()
    y, routing, kl = call(layer, x, instruction)
    y2, routing2, kl2 = call(layer, x.flatten(0, 1), instruction)
    torch.testing.assert_close(y2.view_as(y), y, atol=1e-4, rtol=1e-4)
    assert routing2.weights.shape == (B * T, E)
    for name in kl: torch.testing.assert_close(kl2[name], kl[name])


@every_variant
def test_no_value_is_read_on_the_host(settings):
    "On the meta device tensors have no values: whatever looks at one fails."
    layer = make(settings, dropout=0.1).train().to("meta")
    x, instruction = (v.to("meta") for v in inputs())
    y, routing, penalties = call(layer, x, instruction, torch.ones(B, T, dtype=torch.bool, device="meta"))
    (y.sum() + sum(penalties.values())).backward()
    assert y.shape == (B, T, D_OUT) and routing.weights.shape == (B, T, E)


# ---------------------------------------------------------------- dtypes


@every_variant
def test_autocast_is_safe(settings):
    layer = make(settings, drifted=True)
    x, instruction = inputs()
    exact = call(layer, x, instruction)[0]
    with torch.autocast("cpu", torch.bfloat16): y, routing, penalties = call(layer, x, instruction)
    assert y.dtype == torch.bfloat16 and routing.weights.dtype == torch.float32
    (y.float().sum() + sum(penalties.values())).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    if "hard" not in str(settings) and settings.get("sub_top_k") != 1:
        assert (y.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_variant
def test_half_base_with_float32_adapter(settings, dtype):
    layer = make(settings)
    layer.base.to(dtype)
    x, instruction = inputs()
    y, routing, penalties = call(layer, x.to(dtype), instruction)
    assert y.dtype == dtype and routing.logits.dtype == torch.float32 and y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_stay_finite(dtype):
    layer = make(drifted=True).to(dtype)
    x, instruction = inputs()
    y, routing, penalties = call(layer, 1000 * x.to(dtype), 1000 * instruction)
    assert routing.weights.isfinite().all() and penalties["kl"].isfinite()
    penalties["kl"].backward()
    assert all(p.grad.isfinite().all() for p in layer.router.parameters() if p.grad is not None)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("settings, word", [
    (dict(top_k=5), "top_k"), (dict(top_k=-1), "top_k"), (dict(sub_top_k=5), "sub_top_k"), (dict(top_k=1), "straight_through"),
    (dict(top_k=1, stage1="frozen"), "sub_top_k=0"), (dict(stage1="straigth_through"), "'straight_through'"),
    (dict(instruction_norm="batch"), "layer, none"), (dict(attention_dim=-1), "attention_dim"),
])
def test_settings_that_cannot_work_are_refused(settings, word):
    with pytest.raises(SpecError, match=word): TwoStageRouter(D_IN, D_TEXT, E, **settings)


def test_one_expert_cannot_be_routed():
    with pytest.raises(SpecError, match="constant"): TwoStageRouter(D_IN, D_TEXT, 1, top_k=None)


@pytest.mark.parametrize("rank", [0, 2, 6])
def test_rank_that_experts_cannot_share(rank):
    with pytest.raises(SpecError, match=r"Use r=\d"): Experts(D_IN, D_OUT, 4, rank, 8)


def test_wrong_signals_are_refused():
    embeddings = torch.randn(2, 5, D_TEXT)
    with pytest.raises(SignalError, match="row 1"): pool_instruction(embeddings, torch.tensor([[1] * 5, [0] * 5]))
    with pytest.raises(SignalError, match="shape"): pool_instruction(embeddings, torch.ones(2, 4))
    x, instruction = inputs()
    with pytest.raises(SignalError, match="samples"): call(make(), x, instruction[:2])
    with pytest.raises(SignalError, match="merged"): call(make(), x, instruction, torch.ones(B, T + 1, dtype=torch.bool))


def test_pooling_does_not_see_padding():
    embeddings = torch.randn(2, 5, D_TEXT)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]]).bool()
    padded = torch.cat([torch.full((2, 3, D_TEXT), float("nan")), embeddings], 1)
    torch.testing.assert_close(pool_instruction(padded, torch.cat([torch.zeros(2, 3), mask], 1)), pool_instruction(embeddings, mask))


def test_table_of_routers():
    for name, build in ROUTERS.items():
        router = build(D_IN, D_TEXT, E, **(released() if name == "two_stage" else {}))
        x, t = inputs()[:2]
        routing = router(x, Context(t, prompt=torch.ones(x.shape[:2], dtype=torch.bool)))
        assert routing.weights.shape[-1] == E and router.frozen_names <= {"text_router"}
        router.update_ema()
