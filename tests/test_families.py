"From pictures to a trained adapter in three families: real processors, several pictures a sample, tiles, and all that may not change a number."
import types

import chats
import pytest
import tiny
import torch
from chats import picture, sample
from peft import PeftModel

from strlora.backbones.collate import Collator
from strlora.evaluation import answers, evaluate, prepare
from strlora.job import wrap
from strlora.methods.table import METHODS
from strlora.backbones.table import BACKBONES
from strlora.data.stream import Chunk
from strlora.spec import override, resolve
from strlora.trainer import Trainer, train_step

PROCESSORS = {"internvl": lambda: chats.internvl(crop_to_patches=True), "gemma3": chats.gemma, "idefics3": chats.idefics}
LONG = "look at both pictures, one after the other. " * 8 + "what colour is the car?"


def pictured(id, *sizes, instruction="what colour is the car? answer with a single word.", answer="red"):
    "A sample with a picture of each size."
    one = sample(instruction, answer, id=id)
    return types.SimpleNamespace(**{**vars(one), "images": tuple(picture(*size, seed=i) for i, size in enumerate(sizes))})


SAMPLES = [pictured("two", (24, 24), (48, 24)), pictured("wide", (48, 24), answer="dark blue"),
           pictured("long", (24, 24), (24, 24), instruction=LONG), pictured("small", (16, 16), instruction="is it red?", answer="yes")]


def base(family, processor):
    "A tiny model that fits a processor."
    token = getattr(processor.tokenizer, "image_token_id", processor.image_token_id)  # Gemma's processor calls another one by that name
    return getattr(tiny, family)(pixels=16, image=token, vocab=400)


def job(family, *pairs, processor=None, model=None):
    "Processor, wrapped model, trainer and settings."
    torch.manual_seed(0)
    processor = processor or PROCESSORS[family]()
    spec = resolve(override({}, ["method=strlora", "r=8", "lora_dropout=0.0", "batch_size=2", "warmup=0.0", *pairs]))
    wrapped = wrap(base(family, processor) if model is None else model, spec)
    trainer = Trainer(wrapped, Collator(processor), spec.train, METHODS[spec.method].parts(spec.settings))
    return types.SimpleNamespace(processor=processor, model=wrapped, trainer=trainer, spec=spec)


def train(job, steps=2):
    "Rows of some steps over the samples."
    run, chunk = job.trainer, Chunk(1, tuple(SAMPLES), {})
    run.samples = chunk.samples
    for moment in ("stream_start", "chunk_start"): run.moment(moment)
    run.model.train()
    rows = [train_step(run, make(), 1.0) for make in run.batches(chunk)[:steps]]
    run.model.eval()
    return rows


def stirred(family, **how):
    "A job whose experts and slow routers are not zero."
    made = job(family, **how)
    tiny.stir(made.model).eval()
    return made


def loss_and_gradients(model, batch, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast): out = model(**batch)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", PROCESSORS)
@pytest.mark.parametrize("method", ["strlora", "lora", "strlora_prototypes"])
def test_two_steps_with_several_pictures_and_tiles(family, method):
    made = job(family, f"method={method}", *(["r=32"] if method == "strlora_prototypes" else []))
    batch = made.trainer.batch(SAMPLES)
    pictures = len(batch["pixel_values"].flatten(0, -4))
    assert pictures > sum(len(s.images) for s in SAMPLES) or family == "gemma3", "tiles, and a view of the whole"
    for row, one in enumerate(SAMPLES):
        said = made.processor.tokenizer.decode(batch["input_ids"][row][batch["labels"][row] != -100])
        assert said.strip().startswith(one.answer) and said.strip() != one.answer, "the whole answer and its end"
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    wrapped = {n.rpartition(".strlora_experts")[0] for n in before if ".strlora_experts." in n}
    assert len(wrapped) == 14 and all(BACKBONES[family].language_model in n for n in wrapped)
    rows = train(made)
    assert len(rows) == 2 and all(torch.isfinite(torch.tensor(r["loss"])) and r["grad_norm"] > 0 and r["samples"] == 2 for r in rows)
    moved = {n for n, p in made.model.named_parameters() if not torch.equal(before[n], p)}
    assert moved and moved == {n for n in moved if ".strlora_" in n}, "the base stands still"
    assert {n.rpartition(".strlora_experts")[0] for n in moved if ".strlora_experts." in n} == wrapped, "every layer learns"


@pytest.mark.parametrize("family", PROCESSORS)
def test_checkpointing_and_autocast(family):
    "Recomputed activations give the same gradients; bfloat16 gives nearly the same loss."
    made = stirred(family)
    model, batch = made.model.train(), made.trainer.batch(SAMPLES[:2])
    loss, expected = loss_and_gradients(model, batch)
    near, low = loss_and_gradients(model, batch, autocast=True)
    assert torch.isfinite(near) and abs(near - loss) < 0.05 * loss and low.keys() == expected.keys()
    assert all(torch.isfinite(g).all() and g.dtype == torch.float32 for g in low.values())
    model.base_model.model.activation_checkpointing_enable({"use_reentrant": False})
    again, found = loss_and_gradients(model, batch)
    assert torch.equal(again, loss) and found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.parametrize("family", PROCESSORS)
def test_saved_and_loaded(family, tmp_path):
    made = job(family)
    train(made)
    batch = made.trainer.batch(SAMPLES)
    made.model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(family, made.processor), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, made.model(**batch).logits)
        fresh = base(family, made.processor)(**{k: v for k, v in batch.items() if k != "instruction_mask"})
        assert not torch.equal(made.model(**batch).logits, fresh.logits)


@pytest.mark.parametrize("family", PROCESSORS)
def test_answers_in_a_batch_are_answers_one_by_one(family):
    "Prompts of different lengths, numbers of pictures and numbers of tiles, sorted by length for evaluation."
    made = stirred(family)
    decode = lambda ids: [" ".join(map(str, row)) for row in ids]
    def ask(size):
        prompts = prepare(SAMPLES, made.trainer.collate, None, size, lambda s: 6)
        return {one.id: text for one, text in answers(made.model, prompts, decode)}, len(prompts)

    (together, one), (alone, four) = ask(4), ask(1)
    assert (one, four) == (1, 4) and together == alone and len(set(together.values())) > 1


class Mute(torch.nn.Module):
    "Says nothing."

    def generate(self, input_ids, **_): return input_ids


def at_once(samples, collate, size, limit):
    "Batches of prompts as one collation of all of them would have them, pixels included."
    whole = collate(samples, answers=False)
    lengths = whole["attention_mask"].sum(1).tolist()
    order = sorted(range(len(samples)), key=lambda i: (limit(samples[i]), lengths[i], i))
    return [[samples[i] for i in order[k:k + size]] for k in range(0, len(order), size)]


@pytest.mark.parametrize("family", PROCESSORS)
def test_pixels_of_prompts_are_made_when_asked_for_and_only_for_this_process(family, monkeypatch):
    "The batches that one collation of everything gives; a look makes one of them, and nothing stays."
    collate, asked, known = Collator(PROCESSORS[family]()), [], {"task": "imagenet", "form": "", "references": ()}
    samples = [types.SimpleNamespace(**{**vars(s), **known, "id": f"{s.id}{i}"}) for i in range(5) for s in SAMPLES]
    def counted(some, answers=True, pixels=True):
        asked.append((len(some), pixels))
        return collate(some, answers, pixels)
    prompts = prepare(samples, counted, None, 6, lambda s: 4 + len(s.id) % 2)
    assert [list(p.samples) for p in prompts] == at_once(samples, collate, 6, lambda s: 4 + len(s.id) % 2)
    assert not any(pixels for _, pixels in asked) and max(n for n, _ in asked) == 8
    for p in prompts:
        whole = collate(p.samples, answers=False)
        assert whole.keys() == p.batch.keys() and all(torch.equal(whole[k], p.batch[k]) for k in whole) and "pixel_values" in whole
    asked.clear()
    rank, mute = types.SimpleNamespace(process_index=1, num_processes=2, device="cpu"), Mute()
    monkeypatch.setattr("strlora.evaluation.gather_object", lambda rows: rows)
    assert len(evaluate(mute, prompts, lambda ids: ["" for _ in ids], 1, "proxy", rank)) == 8 and asked == [(6, True), (2, True)]


@pytest.mark.parametrize("family", PROCESSORS)
def test_a_long_prompt_leaves_the_answer_whole(family):
    "Not even a tokenizer that says it reads no more than 32 tokens cuts anything."
    processor = PROCESSORS[family]()
    whole = Collator(processor)([SAMPLES[2]])
    processor.tokenizer.model_max_length = 32
    batch = Collator(processor)([SAMPLES[2]])
    assert batch["input_ids"].shape[1] > 200 and all(torch.equal(batch[k], whole[k]) for k in whole)
    assert (batch["labels"] != -100).sum() > 1


@pytest.mark.parametrize("family", ["internvl", "gemma3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_projector_trains_at_its_own_rate(family, dtype, tmp_path):
    "Also beside a base in bfloat16, where a step of 1e-5 would round to nothing if the projector were in bfloat16, too."
    processor, kind = PROCESSORS[family](), getattr(torch, dtype)
    made = job(family, "train_projector=true", "lr=1e-3", "projector_lr=1e-5", "weight_decay=0.0", processor=processor,
               model=base(family, processor).to(kind))
    before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
    train(made)
    change = {n: (p - before[n]).abs().max().item() for n, p in made.model.named_parameters() if not torch.equal(p, before[n])}
    projector = {n for n in before if ".modules_to_save." in n}
    assert projector and projector <= set(change), "every weight of the projector moves"
    assert all("multi_modal_projector" in n for n in projector)
    assert not {n for n in set(change) - projector if ".strlora_" not in n}, "nothing else does"
    assert max(change[n] for n in projector) < 3e-5 and max(change[n] for n in set(change) - projector) > 5e-4, "two steps of each rate"
    assert [(g["kind"], g["lr"]) for g in made.trainer.optimizer.param_groups] == [("adapter", 1e-3), ("projector", 1e-5)]
    assert all(p.dtype == torch.float32 for p in made.model.parameters() if p.requires_grad)
    made.model.save_pretrained(tmp_path)
    model = base(family, processor).to(kind)
    again = job(family, "train_projector=true", processor=processor, model=model).model.eval()
    again.load_adapter(tmp_path, "default")
    given = made.trainer.batch(SAMPLES[:2])
    with torch.no_grad(): assert torch.equal(again(**given).logits, made.model(**given).logits)
    with torch.no_grad(), made.model.disable_adapter():
        plain = base(family, processor).to(kind)(**{k: v for k, v in given.items() if k != "instruction_mask"})
        assert torch.equal(made.model(**given).logits, plain.logits)
