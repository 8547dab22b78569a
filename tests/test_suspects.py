"Switches of StrLoRA that take one suspect away: what each leaves alone, what it refuses, and that a crash is nothing to it."
from types import SimpleNamespace

import pytest
import torch
from small import check_resumed, make_base, session, short_spec

from strlora.core import SpecError
from strlora.methods.prototypes import PrototypeSettings
from strlora.methods.strlora import StrLoraSettings
from strlora.methods.suspects import FreezeExperts, SteadyKinds, Together, Told, read_by, stage1_of, together
from strlora.methods.base import Part
from strlora.objective import with_features
from strlora.trainer import Watcher

METHOD = ("method=strlora", "r=32", "num_experts=32", "stream.chunks=4", "chunk_size=24", "lr=1e-2", "lr_later=1e-2")
TOLD = "oracle_task_id=true"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


class Chunks(Watcher):
    "Experts and text routers as each chunk leaves them."
    def __init__(self): self.left = []

    def chunk_trained(self, run):
        kept = lambda part: {n: p.detach().clone() for n, p in run.model.named_parameters() if part in n}
        self.left.append((kept(".strlora_experts."), kept("text_router")))


def fitted(base, *pairs):
    job, watcher = session(base, *METHOD, *pairs), Chunks()
    job.trainer.fit(job.seen, watcher)
    return job, watcher.left


def same(a, b): return {name for name in a if torch.equal(a[name], b[name])}


def test_a_told_stage_sends_each_task_to_experts_of_its_own(base):
    job, left = fitted(base, TOLD)
    names, routers = job.trainer.parts["update"].names, stage1_of(job.model)
    assert len(names) > 3 and all(not p.requires_grad for r in routers.values() for n, p in r.named_parameters() if n == "text_router")
    for chunk in job.seen.chunks:
        for router in routers.values():
            z = read_by(router, job.trainer.instructions(chunk.samples)) @ router.text_router.T
            owners = z.topk(2).indices.sort(-1).values
            assert (owners == torch.tensor([[2 * names.index(s.task) + i for i in (0, 1)] for s in chunk.samples])).all()
    assert not same(left[0][1], left[-1][1]), "told anew in each chunk"


@pytest.mark.parametrize("method", ["strlora_released", "strlora_no_reg", "strlora_frozen"])
def test_other_presets_can_be_told(base, method):
    job = session(base, f"method={method}", *METHOD[1:], TOLD)
    job.trainer.fit(job.seen)
    router = next(iter(stage1_of(job.model).values()))
    assert router.text_router.abs().sum(1).count_nonzero() == 2 * len(job.trainer.parts["update"].parts["told"].names
                                                                     if method == "strlora_released" else job.trainer.parts["update"].names)


def test_layers_select_what_was_told(base):
    job = session(base, *METHOD, TOLD)
    job.trainer.fit(job.seen)
    names, samples = job.trainer.parts["update"].names, job.seen.chunks[-1].samples
    job.model.eval()
    with torch.no_grad(), job.model.base_model.record_routing() as records: job.model(**with_features(job.trainer.batch(samples)), use_cache=False)
    places = torch.tensor([names.index(s.task) for s in samples])
    for _, _, routing in records:
        assert (routing.selected.nonzero()[:, 1].view(-1, 2) == 2 * places[:, None] + torch.arange(2)).all()
    assert records


def test_what_was_told_is_moved_with_the_run(base):
    "A checkpoint is read on the CPU, wherever the run is."
    part = Told(32, 2)
    part.load_state_dict({"names": ["a"], "xx": torch.eye(4), "yx": torch.zeros(16, 4)})
    part.stream_start(SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("meta"))))
    assert part.xx.device.type == part.yx.device.type == "meta"


def test_an_expert_without_a_sample_stays_where_steps_are_lazy(base):
    pairs = ("optimizer_state=carry", "weight_decay=0.5", TOLD)
    for lazy in (True, False):
        left = fitted(base, *pairs, f"lazy={str(lazy).lower()}")[1]
        before, after = left[0][0], left[1][0]
        still = torch.stack([(after[n] == before[n]).flatten(1).all(1) for n in after if after[n].shape[0] == 32]).all(0)
        assert bool(still.any()) == lazy


def test_too_few_experts_to_tell_apart_are_an_error(base):
    job = session(base, *METHOD, "num_experts=4", "r=32", TOLD)
    with pytest.raises(SpecError, match="num_experts"): job.trainer.fit(job.seen)


@pytest.mark.parametrize("pair", ["freeze_experts_from_chunk=3", "freeze_from_chunk=3"])
def test_what_is_frozen_stays_and_the_rest_learns(base, pair):
    left = fitted(base, pair)[1]
    still, moves = (0, 1) if "experts" in pair else (1, 0)
    assert not same(left[0][still], left[1][still]), "it learned before"
    assert same(left[1][still], left[3][still]) == set(left[1][still]) and not same(left[1][moves], left[3][moves])


def test_experts_are_frozen_from_the_first_chunk_where_that_is_asked(base):
    job = session(base, *METHOD, "freeze_experts_from_chunk=1", "stream.chunks=1")
    before = {n: p.detach().clone() for n, p in job.model.named_parameters() if ".strlora_experts." in n}
    job.trainer.fit(job.seen)
    assert before and all(torch.equal(p, before[n]) for n, p in job.model.named_parameters() if n in before)


def test_the_penalty_on_kinds_keeps_stage_1_where_it_was(base):
    "With a large weight stage 1 says of kinds that are away what it said before; without, it does not."
    away = {}
    for weight in (0.0, 300.0):
        job = session(base, *METHOD, "kl_weight=0.0", f"kind_weight={weight}", "stream.chunks=2", "num_experts=4")
        watch, parts = SteadyKinds(1.0), job.trainer.parts
        if weight: watch = parts["penalty"]
        else: parts["watch"] = watch
        watch.loss, term = (watch.loss if weight else lambda *_: {}), watch.loss
        job.trainer.fit(job.seen)
        router = stage1_of(job.model)
        changes = [(said.exp() * (said - watch.says(router[name]))).sum(-1)[~watch.here & watch.met] for name, said in watch.said.items()]
        away[weight] = torch.cat(changes).mean().item()
        assert term(job.trainer, {}, None)["kinds"].isfinite()
    assert 0 <= away[300.0] < 0.2 * away[0.0]


def test_settings_that_contradict_each_other_are_refused():
    for wrong in (dict(oracle_task_id=True, kind_weight=1.0), dict(oracle_task_id=True, top_k=None), dict(kind_weight=-1.0),
                  dict(oracle_task_id=True, sub_top_k=0), dict(kind_weight=1.0, stage1="frozen"), dict(freeze_experts_from_chunk=-1)):
        with pytest.raises(SpecError): StrLoraSettings(**wrong)
    for wrong in (dict(hold_decay=1.5), dict(hold_decay=-0.1)):
        with pytest.raises(SpecError, match="hold_decay"): PrototypeSettings(**wrong)


def test_parts_together_are_called_in_order_and_one_stays_itself():
    calls = []

    class Says(Part):
        def __init__(self, name): self.name, self.keeps = name, name
        def after_backward(self, run): calls.append(self.name)
        def loss(self, run, batch, out): return {self.name: 1}
        def state_dict(self): return {"of": self.name}
        def load_state_dict(self, state): calls.append(state["of"])

    both = together(a=Says("a"), none=None, b=Says("b"))
    both.after_backward(None)
    both.load_state_dict(both.state_dict())
    assert calls == ["a", "b", "a", "b"] and both.loss(None, {}, None) == {"a": 1, "b": 1} and both.keeps == "a; b"
    alone = FreezeExperts(3)
    assert together() is None and together(x=None, only=alone) is alone and isinstance(both, Together)


@pytest.mark.parametrize("pairs", [(TOLD, "lazy=true"), ("kind_weight=0.5", "lazy=true", "freeze_experts_from_chunk=3"),
                                   ("method=strlora_prototypes", "shared=16", "hold_by=samples", "hold_decay=0.5"),
                                   ("method=strlora_prototypes", "shared=16", "hold_by=level")])
def test_interrupted_and_resumed_is_uninterrupted(base, tmp_path, monkeypatch, pairs):
    spec = short_spec(base, *METHOD[:3], *pairs)
    check_resumed(spec, tmp_path, monkeypatch, "instructions.seen.means" if "method=strlora_prototypes" in pairs else "text_router")
