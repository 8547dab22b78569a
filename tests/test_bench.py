"The benchmark: what its rows mean, how its output reads; never how fast this machine is."
import json

import pytest
import torch

from strlora import bench
from strlora.cli import main
from strlora.core import SpecError
from strlora.moe.signal import Context, Penalties
from strlora.timing import peak_bytes, side_by_side, summed_up


def test_a_round_is_divided_by_its_own_reference():
    turns, times = [], iter(range(1, 100))
    def way(name): return lambda: turns.append((name, next(times)))
    found = side_by_side({name: way(name) for name in "abc"}, "a", rounds=5)
    assert len(turns) == 3 * 7 and {len(v) for v in found.values()} == {5} and found["a"] == [1.0] * 5
    orders = {tuple(name for name, _ in turns[i:i + 3]) for i in range(0, 21, 3)}
    assert len(orders) > 1, "the order is drawn anew"


def test_the_interval_of_the_median_comes_from_ranks():
    row = summed_up("x", [float(i) for i in range(41)], 19.0)
    assert (row.ratio, row.low, row.high, row.met) == (20.0, 14.0, 26.0, False)


def test_layers_of_one_group_have_the_same_trained_numbers_and_compute_what_they_say():
    s = bench.Shape(width=32, tokens=8, rank=8, dropout=0.0)
    plain, one = bench.plain_layer(s), bench.routed_layer(s, "constant")
    sizes = [sum(p.numel() for n, p in layer.named_parameters() if p.requires_grad) for layer in (plain, one)]
    assert sizes[0] == sizes[1] == 2 * 32 * 8
    for layer in (plain, bench.routed_layer(s, attention_dim=4)):
        bench.layer_pass(layer, s)()
        trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        assert all(p.grad is not None for p in trained.values()), [n for n, p in trained.items() if p.grad is None]
    forward = bench.Shape(width=32, tokens=8, rank=8, backward=False)
    layer = bench.routed_layer(forward, attention_dim=4)
    bench.layer_pass(layer, forward)()
    assert all(p.grad is None for p in layer.parameters())


@pytest.mark.parametrize("part", ["scale", "step", *(pytest.param(part, marks=pytest.mark.slow) for part in ("layer", "generate", "compile"))])
def test_json_has_a_row_for_everything(part, capsys):
    groups = {"layer": 14, "scale": 4, "generate": 4, "step": 10, "compile": 3}
    assert main(["bench", part, "--rounds", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["rows"]) == groups[part] and found["rounds"] == 3 and found["versions"]["torch"] == torch.__version__
    for row in found["rows"]:
        assert row.keys() == {"name", "ratio", "low", "high", "target"} and 0 < row["low"] <= row["ratio"] <= row["high"]
    assert any(row["target"] for row in found["rows"]) or part == "compile"


@pytest.mark.slow
def test_growth_tells_of_every_method_that_lasts(capsys, monkeypatch):
    from strlora import growth
    whole = growth.growth
    monkeypatch.setattr(bench, "growth", lambda rounds, seen: whole(rounds, ["lora", "strlora"], 20, seen))
    assert main(["bench", "growth", "--rounds", "5", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [row["name"] for row in found["rows"]] == ["lora, time", "lora, state", "strlora, time", "strlora, state"]
    assert found["rows"][3]["ratio"] == 1 and found["rows"][3]["target"] and "growth: strlora" in err
    assert len(found["series"]) == 2 * 20 // growth.EVERY and found["series"][0].keys() == {"method", "chunk", "seconds", "numbers"}


def test_compiling_without_a_compiler_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    assert main(["bench", "compile"]) == 2 and "C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [(["full", "--device", "cpu"], "options of full"), (["layer", "--tiles", "2"], "options of layer"),
                                         (["layer", "--device", "banana"], "cpu or cuda"), (["layer", "--device", "cuda:99"], "GPU"),
                                         (["full", "--base", "mini", "--tiles", "-1"], "tiles"), (["full", "--base", "nosuch"], "nosuch"),
                                         (["full", "--base", "mini", "--set", "method=lora"], "method=lora")])
def test_options_that_mean_nothing_are_one_line(words, said, capsys):
    assert main(["bench", *words]) == 2
    found = capsys.readouterr().err
    assert said in found and found.count("\n") == 1


def test_few_rounds_are_not_called_an_interval():
    row = bench.Ratio("x", 1.0, 0.9, 1.1, None)
    assert "95 %" in bench.written("layer", [row], 40) and "lowest and highest of 3" in bench.written("layer", [row], 3)


def test_too_few_rounds_are_refused(capsys):
    assert main(["bench", "layer", "--rounds", "2"]) == 2 and "at least 3 rounds" in capsys.readouterr().err
    with pytest.raises(SpecError): bench.measured("scale", 0)


# ---------------------------------------------------------------- what may not enter the forward pass

class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    "Counts operations by name, and notes those that make the host wait for the device."
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_to_copy.device", "unique", "equal")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(experts, **settings):
    s = bench.Shape(width=32, tokens=16, experts=experts, rank=2 * experts, dropout=0.1)
    layer, x = bench.routed_layer(s, attention_dim=8, **settings), torch.randn(4, 16, 32, requires_grad=True)
    with Counted() as counted:
        penalties = Penalties()
        y = layer(x, Context(torch.randn(4, 32), torch.ones(4, 16, dtype=torch.bool), penalties=penalties))
        torch.autograd.backward([y.sum(), penalties.mean()["kl"]])
    return counted.names


@pytest.mark.parametrize("settings", [{}, {"stage1": "straight_through"}, {"sub_top_k": 1}, {"top_k": None}])
def test_no_loop_over_experts_and_no_wait_in_a_pass(settings):
    few, many = operations(4, **settings), operations(12, **settings)
    waits = [name for name in few if any(wait in name for wait in Counted.WAITS)]
    assert not waits, waits
    grouped = settings in ({}, {"sub_top_k": 1})  # with twelve experts of which two are used another path is taken
    assert len(many) == len(few) or grouped and len(many) < len(few) + 40, (len(few), len(many))
    if grouped: assert len(operations(12, **settings)) == len(operations(40, **settings))


def test_memory_is_counted_once_a_storage():
    def views():
        x = torch.zeros(100)
        return x.view(10, 10).t()[2:], x
    assert peak_bytes(views) == 400


@pytest.mark.parametrize("settings", [{}, {"stage1": "frozen", "sub_top_k": 1}, {"top_k": None}, {"regularize": False}])
def test_compiles_without_a_break(settings):
    s = bench.Shape(width=32, tokens=16, rank=8, dropout=0.0)
    torch.manual_seed(0)
    layer, x, t = bench.routed_layer(s, attention_dim=8, **settings), torch.randn(4, 16, 32), torch.randn(4, 32)

    context = Context(t, torch.ones(4, 16, dtype=torch.bool), penalties=Penalties())

    def both(x):
        routing = layer.router(x, context)
        y = layer.base(x) + layer.experts(x, routing.weights, routing.indices)
        return y, routing.penalties.get("kl", y.new_zeros(()))

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for a, b in zip(both(x), compiled(x), strict=True): torch.testing.assert_close(a, b)
    grads = []
    for f in (both, compiled):
        layer.zero_grad()
        y, kl = f(x)
        (y.square().mean() + kl).backward()
        grads.append({n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for n, g in grads[0].items(): torch.testing.assert_close(g, grads[1][n])
