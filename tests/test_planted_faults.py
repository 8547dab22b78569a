"Each check fails where it must: faults of published implementations, and one for every other check, are planted and caught."
import dataclasses

import pytest
import torch
from torch import nn

from strlora.checks import CHECKS
from strlora.core import sourced
from strlora.methods.base import AdapterSettings, Method, Part, single_expert
from strlora.moe.experts import Routing
from strlora.moe.layer import BLIND, ROUTERS, TwoStageRouter
from strlora.moe.signal import prompt_mean
from strlora.trial import Bench, Failed, known


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("base"))


@dataclasses.dataclass(frozen=True)
class Weighed(AdapterSettings):
    weight: float = sourced(1.0, "made up", "of the penalty")


# ---------------------------------------------------------------- routers

class Scores(nn.Module):
    "One score an expert from the instruction."
    frozen_names, reads_instruction = frozenset(), True

    def __init__(self, d_in, d_text, experts, **_):
        super().__init__()
        self.score = nn.Parameter(torch.randn(experts, d_text))

    def weights(self, hidden, context): return (context.instruction @ self.score.T).softmax(-1)[:, None]

    def forward(self, hidden, context):
        weights = self.weights(hidden, context).expand(len(hidden), hidden.shape[1], -1)
        return Routing(weights, torch.ones(len(hidden), weights.shape[-1], dtype=torch.bool))

    def update_ema(self): "Nothing to update."


class OneHot(Scores):
    "Hard gates without a way back for the gradient."
    def weights(self, hidden, context): return nn.functional.one_hot(super().weights(hidden, context).argmax(-1), len(self.score)).float()


class MaskOnly(TwoStageRouter):
    "Stage 1 as the released code has it, but declared trainable."
    def __init__(self, d_in, d_text, experts, **_):
        super().__init__(d_in, d_text, experts, stage1="frozen", regularize=False)
        self.frozen_names = frozenset()
        self.text_router.requires_grad_(True)


class OfTheBatch(Scores):
    "One decision for all samples."
    def weights(self, hidden, context): return super().weights(hidden, context).mean(0, keepdim=True)


class OfAllTokens(Scores):
    "Decides by the mean of the tokens it happens to see, answer and padding included."
    def weights(self, hidden, context): return (40 * hidden.mean(1) @ self.score[:, :1].expand(-1, hidden.shape[-1]).T).softmax(-1)[:, None]


class AgainEachStep(Scores):
    "Decides by the prompt, but while decoding by the token at hand."
    def weights(self, hidden, context):
        seen = hidden.mean(1) if context.prompt is None else prompt_mean(hidden, context.prompt)
        return (40 * seen @ self.score[:, :1].expand(-1, hidden.shape[-1]).T).softmax(-1)[:, None]


class Forgetful(Scores):
    "Keeps a number that is neither parameter nor buffer."
    def __init__(self, d_in, d_text, experts, **_):
        super().__init__(d_in, d_text, experts)
        self.offset = 1000 * torch.randn(experts)

    def weights(self, hidden, context): return (context.instruction @ self.score.T + self.offset).softmax(-1)[:, None]


MADE_UP = {"scores": Scores, "one_hot": OneHot, "mask_only": MaskOnly, "of_the_batch": OfTheBatch, "of_all_tokens": OfAllTokens,
           "again_each_step": AgainEachStep, "forgetful": Forgetful}


@pytest.fixture(scope="module", autouse=True)
def made_up_routers():
    ROUTERS.update(MADE_UP)
    yield
    for name in MADE_UP: del ROUTERS[name]
    assert "constant" in BLIND


def routed(router):
    def adapter(settings):
        import strlora
        return strlora.StrLoraConfig(r=settings.r, router=router, kl_weight=0.0, lora_dropout=settings.lora_dropout, task_type="CAUSAL_LM")
    return adapter


# ---------------------------------------------------------------- parts

class Pull(Part):
    "A pull to the weights at the end of the chunk before, EWC with a Fisher of ones."
    def __init__(self, weight): self.weight, self.anchor = weight, {}

    def chunk_end(self, run): self.anchor = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}

    def weights(self, run): return {n: p for n, p in run.model.named_parameters() if n in self.anchor}

    def loss(self, run, batch, out):
        if not self.anchor: return {}
        return {"pull": self.weight * sum(((p - self.anchor[n]) ** 2).sum() for n, p in self.weights(run).items())}

    def state_dict(self): return {"anchor": self.anchor}

    def load_state_dict(self, state): self.anchor = dict(state["anchor"])


class Growing(Pull):
    "Keeps the anchors of all chunks."
    def __init__(self, weight):
        super().__init__(weight)
        self.all = []

    def chunk_end(self, run):
        super().chunk_end(run)
        self.all.append(self.anchor)

    def state_dict(self): return {"anchor": self.anchor, "all": self.all}

    def load_state_dict(self, state): self.anchor, self.all = dict(state["anchor"]), list(state["all"])


class Detached(Growing):
    "The penalty has its value and no gradient."
    def weights(self, run): return {n: p.detach() for n, p in super().weights(run).items()}


class Unsaved(Pull):
    "Forgets its anchor in a crash."
    def state_dict(self): return {}

    def load_state_dict(self, state): "Nothing was saved."


class MovesTheBase(Part):
    def after_step(self, run):
        with torch.no_grad(): run.model.get_input_embeddings().weight.add_(1e-6)


class HooksTheBase(Part):
    def stream_start(self, run): run.model.get_base_model().lm_head.register_forward_hook(lambda module, args, out: out + out.abs())


class Told(Pull):
    "A penalty that knows how many tasks a chunk has."
    def loss(self, run, batch, out):
        found = super().loss(run, batch, out)
        return {name: term * len({sample.task for sample in run.samples}) for name, term in found.items()}


class Numbered(Part):
    "Fewer numbers learn where the first task of a chunk came late."
    def __init__(self): self.names = []

    def chunk_start(self, run): self.names = list(dict.fromkeys([*self.names, *(s.task for s in run.samples)]))

    def after_backward(self, run):
        late = self.names.index(run.samples[0].task)
        for p in run.model.parameters():
            if p.grad is not None: p.grad[..., : 1 + late].zero_()


class Curious(Part):
    "Learns from whatever it is asked."
    def stream_start(self, run):
        def look(module, args, out):
            if not module.training: next(p for p in run.model.parameters() if p.requires_grad).data.mul_(1.001)
        run.model.get_base_model().lm_head.register_forward_hook(look)


def pulled(part, **more):
    return Method("planted", "a fault", Weighed, adapter=single_expert, penalty=lambda s: part(s.weight), weights=("settings.weight",), **more)


def updated(part): return Method("planted", "a fault", AdapterSettings, adapter=single_expert, update=lambda s: part())


def routing(router): return Method("planted", "a fault", AdapterSettings, adapter=routed(router))


FAULTS = {
    "a detached penalty": (pulled(Detached), "penalties act", "the same at every step"),
    "a penalty whose weight has no name": (dataclasses.replace(pulled(Pull), weights=()), "penalties act", "Name them"),
    "one-hot gates without gradient": (routing("one_hot"), "routers learn", "score"),
    "a mask-only stage 1, declared trainable": (routing("mask_only"), "routers learn", "text_router"),
    "one routing for a batch": (routing("of_the_batch"), "samples are alone", "in a batch"),
    "a routing that reads the answer": (routing("of_all_tokens"), "routing holds", "with the answer behind it"),
    "a routing that decoding decides anew": (routing("again_each_step"), "routing holds", "in generation"),
    "a base that moves": (updated(MovesTheBase), "the base stays", "embed_tokens"),
    "a base with a hook": (updated(HooksTheBase), "the adapter goes", "base model's logits"),
    "a number that is not saved": (routing("forgetful"), "saving keeps", "buffers"),
    "an anchor that is not saved": (pulled(Unsaved), "a crash is nothing", "resumed"),
    "a copy of its neighbour": (Method("planted", "a fault", AdapterSettings, adapter=single_expert), "it is itself", "than lora"),
    "a penalty that counts tasks": (pulled(Told), "names are not read", "true names"),
    "steps by the number of a task": (updated(Numbered), "names are not read", "true names"),
    "a learner from questions": (updated(Curious), "questions teach nothing", "moved"),
    "a memory without bound": (pulled(Growing), "memory is bounded", "after chunk 4"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(bench, fault):
    method, check, words = FAULTS[fault]
    method = dataclasses.replace(method, name=f"planted_{list(FAULTS).index(fault)}")
    with known(method), pytest.raises(Failed, match=words): CHECKS[check](bench, method.name)


def test_every_check_has_a_fault():
    assert {check for _, check, _ in FAULTS.values()} == set(CHECKS)


@pytest.mark.parametrize("method", [pulled(Pull), routing("scores")], ids=["pull", "scores"])
@pytest.mark.parametrize("check", CHECKS)
def test_the_same_without_the_fault_passes(bench, method, check):
    method = dataclasses.replace(method, name=f"sound_{'pull' if method.penalty else 'scores'}")
    with known(method): assert CHECKS[check](bench, method.name) in ("", "brings no penalty", "trains no router")


def test_growth_may_be_declared(bench):
    with known(dataclasses.replace(pulled(Growing, grows="by one anchor a chunk"), name="grows")):
        assert "one anchor" in CHECKS["memory is bounded"](bench, "grows")
