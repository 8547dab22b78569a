"Pseudo-tasks and BranchLoRA: clusters, trunk and branches, routers of pseudo-tasks, keys, freezing."
import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from small import check_resumed, make_base, session, short_spec
from tiny import batch, gemma3, internvl, stir

from strlora import checkpoint
from strlora.core import SignalError, SpecError
from strlora.methods.branchlora import BranchLoraSettings, branchlora_adapter, keys_of, routed
from strlora.moe.branch import BranchExperts, BranchRouter, Held, count_usage, freeze_most_used
from strlora.moe.experts import Experts
from strlora.moe.pseudo import PseudoTasks
from strlora.tuner.state import layers_of

SETTINGS = BranchLoraSettings(r=8, lora_alpha=16, max_tasks=4)


def planted(n=60, clusters=3, noise=0.2, seed=0, width=32):
    "Vectors of planted clusters round a common vector, and which cluster each is of."
    g = torch.Generator().manual_seed(seed)
    common, directions = 5 * torch.randn(width, generator=g), torch.randn(clusters, width, generator=g)
    truth = torch.arange(n) % clusters
    return common, common + directions[truth] + noise * torch.randn(n, width, generator=g), truth


def service(common, **settings):
    made = PseudoTasks(len(common), **{"threshold": 0.6, **settings})
    made.centre_on(common)
    return made


def wrapped(base=internvl, settings=SETTINGS, tasks=2):
    "A model with random branches, routers and keys, as after some training, and pseudo-tasks of the instructions of its batch."
    model = stir(get_peft_model(base(), branchlora_adapter(settings))).eval()
    keys, given = keys_of(model), batch(model)
    embedded = model.get_input_embeddings()(given["input_ids"])
    vectors = torch.stack([e[m].mean(0) for e, m in zip(embedded, given["instruction_mask"])])
    keys.tasks.centre_on(model.get_input_embeddings().weight.mean(0))
    keys.tasks.observe(vectors, torch.arange(2) % tasks)
    keys.open(0, tasks)
    g = torch.Generator().manual_seed(3)
    for _, _, router, own in routed(model):
        if own: router.weight.data = torch.randn(router.weight.shape, generator=g)
    if keys.image is not None: keys.image.data = torch.randn(keys.image.shape, generator=g)
    return model, given


def prompt(given): return {k: v for k, v in given.items() if k != "labels"}


def logits(model, given, **more):
    with torch.no_grad(): return model(**prompt(given), **more).logits


@pytest.fixture(scope="module")
def base(tmp_path_factory): return make_base(tmp_path_factory.mktemp("base"))


# ---------------------------------------------------------------- pseudo-tasks

def test_planted_clusters_are_found_and_stay():
    common, vectors, truth = planted()
    tasks = service(common)
    for part in vectors.split(7): tasks.observe(part)
    found = tasks.assign(vectors)
    assert tasks.number == 3 and len({(a, b) for a, b in zip(truth.tolist(), found.tolist())}) == 3
    assert tasks.counts[:3].tolist() == [20, 20, 20]
    units = tasks.unit(vectors)
    for j in range(3): torch.testing.assert_close(tasks.means[j], units[found == j].mean(0))


def test_order_within_a_batch_does_not_matter_and_between_batches_it_does():
    common, vectors, _ = planted(noise=1.0)
    one, other, late = service(common), service(common), service(common)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(one.observe(vectors)[order], other.observe(vectors[order]))
    assert torch.equal(one.means, other.means) and torch.equal(one.counts, other.counts)
    for part in vectors.flip(0).split(10): late.observe(part)
    assert not torch.equal(one.means, late.means)


def test_no_more_than_the_limit_and_a_state_of_one_size():
    common, vectors, _ = planted(n=64, clusters=16, noise=0.1)
    tasks = service(common, limit=5)
    size = sum(b.numel() for b in tasks.buffers())
    for part in vectors.split(8): tasks.observe(part)
    assert tasks.number == 5 and tasks.counts.sum() == 64 and tasks.assign(vectors).max() < 5
    assert sum(b.numel() for b in tasks.buffers()) == size


def test_assigning_only_reads_and_looks_at_one_row():
    common, vectors, _ = planted(noise=1.0)
    tasks = service(common)
    tasks.observe(vectors)
    before = {n: b.clone() for n, b in tasks.named_buffers()}
    together = tasks.assign(vectors)
    assert together.tolist() == [int(tasks.assign(v[None])) for v in vectors]
    assert all(torch.equal(b, before[n]) for n, b in tasks.named_buffers())


def test_clusters_go_on_after_a_checkpoint(tmp_path):
    common, vectors, _ = planted(noise=1.0)
    one, other = service(common), PseudoTasks(32, threshold=0.6)
    one.observe(vectors[:30])
    checkpoint.save(tmp_path/"state", torch.nn.Linear(1, 1), {"tasks": dict(one.state_dict())}, {})
    other.load_state_dict(checkpoint.load(tmp_path/"state")[1]["tasks"])
    assert torch.equal(one.observe(vectors[30:]), other.observe(vectors[30:])) and torch.equal(one.means, other.means)


# ---------------------------------------------------------------- trunk, branches, routers

@pytest.mark.parametrize("shape", [(4,), (3, 1, 4), (3, 5, 4)])
def test_branches_are_the_explicit_sum(shape):
    torch.manual_seed(0)
    bank, x, w = BranchExperts(12, 10, 4, 8, 16), torch.randn(3, 5, 12), torch.rand(shape)
    torch.nn.init.normal_(bank.B)
    explicit = 2 * sum(w[..., j, None] * (x @ bank.A[0].T @ bank.B[j].T) for j in range(4))
    torch.testing.assert_close(bank(x, w), explicit)
    assert bank.A.shape == (1, 2, 12) and bank.B.shape == (4, 10, 2)


def test_one_branch_is_lora_and_equal_branches_are_one():
    torch.manual_seed(0)
    lora, bank, x = Experts(12, 10, 1, 4, 8), BranchExperts(12, 10, 1, 4, 8), torch.randn(3, 5, 12)
    torch.nn.init.normal_(lora.B)
    bank.load_state_dict(lora.state_dict())
    torch.testing.assert_close(bank(x, torch.ones(1)), lora(x, torch.ones(1)))
    four = BranchExperts(12, 10, 4, 16, 32)
    four.load_state_dict({"A": lora.A, "B": lora.B.repeat(4, 1, 1)})
    torch.testing.assert_close(four(x, torch.full((4,), 0.25)), lora(x, torch.ones(1)))


def test_used_routers_learn_and_others_do_not():
    model, given = wrapped(tasks=2)
    model.train()(**given, task_numbers=torch.tensor([1, 3])).loss.backward()
    for _, bank, router, own in routed(model):
        used = router.weight.grad.flatten(1).any(1)
        assert own and used.tolist() == [False, True, False, True] and bank.A.grad.any()
    keys = keys_of(model)
    assert keys.text.grad.flatten(1).any(1).tolist() == keys.image.grad.flatten(1).any(1).tolist() == [False, True, False, True]
    assert sum("keys.text" in n for n in model.state_dict()) == 1


def test_a_new_router_starts_as_the_one_before_it():
    router = BranchRouter(6, 8, experts=3, tasks=5)
    torch.nn.init.normal_(router.weight)
    before = router.weight.detach().clone()
    router.open(2, 4)
    assert torch.equal(router.weight[2], before[1]) and torch.equal(router.weight[3], before[1])
    assert torch.equal(router.weight[[0, 1, 4]], before[[0, 1, 4]])


@pytest.mark.parametrize("base", [internvl, gemma3], ids=["internvl", "gemma3"])
def test_key_of_the_nearest_cluster_in_training_the_most_similar_otherwise(base):
    model, given = wrapped(base)
    keys, seen = keys_of(model), []
    with model.base_model.record_routing() as records: logits(model, given)
    assert all(r.task.tolist() == [0, 1] for _, _, r in records) and len(records) == len(layers_of(model))
    keys.text.data = keys.text.data.flip(0).roll(2, 0)  # swap the keys of 0 and 1
    keys.image.data.zero_()
    for mode in (False, True):
        with model.train(mode).base_model.record_routing() as records: logits(model, given)
        seen.append(records[0][2].task.tolist())
    assert seen == [[1, 0], [0, 1]]
    given["pixel_values"] = given["pixel_values"].flip(0)
    keys.text.data.zero_()
    pictures = []
    keys.distance = lambda context, task: pictures.append(context.picture) or keys.text.sum() * task
    model.eval()(**given)
    assert pictures[0].shape == (2, 32) and pictures[0].any() and not torch.equal(*pictures[0])


# ---------------------------------------------------------------- whole samples

@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_cache_is_generation_without(beams):
    model, given = wrapped()
    how = dict(max_new_tokens=6, do_sample=False, num_beams=beams)
    ask = {k: (v[:, :15] if v.dim() == 2 else v) for k, v in prompt(given).items()}
    cached = model.generate(**ask, **how)
    assert torch.equal(cached, model.generate(**ask, **how, use_cache=False))
    with torch.no_grad(): again = model(**ask)
    assert beams > 1 or torch.equal(cached[:, 15], again.logits[:, -1].argmax(-1))


@pytest.mark.parametrize("left,right", [(3, 0), (0, 3)])
def test_neither_neighbours_nor_padding_change_a_sample(left, right):
    model, given = wrapped()
    for training in (False, True):
        model.train(training)
        together = logits(model, given)
        for i in range(2):
            one = {k: v[i:i + 1] for k, v in given.items()}
            torch.testing.assert_close(logits(model, one), together[i:i + 1], atol=1e-4, rtol=1e-4)
            padded = {k: torch.nn.functional.pad(v, (left, right)) if v.dim() == 2 else v for k, v in one.items()}
            found = logits(model, padded)[:, left:left + together.shape[1]]
            torch.testing.assert_close(found, together[i:i + 1], atol=1e-4, rtol=1e-4)


def test_without_the_prompt_there_is_no_first_token():
    model, given = wrapped()
    layer = layers_of(model)[0]
    with pytest.raises(SignalError, match="whole prompt"):
        router = layer.strlora_router["default"]
        from strlora.moe.signal import Context
        router(torch.randn(2, 5, 32), Context(torch.randn(2, 32)))
    with pytest.raises(SignalError, match="one a sample"): model(**given, task_numbers=torch.tensor([1]))


def test_saved_and_loaded_with_its_keys(tmp_path):
    model, given = wrapped()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(internvl(), tmp_path).eval()
    assert torch.equal(logits(model, given), logits(loaded, given))
    mine, other = keys_of(model), keys_of(loaded)
    assert other.tasks.number == 2 and all(torch.equal(v, other.state_dict()[k]) for k, v in mine.state_dict().items())
    assert len({id(router.keys) for _, _, router, _ in routed(loaded)}) == 1


def test_gradient_checkpointing_and_recorded_usage():
    model, given = wrapped()
    model.train()
    model.base_model.root.keeps = True

    def gradients():
        model.zero_grad()
        out = model(**given)
        out.loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), out.routing
    plain, records = gradients()
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    again, recorded = gradients()
    assert torch.equal(plain, again) and len(records) == len(recorded) == len(layers_of(model))
    used = count_usage(records[0][2].logits, records[0][2].task, torch.tensor([True, False]), 4)
    torch.testing.assert_close(used.sum(1), torch.tensor([1.0, 0, 0, 0]))


# ---------------------------------------------------------------- freezing, and over a stream

def test_the_most_used_branches_are_frozen_and_some_stay_free():
    owner = torch.full((5,), -1)
    usage = torch.tensor([[5.0, 1, 4, 0, 0], [0, 9, 0, 8, 7], [0, 0, 0, 0, 0]])
    freeze_most_used(owner, usage, k=2, min_tunable=2)
    assert owner.tolist() == [0, 1, -1, 1, -1]
    freeze_most_used(owner, usage, k=2, min_tunable=0)
    assert owner.tolist() == [0, 1, 0, 1, -1]


def test_held_rows_do_not_move_and_do_not_count_when_clipping():
    p, free = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p, free], lr=0.1, weight_decay=0.5)
    (p.sum() + free.sum()).backward()
    optimizer.step()  # momentum
    held, before = Held([(p, torch.tensor([True, True]))]), p.detach().clone()
    (1e6 * p.sum() + free.sum()).backward()
    held.drop_gradients()
    assert torch.nn.utils.clip_grad_norm_([p, free], 1e9) < 10
    optimizer.step()
    held.restore()
    assert torch.equal(p, before)


LEARN = ("method=branchlora", "max_tasks=6", "weight_decay=0.5", "lr=1e-2", "lr_later=1e-2", "optimizer_state=carry",
         "stream.chunks=4", "chunk_size=24")


def snapshot(job):
    "Everything trained, the owners of branches, and how many pseudo-tasks there are."
    part = job.trainer.parts["update"]
    state = {n: p.detach().clone() for n, p in job.model.named_parameters() if p.requires_grad}
    return state, {n: o.clone() for n, o in part.owner.items()}, part.present.clone(), keys_of(job.model).tasks.number


def test_over_a_stream_frozen_branches_and_absent_routers_stand_still_and_new_ones_are_copies(base):
    job = session(base, *LEARN)
    part, seen, opened = job.trainer.parts["update"], [], []
    start, end = part.chunk_start, part.chunk_end

    def begin(run):
        before, old = {n: r.weight.detach().clone() for n, _, r, _ in routed(run.model)}, keys_of(run.model).tasks.number
        start(run)
        opened.append(keys_of(run.model).tasks.number - old)
        for name, _, router, _ in routed(run.model):
            assert (router.weight[old:old + opened[-1]] == before[name][max(old - 1, 0)]).all()
        seen.append([snapshot(job)])
    part.chunk_start = begin
    part.chunk_end = lambda run: (end(run), seen[-1].append(snapshot(job)))
    job.trainer.fit(job.seen)
    frozen = still = moved = 0
    for (old, owner, present, number), (new, _, _, _) in seen:
        for name, value in old.items():
            rows = (value == new[name]).flatten(1).all(1) if value.dim() > 1 else None
            if name.endswith(".B"):
                fixed = next(o for n, o in owner.items() if f"{n}." in name) >= 0
                assert rows[fixed].all()
                frozen, moved = frozen + int(fixed.sum()), moved + int((~rows[~fixed]).sum())
            elif ".strlora_router." in name:
                assert rows[~present].all()
                still, moved = still + int((~present)[:number].sum()), moved + int((~rows[present]).sum())
            else: assert not rows.all()
    assert frozen and still and moved and opened[0] and sum(opened[1:])
    assert all((o < 0).sum() == 2 for o in part.owner.values()) and 2 < keys_of(job.model).tasks.number <= 6


@pytest.mark.parametrize("pairs", [
    pytest.param((), id="text"), pytest.param(("boundary=chunk",), id="chunk", marks=pytest.mark.slow),
    pytest.param(("oracle_task_id=true", "thaw_on_recur=true"), id="oracle", marks=pytest.mark.slow)])
def test_interrupted_and_resumed_is_uninterrupted(base, tmp_path, monkeypatch, pairs):
    spec = short_spec(base, "method=branchlora", "max_tasks=6", "optimizer_state=carry", *pairs)
    check_resumed(spec, tmp_path, monkeypatch, "keys.tasks.means")


@pytest.mark.parametrize("pair", ["boundary=chunk", "oracle_task_id=true"])
def test_tasks_from_outside(base, pair):
    job = session(base, "method=branchlora", "max_tasks=16", pair)
    part, seen = job.trainer.parts["update"], []
    true = part.loss

    def loss(run, given, out):
        seen.append((run.chunk, given["task_numbers"].tolist(), out.routing[0][2].task.tolist()))
        return true(run, given, out)
    part.loss = loss
    job.trainer.fit(job.seen)
    assert all(given == used for _, given, used in seen)
    tasks = {s.task for chunk in job.stream.chunks for s in chunk.samples}
    if pair.startswith("boundary"): assert all(set(given) == {chunk - 1} for chunk, given, _ in seen)
    else: assert set(part.names) == tasks and {z for _, given, _ in seen for z in given} == set(range(len(tasks)))
    assert "task_numbers" not in job.questions("proxy")[0].batch  # never in evaluation
    with pytest.raises(SpecError, match="one source"): BranchLoraSettings(oracle_task_id=True, boundary="chunk")


def test_the_penalty_reaches_keys_and_nothing_else(base):
    job = session(base, "method=branchlora", "max_tasks=4", "image_key=false")
    trainer, found = job.trainer, {}
    part = trainer.parts["penalty"]
    true = part.loss

    def loss(run, given, out):
        terms = true(run, given, out)
        grads = torch.autograd.grad(terms["align"], trainer.parameters, retain_graph=True, allow_unused=True)
        found["names"] = {n for (n, p), g in zip(((n, p) for n, p in job.model.named_parameters() if p.requires_grad), grads)
                          if g is not None and g.any()}
        return terms
    part.loss = loss
    trainer.fit(dataclasses.replace(job.seen, chunks=job.seen.chunks[:1]))
    assert {n.rpartition(".keys.")[2] for n in found["names"]} == {"text"} and len(found["names"]) == 1


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_every_trainable_parameter_of_branchlora_is_in_the_graph(weight):
    "Data-parallel training refuses a parameter that is declared trainable and reached by no gradient."
    from tiny import batch, internvl

    from peft import get_peft_model
    from strlora.methods.branchlora import BranchLoraSettings, branchlora_adapter
    config = branchlora_adapter(BranchLoraSettings(r=8, align_weight=weight))
    model = get_peft_model(internvl(), config).train()
    model(**batch(model)).loss.backward()
    keys = [n for n, p in model.named_parameters() if ".keys." in n and p.requires_grad]
    assert bool(keys) == (weight > 0)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
