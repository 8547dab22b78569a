"Prototypes of instructions, experts that move alone, and what holds the shared ones."
import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from small import check_resumed, make_base, session, short_spec
from test_tuner import plain, prompt
from tiny import batch, internvl, stir

import strlora
from strlora.core import RecordError, SignalError, SpecError
from strlora.methods.fisher import fisher_information
from strlora.backbones.collate import Collator
from strlora.methods.hold import shared_weights
from strlora.methods.prototypes import image_vectors
from strlora.moe import instruct
from strlora.moe.instruct import Instructions
from strlora.trainer import Watcher
from strlora.tuner.call import CALL
from strlora.tuner.config import StrLoraConfig
from strlora.tuner.root import instruction_of
from strlora.tuner.state import layers_of

METHOD = ("method=strlora_prototypes", "r=16", "num_experts=16", "shared=4", "stream.chunks=4", "chunk_size=24", "lr=1e-2", "lr_later=1e-2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def known(job): return layers_of(job.model)[0].strlora_router["default"].instructions


def banks(job): return {layer.name: layer.strlora_experts["default"] for layer in layers_of(job.model)}


@pytest.mark.parametrize("pairs", [(), ("optimizer_state=carry", "weight_decay=0.5", "sight=-1")], ids=["default", "carried"])
def test_experts_of_absent_prototypes_stand_still(base, pairs):
    job = session(base, *METHOD, *pairs)
    part, seen = job.trainer.parts["update"], []
    start, end = part.chunk_start, part.chunk_end

    def begin(run):
        start(run)
        found = known(job).recognise(run.instructions(run.samples), image_vectors(run, run.samples))
        used = layers_of(job.model)[0].strlora_router["default"].experts_of(found).unique().tolist()
        seen.append([used, {n: [p.detach().clone() for p in b.parameters()] for n, b in banks(job).items()}])

    part.chunk_start = begin
    part.chunk_end = lambda run: (end(run), seen[-1].append({n: [p.detach().clone() for p in b.parameters()] for n, b in banks(job).items()}))
    job.trainer.fit(job.seen)
    still = moved = 0
    for used, before, after in seen:
        for name in before:
            same = torch.stack([(a == b).flatten(1).all(1) for a, b in zip(before[name], after[name])]).all(0)
            for e in range(4, 16):
                assert bool(same[e]) == (e not in used), "an expert moves if and only if a sample of the chunk asks for it"
                still, moved = still + (e not in used), moved + (e in used)
            assert not same[:4].any()
    assert still and moved and known(job).seen.number > 2


def test_without_lazy_steps_absent_experts_drift(base):
    job = session(base, *METHOD, "lazy=false", "optimizer_state=carry", "weight_decay=0.5", "stream.chunks=1")
    before = {n: b.A.detach().clone() for n, b in banks(job).items()}
    job.trainer.fit(job.seen)
    assert all(not (before[n] == b.A).flatten(1).all(1).any() for n, b in banks(job).items())


def test_strength_is_the_fisher_where_weights_stand_still(base):
    job = session(base, *METHOD, "stream.chunks=1", "batch_size=1", "lr=0", "lr_later=0", "lora_dropout=0.0")
    run, hold = job.trainer, job.trainer.parts["penalty"]
    run.fit(job.seen)
    true = fisher_information(run, list(range(len(run.samples))))
    names = [n for n, _ in job.model.named_parameters() if ".strlora_experts." in n]
    expected = torch.cat([true[n][:4].flatten() for n in names])
    assert expected.any()
    torch.testing.assert_close(hold.fisher, expected, rtol=1e-3, atol=1e-6)


def test_springs_do_not_count_as_evidence(base):
    job = session(base, *METHOD, "stream.chunks=2", "batch_size=1", "lr=0", "lr_later=0", "lora_dropout=0.0", "hold_weight=1e4")
    run, hold = job.trainer, job.trainer.parts["penalty"]
    run.train_chunk(job.seen.chunks[0], Watcher())
    first = hold.fisher.clone()
    with torch.no_grad():
        for own in shared_weights(job.model, 4): own.add_(0.05 * torch.randn_like(own))
    run.chunk, run.step = 2, 0
    run.train_chunk(job.seen.chunks[1], Watcher())
    true = fisher_information(run, list(range(len(run.samples))))
    names = [n for n, _ in job.model.named_parameters() if ".strlora_experts." in n]
    torch.testing.assert_close(hold.fisher - first, torch.cat([true[n][:4].flatten() for n in names]), rtol=1e-2, atol=1e-5)


def test_the_pull_is_towards_the_anchor_and_reaches_shared_experts_only(base):
    job = session(base, *METHOD, "stream.chunks=2")
    run, hold = job.trainer, job.trainer.parts["penalty"]
    for chunk in range(2):                       # the anchor moves on with every chunk
        run.chunk, run.step = chunk + 1, 0
        run.train_chunk(job.seen.chunks[chunk], Watcher())
        assert torch.equal(hold.anchor, torch.cat([w.flatten() for w in shared_weights(job.model, 4)]))
    batch = run.batch(run.samples[:2])
    assert hold.loss(run, batch, None)["hold"] == 0, "at the anchor nothing pulls"
    with torch.no_grad():
        for own in shared_weights(job.model, 4): own.add_(0.1)
    term = hold.loss(run, batch, None)["hold"]
    expected = hold.weight / 2 * 0.01 * hold.fisher.sum().item()
    assert term.item() == pytest.approx(expected, rel=1e-3)
    term.backward()
    for bank in banks(job).values():
        for p in bank.parameters(): assert not p.grad[4:].any() and (p.grad[:4] >= 0).all()


@pytest.mark.parametrize("pair", ["sight=0.8", "oracle_task_id=true"])
def test_interrupted_and_resumed_is_uninterrupted(base, tmp_path, monkeypatch, pair):
    spec = short_spec(base, *METHOD[:4], "optimizer_state=carry", pair)
    check_resumed(spec, tmp_path, monkeypatch, "instructions.seen.means")


def test_one_prototype_for_each_task_if_the_task_is_told(base):
    job = session(base, *METHOD, "oracle_task_id=true")
    job.trainer.fit(job.seen)
    assert known(job).seen.number == len({s.task for chunk in job.stream.chunks for s in chunk.samples})


@pytest.mark.parametrize("pairs", [("chunk_size=1", "batch_size=1"), ("prototypes=2",), ("prototypes=1", "threshold=1"), ("accumulation=2",),
                                   ("shared=0", "top_k=12"), ("sight=-1", "geometry='none'")],
                         ids=["one sample", "few prototypes", "one prototype", "accumulated", "all private", "text alone"])
def test_odd_sizes_train_and_answer(base, pairs):
    job = session(base, *METHOD, *pairs)
    before = {n: b.A.detach().clone() for n, b in banks(job).items()}
    job.trainer.fit(job.seen)
    assert 1 <= known(job).seen.number <= job.spec.settings.prototypes
    assert any(not torch.equal(b.A, before[n]) for n, b in banks(job).items())
    assert all(torch.isfinite(p).all() for b in banks(job).values() for p in b.parameters())
    assert len(job.ask("proxy", 4)) == 2 * len(job.stream.tests)


@pytest.mark.parametrize("text", ["", "   "])
def test_a_sample_that_asks_nothing_is_named(base, text):
    job = session(base, *METHOD, "stream.chunks=1")
    chunk = job.seen.chunks[0]
    asked = [dataclasses.replace(sample, instruction=text) if i == 5 else sample for i, sample in enumerate(chunk.samples)]
    job.seen = dataclasses.replace(job.seen, chunks=[dataclasses.replace(chunk, samples=asked)])
    with pytest.raises(RecordError, match=asked[5].id): job.trainer.fit(job.seen)


def test_bfloat16_learns_and_routes_as_float32_does(base):
    found = {}
    for dtype in ("float32", "bfloat16"):
        job = session(base, *METHOD, f"model.dtype={dtype}")
        job.trainer.fit(job.seen)
        found[dtype] = known(job).seen.number, known(job).seen.means.dtype
        assert all(torch.isfinite(p).all() and p.dtype == torch.float32 for b in banks(job).values() for p in b.parameters())
    (many, kept), (about, same) = found["float32"], found["bfloat16"]
    assert abs(many - about) <= 2 < many and kept == same == torch.float32, "about as many prototypes, and in full precision"


@pytest.mark.parametrize("pairs, where", [(("shared=16",), "top_k"), (("gate=-1",), "gate"), (("top_k=0",), "top_k"), (("threshold=2",), "threshold"),
                                          (("sight=-2",), "sight"), (("geometry='round'",), "geometry")])
def test_settings_that_cannot_work_are_refused(base, pairs, where):
    with pytest.raises(SpecError, match=where): session(base, *METHOD, *pairs)


def test_pictures_are_what_the_language_model_gets(base):
    job = session(base, *METHOD, "stream.chunks=1")
    run, samples = job.trainer, job.seen.chunks[0].samples[:6]
    run.samples = samples
    kept, seen = image_vectors(run, samples), []
    root = job.model.base_model.root
    root.model.get_decoder().register_forward_hook(lambda *_: seen.append(CALL.get().context.picture))
    with torch.no_grad():
        for sample in samples: run.answer_loss(run.batch([sample]))
    torch.testing.assert_close(torch.cat(seen), kept)
    run.encode, run.collate = None, Collator(job.processor, images=True)  # pictures pass through every time
    torch.testing.assert_close(image_vectors(run, samples), kept)


# ---------------------------------------------------------------- with PEFT alone

@pytest.fixture
def adapted():
    "A model of another kind, whose prototypes have seen the instructions of a batch."
    torch.manual_seed(0)
    model = stir(get_peft_model(internvl(), StrLoraConfig.prototypes(r=16, num_experts=16, shared=4, sight=0.999, lora_alpha=32, task_type="CAUSAL_LM")))
    given = batch(model, rows=4, words=8)
    root = model.base_model.root
    given["input_ids"] = torch.where(given["input_ids"] == root.image_token, given["input_ids"], given["input_ids"][:1])  # one sentence for all
    vectors = instruction_of(model.base_model.model, given["instruction_mask"], given["input_ids"], None)
    with torch.no_grad(): seen = model.model.get_image_features(given["pixel_values"]).pooler_output
    found = model.base_model.observe(vectors, torch.stack([part.flatten(0, -2).mean(0) for part in seen]))
    return model.eval(), given, vectors, found


def test_saved_prototypes_are_loaded(adapted, tmp_path):
    model, given, _, found = adapted
    assert found.unique().numel() > 1
    with model.base_model.record_routing() as rows, torch.no_grad(): expected = model(**given).logits
    assert {layer for layer, _, _ in rows} and all(torch.equal(r.weights, rows[0][2].weights) for _, _, r in rows)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(internvl(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, expected)
        with loaded.disable_adapter(): assert torch.equal(loaded(**plain(given)).logits, internvl()(**plain(given)).logits)
    half = PeftModel.from_pretrained(internvl(), tmp_path).to(torch.bfloat16)
    router = layers_of(half)[0].strlora_router["default"]
    assert torch.equal(router.instructions.seen.means, layers_of(model)[0].strlora_router["default"].instructions.seen.means)


def test_a_generation_keeps_the_experts_of_its_prompt(adapted):
    model, given, _, _ = adapted
    asked = prompt({k: v for k, v in given.items() if k != "labels"})
    with torch.no_grad(), model.base_model.record_routing() as rows: model.generate(**asked, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert len(rows) > 14 and all(torch.equal(r.weights, rows[0][2].weights) for _, _, r in rows)


def test_a_batch_is_observed_in_one_call(adapted):
    model, given, _, found = adapted
    torch.manual_seed(0)
    fresh = stir(get_peft_model(internvl(), StrLoraConfig.prototypes(r=16, num_experts=16, shared=4, sight=0.999, lora_alpha=32, task_type="CAUSAL_LM")))
    assert torch.equal(strlora.observe_batch(fresh.train(), given), found) and fresh.training
    known, same = (layers_of(m)[0].strlora_router["default"].instructions for m in (model, fresh))
    assert torch.equal(known.sights, same.sights) and torch.equal(known.seen.means, same.seen.means)
    blind = {name: value for name, value in given.items() if name != "pixel_values"}
    blind["input_ids"] = given["input_ids"].masked_fill(given["input_ids"] == model.base_model.root.image_token, 1)
    assert strlora.observe_batch(fresh, blind).shape == found.shape, "no pictures"
    with pytest.raises(SpecError, match="get_peft_model"): strlora.observe_batch(internvl(), given)


def test_only_prototypes_are_observed():
    model = get_peft_model(internvl(), StrLoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    with pytest.raises(SpecError, match="prototypes"): model.base_model.observe(torch.zeros(2, 32))


def three_kinds():
    "Three ways of asking, about three kinds of picture, ten times each."
    torch.manual_seed(0)
    d = 32
    words, looks = torch.eye(d)[:3], torch.eye(d)[5:8]
    known = Instructions(d, kind="none")
    return known, words, looks, known.observe(words.repeat(10, 1), looks.repeat(10, 1))[:3]


def test_words_and_pictures_make_a_prototype():
    known, words, looks, found = three_kinds()
    assert known.seen.number == 3 and torch.equal(known.looks[:3], torch.full((3,), 10.)) and torch.allclose(known.sights[found], looks)
    assert torch.equal(known.recognise(words, looks), found)
    new = torch.eye(32)[20:23]                                      # words that nobody has used
    assert torch.equal(known.recognise(new, looks), found), "new words go by the picture"
    assert torch.equal(known.recognise(words, torch.eye(32)[25:28]), found), "pictures that nobody has seen go by the words"
    assert torch.equal(known.recognise(words), found) and torch.equal(known.recognise(words, torch.zeros(3, 32)), found)
    both = known.observe(words, looks.roll(1, 0))                   # known words about pictures of another kind
    assert known.seen.number == 6 and not set(both.tolist()) & set(found.tolist()), "begin kinds of their own"
    assert torch.equal(known.recognise(words, looks), found) and torch.equal(known.recognise(words, looks.roll(1, 0)), both)


def test_words_alone_do_not_look():
    _, words, looks, _ = three_kinds()
    deaf = Instructions(32, kind="none", sight=-1.0)
    found = deaf.observe(words, looks)
    assert torch.equal(deaf.observe(words, looks.roll(1, 0)), found) and deaf.seen.number == 3 and deaf.sights is None


def test_prototypes_are_saved_and_loaded():
    known, words, looks, found = three_kinds()
    again = Instructions(32, kind="none")
    assert torch.equal(again.recognise(words, looks), torch.zeros(3, dtype=torch.long)), "none yet"
    again.load_state_dict(known.state_dict())
    assert torch.equal(again.recognise(torch.eye(32)[20:23], looks), found)


def test_a_full_set_of_prototypes_takes_in_what_is_new():
    _, words, looks, _ = three_kinds()
    small = Instructions(32, kind="none", prototypes=2)
    found = small.observe(words.repeat(10, 1), looks.repeat(10, 1))
    assert small.seen.number == 2 and found.unique().numel() == 2 and int(small.seen.counts.sum()) == 30


def test_blocks_find_the_same_kinds(monkeypatch):
    torch.manual_seed(0)
    kinds = torch.nn.functional.normalize(torch.randn(2, 5, 64), dim=-1)
    which = torch.randint(5, (60,))
    texts, pictures = (k[which] + 0.02 * torch.randn(60, 64) for k in kinds)
    whole, parts = Instructions(64, kind="none"), Instructions(64, kind="none")
    found = whole.observe(texts, pictures)
    monkeypatch.setattr(instruct, "BLOCK", 7)
    split = parts.observe(texts, pictures)
    assert whole.seen.number == parts.seen.number == 5
    assert all(split[found == j].unique().numel() == 1 for j in range(5))


def test_samples_without_a_picture_go_by_their_words():
    known, words, looks, found = three_kinds()
    before = known.sights.clone(), known.looks.clone()
    assert torch.equal(known.observe(words, torch.zeros(3, 32)), found) and known.seen.number == 3
    assert torch.equal(known.sights, before[0]) and torch.equal(known.looks, before[1])
    fresh = Instructions(32, kind="none")
    blind = fresh.observe(words, torch.zeros(3, 32))
    seen = fresh.observe(words, looks)
    assert fresh.seen.number == 6 and not set(blind.tolist()) & set(seen.tolist()), "pictures begin kinds of their own"


def test_one_sample_without_a_picture_does_not_join_kinds():
    words, looks = torch.eye(32)[:1].expand(11, 32), torch.eye(32)[5:16].clone()
    looks[10] = 0
    for order in (torch.arange(11), torch.arange(11).flip(0)):
        known = Instructions(32, kind="none")
        found = known.observe(words[order], looks[order])
        assert known.seen.number == 10 and found[order < 10].unique().numel() == 10
        later = Instructions(32, kind="none")
        later.observe(words[:1], torch.zeros(1, 32))
        assert later.observe(words[:10], looks[:10]).unique().numel() == 10


def test_ids_from_outside_may_have_gaps_and_end_at_the_limit():
    known, words, looks = Instructions(32, kind="none", prototypes=8), torch.eye(32)[:3], torch.eye(32)[5:8]
    known.observe(words, looks, torch.tensor([0, 3, 7]))
    assert torch.equal(known.recognise(words, looks), torch.tensor([0, 3, 7]))
    new = known.observe(torch.eye(32)[20:21], torch.eye(32)[25:26])
    assert new.item() not in (0, 3, 7) and torch.equal(known.recognise(torch.eye(32)[20:21], torch.eye(32)[25:26]), new)
    with pytest.raises(SpecError, match="ids from 0 to 7, found 8"): known.observe(words, looks, torch.tensor([0, 1, 8]))


@pytest.mark.parametrize("which", ["words", "looks"])
def test_what_is_no_number_is_refused(which):
    known, words, looks, found = three_kinds()
    bad = {"words": words.clone(), "looks": looks.clone()}
    bad[which][1, 2] = float("nan")
    with pytest.raises(SignalError, match="finite"): known.observe(bad["words"], bad["looks"])
    assert torch.equal(known.recognise(words, looks), found), "nothing was learned from it"


def test_rounding_does_not_decide():
    torch.manual_seed(0)
    known = Instructions(64, kind="none")
    texts, pictures = torch.nn.functional.normalize(torch.randn(2, 400, 64), dim=-1)
    known.observe(texts[:40], pictures[:40])
    with torch.autocast("cpu", dtype=torch.bfloat16): found = known.recognise(texts, pictures)
    assert torch.equal(found, known.recognise(texts, pictures))


@pytest.mark.parametrize("options", [{"sight": 7.0}, {"threshold": -2.0}, {"kind": "round"}])
def test_no_prototypes_of_impossible_settings(options):
    with pytest.raises(SpecError): Instructions(8, **options)


def test_means_of_pictures_do_not_depend_on_how_they_arrive():
    torch.manual_seed(0)
    texts, pictures = torch.nn.functional.normalize(torch.randn(40, 6), dim=-1), torch.randn(40, 6)
    pictures[::5] = 0
    ids = torch.arange(40) % 3
    whole, parts = Instructions(6, kind="none"), Instructions(6, kind="none")
    whole.observe(texts, pictures, ids)
    for i in range(0, 40, 8): parts.observe(texts[i:i + 8], pictures[i:i + 8], ids[i:i + 8])
    assert torch.allclose(whole.sights, parts.sights, atol=1e-6) and float(whole.looks.sum()) == 32
