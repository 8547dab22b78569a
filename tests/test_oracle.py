"""The released preset, MoELoRA and SMoLoRA against arrays of the official layers.

Every `.npz` in `tests/oracle/` and in the folder named by `STRLORA_ORACLE_DIR` is a case. What a file is follows from its
keys, not from its name, except that `_onetoken` and `_onesample` mark inputs on which the official code leaves out experts
without weight, so that its router gradients depend on the rest of the batch; we compare outputs and divergence there.
"""
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from strlora.moe.experts import Experts
from strlora.moe.layer import MoELinear, TwoStageRouter, released
from strlora.moe.signal import Context, Penalties, pool_instruction
from strlora.moe.token_router import TokenRouter
from strlora.moe.two_groups import FusedExperts, TwoGroupRouter

FOLDERS = [Path(__file__).parent / "oracle", *(Path(f) for f in [os.environ.get("STRLORA_ORACLE_DIR")] if f)]
FILES = sorted({f.resolve() for folder in FOLDERS for f in folder.glob("*.npz")}, key=lambda f: (f.stem, f))
NAMES = {"text_router": "text_router", "wq": "query", "wk": "key", "proto": "prototypes", "sub_router": "token_router"}


def kind(keys) -> str:
    "What layer a file describes, by its keys."
    if "w/text_router" in keys: return "strlora"
    if "w/token_router" in keys: return "moelora"
    if "w/vu_gate" in keys: return "smolora"
    return "unknown"


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file: return {k: file[k] for k in file}


def every_file(name: str):
    "A case for each file of a kind."
    files = [f for f in FILES if kind(load(f)) == name]
    return pytest.mark.parametrize("path", files, ids=lambda p: p.stem)


def settings_of(a: dict[str, np.ndarray]) -> dict[str, float]:
    return {k[4:]: v.item() for k, v in a.items() if k.startswith("cfg/")}


def build(a: dict[str, np.ndarray], dtype=torch.float32) -> tuple[MoELinear, torch.Tensor, Context]:
    "The layer, its input and its context as a file describes them."
    t = lambda key: torch.tensor(a[key], dtype=dtype)
    cfg = settings_of(a)
    x, e = t("in/x").requires_grad_(), cfg["experts"]
    router = TwoStageRouter(x.shape[-1], a["in/text_embeds"].shape[-1], e, **released(
        top_k=cfg["topk"], sub_top_k=cfg["subtopk"], attention_dim=cfg["attn_proj_dim"], temperature=cfg["tau"],
        ema_decay=cfg["beta"], regularize=cfg["lambda"] > 0)).to(dtype)
    base = torch.nn.Linear(x.shape[-1], a["w/base"].shape[0], bias=False, dtype=dtype)
    layer = MoELinear(base, Experts(x.shape[-1], a["w/base"].shape[0], e, cfg["rank_total"], cfg["alpha"]).to(dtype), router)
    with torch.no_grad():
        base.weight.copy_(t("w/base"))
        layer.experts.A.copy_(t("w/lora_A"))
        layer.experts.B.copy_(t("w/lora_B"))
        for theirs, ours in NAMES.items():
            if hasattr(router, ours): getattr(router, ours).copy_(t(f"w/{theirs}"))
            if router.ema is not None and f"w/{theirs}_ema" in a and ours in router.ema.names: router.ema[ours].copy_(t(f"w/{theirs}_ema"))
    text = t("in/text_embeds")
    instruction = pool_instruction(text, torch.ones(text.shape[:2]))
    return layer, x, Context(instruction, torch.ones(x.shape[:2], dtype=torch.bool), penalties=Penalties())


def close(found: torch.Tensor, expected: np.ndarray, bound: float, what: str, relative: bool = False) -> None:
    found, expected = found.detach().double(), torch.as_tensor(np.asarray(expected)).double()
    assert found.shape == expected.shape, what
    gap = (found - expected).abs().max().item()
    if relative: gap /= max(expected.abs().max().item(), 1e-12)
    assert gap <= bound, f"{what}: off by {gap:.2e}, allowed {bound:.0e}"


def parameters(layer: MoELinear, a: dict[str, np.ndarray], prefix: str) -> dict[str, torch.nn.Parameter]:
    "Our parameter for each array under a prefix."
    own = {"lora_A": layer.experts.A, "lora_B": layer.experts.B}
    own |= {theirs: getattr(layer.router, ours) for theirs, ours in NAMES.items() if hasattr(layer.router, ours)}
    return {k[len(prefix):]: own[k[len(prefix):]] for k in a if k.startswith(prefix) and k[len(prefix):] in own}


def check_gradients(layer, x, loss, a, prefix, skip_router) -> None:
    "Gradients of one loss alone, name by name; a name without gradient there has none here."
    none = set(a[f"{prefix}none"].tolist())
    own = parameters(layer, a, prefix)
    trained = {n: p for n, p in own.items() if p.requires_grad}
    grads = torch.autograd.grad(loss, [x, *trained.values()], retain_graph=True, allow_unused=True)
    grads = dict(zip(["x", *trained], grads))
    for name in own:
        if name in none:
            assert name not in trained or grads[name] is None or not grads[name].any(), f"{prefix}{name} should have no gradient"
        elif not (skip_router and name not in ("lora_A", "lora_B")):
            close(grads[name], a[prefix + name], 1e-4, prefix + name, relative=True)
    if f"{prefix}x" in a and not skip_router: close(grads["x"], a[f"{prefix}x"], 1e-4, f"{prefix}x", relative=True)
    elif f"{prefix}x" not in a: assert grads["x"] is None or not grads["x"].any(), f"{prefix}x should have no gradient"


def test_files_are_here_and_each_has_a_test():
    assert {kind(load(f)) for f in FILES} == {"strlora", "moelora", "smolora"}


@every_file("strlora")
def test_released_reproduces(path):
    a = load(path)
    layer, x, context = build(a)
    skip_router = path.stem.endswith(("_onetoken", "_onesample"))
    assert layer.router.frozen_names == ({"text_router"} if a["cfg/subtopk"] > 0 else frozenset())

    routing = layer.router(x, context)
    y = layer(x, context)
    close(y, a["out/y"], 1e-5, "out/y")
    close(layer.base(x), a["out/base_only"], 1e-5, "out/base_only")
    close(context.instruction, a["mid/text_vec"], 1e-6, "mid/text_vec")
    if "mid/final_weights" in a: close(routing.weights, a["mid/final_weights"], 1e-5, "mid/final_weights")
    if a["cfg/subtopk"] == 0: close(routing.weights[:, 0], a["mid/stage1_weights"], 1e-5, "mid/stage1_weights")
    if "mid/expert_mask" in a: close(routing.selected[:, None].expand_as(routing.weights), a["mid/expert_mask"], 0, "mid/expert_mask")

    check_gradients(layer, x, (y * torch.tensor(a["in/grad_out"])).sum(), a, "grad_lm/", skip_router)
    if "out/kl_loss" in a:
        close(routing.kl, a["mid/kl_per_token"], 2e-6, "mid/kl_per_token")
        loss = float(a["cfg/lambda"]) * context.penalties.mean()["kl"]
        close(loss, a["out/kl_loss"], 1e-6, "out/kl_loss")
        check_gradients(layer, x, loss, a, "grad_kl/", skip_router)
    if layer.router.ema is not None:
        layer.router.update_ema()
        for key in (k for k in a if k.startswith("ema_after/")):
            close(layer.router.ema[NAMES[key.split("/")[1]]], a[key], 1e-6, key)


# ---------------------------------------------------------------- the baselines


def baseline(a: dict[str, np.ndarray], experts: Experts, router: torch.nn.Module) -> tuple[MoELinear, torch.Tensor, dict]:
    "The layer, its input, and for each array of weights our parameter and the rows of it."
    t = lambda key: torch.tensor(a[key])
    base = torch.nn.Linear(a["w/base"].shape[1], a["w/base"].shape[0], bias=False)
    layer, whole = MoELinear(base, experts, router), slice(None)
    own = {"base": (base.weight, whole), "lora_A": (experts.A, whole), "lora_B": (experts.B, whole)}
    if isinstance(router, TokenRouter): own |= {"token_router": (router.token_router, whole)}
    else: own |= {"vu_gate": (router.visual_gate, whole), "ins_gate": (router.instruction_gate, whole),
                  "fuse_vu": (experts.fuse, slice(0, 1)), "fuse_ins": (experts.fuse, slice(1, 2))}
    assert {k[2:] for k in a if k.startswith("w/")} == own.keys()
    with torch.no_grad():
        for name, (p, rows) in own.items(): p[rows] = t(f"w/{name}")
    return layer, t("in/x").requires_grad_(), own


def sizes(a: dict[str, np.ndarray]) -> tuple:
    "Widths, number of experts, total rank and alpha of a file."
    cfg = settings_of(a)
    return a["w/base"].shape[1], a["w/base"].shape[0], cfg["experts"], cfg["rank_total"], cfg["alpha"]


def moelora(a: dict[str, np.ndarray]):
    size, top_k = sizes(a), settings_of(a)["topk"]
    return *baseline(a, Experts(*size), TokenRouter(size[0], 0, size[2], top_k=top_k)), None


def smolora(a: dict[str, np.ndarray]):
    size, table = sizes(a), torch.tensor(a["in/ins_table"])
    router = TwoGroupRouter(size[0], table.shape[1], size[2], "frozen_hash", instruction_norm="none")
    prompt = torch.ones(a["in/x"].shape[:2], dtype=torch.bool)  # the official mean runs over all tokens
    return *baseline(a, FusedExperts(*size), router), Context(table[torch.tensor(a["in/ins_idx"])], prompt=prompt)


def check_baseline(a: dict[str, np.ndarray], layer: MoELinear, x: torch.Tensor, own: dict, context: Context | None) -> None:
    "Output and every gradient; what has none in the file is declared frozen here."
    y = layer(x, context)
    close(y, a["out/y"], 1e-5, "out/y")
    (y * torch.tensor(a["in/grad_out"])).sum().backward()
    none = set(a["grad_lm/none"].tolist()) if "grad_lm/none" in a else set()
    given = {k[8:] for k in a if k.startswith("grad_lm/")} - none - {"none", "x"}
    assert given | none | {"base"} == own.keys()
    frozen = {n for n, p in layer.router.named_parameters() if not p.requires_grad}
    assert frozen == layer.router.frozen_names and len(frozen) == len(none)
    for name in none: assert own[name][0].grad is None, f"{name} should have no gradient"
    for name in given: close(own[name][0].grad[own[name][1]], a[f"grad_lm/{name}"], 1e-4, name, relative=True)
    close(x.grad, a["grad_lm/x"], 1e-4, "x", relative=True)


@every_file("moelora")
def test_moelora_reproduces(path):
    a = load(path)
    check_baseline(a, *moelora(a))


@every_file("smolora")
def test_smolora_reproduces(path):
    a = load(path)
    layer, x, own, context = smolora(a)
    selected = layer.router(x, context).selected.unflatten(1, (2, -1)).int()
    close(selected.argmax(-1), np.stack([a["mid/vu_expert"], a["mid/ins_expert"]], 1), 0, "chosen experts")
    check_baseline(a, layer, x, own, context)


def by_formula(a: dict[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    "MoELoRA with the `k` best probabilities kept as they are: output and gradients in float64, expert by expert."
    names = ["in/x", *(n for n in a if n.startswith("w/"))]
    v = {n.split("/")[1]: torch.tensor(a[n], dtype=torch.float64, requires_grad=n != "w/base") for n in names}
    logits = torch.einsum("btd,ed->bte", v["x"], v["token_router"])
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    y, scale = v["x"] @ v["base"].T, a["cfg/alpha"].item() / a["cfg/rank_total"].item()
    for e in range(p.shape[-1]):
        kept = (p > p[..., e:e + 1]).sum(-1) < k
        y = y + (kept * p[..., e])[..., None] * scale * (v["x"] @ v["lora_A"][e].T @ v["lora_B"][e].T)
    (y * torch.tensor(a["in/grad_out"])).sum().backward()
    return {"out/y": y.detach().numpy()} | {f"grad_lm/{n}": t.grad.numpy() for n, t in v.items() if n != "base"}


@pytest.mark.parametrize("k", [4, 3, 2, 1])
def test_moelora_with_a_cut_is_the_formula(k):
    "The formula gives the official arrays where nothing is cut, and ours where something is."
    a = next(load(f) for f in FILES if f.stem == "moelora_dense")
    made = by_formula(a, k)
    if k == 4:
        for name, value in made.items(): close(torch.tensor(value), a[name], 1e-5 if name == "out/y" else 1e-4, name, relative=name != "out/y")
    cut = a | made | {"cfg/topk": np.array(k)}
    check_baseline(cut, *moelora(cut))
