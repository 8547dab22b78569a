"The instruction mask and the collator: every family's template, both paddings, and everything that has to be refused."
import pickle
import types

import numpy as np
import pytest
import torch
from chats import CORPUS, FAMILIES, QWEN3, QWEN25, gemma, internvl, picture, sample
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from strlora.backbones.chat import MARK, control_tokens, current_turn, frame
from strlora.backbones.chat_mask import instruction_mask, tokenize, tokens_html, tokens_of
from strlora.backbones.collate import Collator, conversation
from strlora.backbones.processor import TOY_TOKENS, toy_tokenizer
from strlora.backbones.table import INTERNVL_TEMPLATE
from strlora.core import RecordError, SignalError, SpecError

QUESTION = "what colour is the car? answer with a single word."
SAMPLES = [sample(), sample("is it blue, ça va 🚗 什么?", "dark blue", id="b")]


def said(processor, batch, row, column="instruction_mask"):
    "The text under a mask."
    chosen = batch[column][row] if column == "instruction_mask" else batch[column][row] != -100
    return processor.tokenizer.decode(batch["input_ids"][row][chosen])


def unpadded(batch, row, column="input_ids"):
    return batch[column][row][batch["attention_mask"][row] == 1].tolist()


def talk_of(one, answer=True):
    "A sample as messages with its images."
    messages, images = conversation(len(one.images), [one.instruction, one.answer][:1 + answer]), iter(one.images)
    for message in messages:
        message["content"] = [{"type": "image", "image": next(images)} if p["type"] == "image" else p for p in message["content"]]
    return messages


# --- what a batch holds ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("images", [1, 2])
def test_mask_is_the_instruction_and_labels_are_the_answer_with_its_end(family, images):
    processor = FAMILIES[family]()
    samples = [types.SimpleNamespace(**{**vars(s), "images": tuple(picture(40, 20, i) for i in range(images))}) for s in SAMPLES]
    batch = Collator(processor)(samples)
    for row, one in enumerate(samples):
        assert said(processor, batch, row) == one.instruction
        written = said(processor, batch, row, "labels")
        thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
        end = {"gemma3": "<end_of_turn>", "idefics3": "<end_of_utterance>"}.get(family, "<|im_end|>")
        assert written.removeprefix(" ") == thought + one.answer + end
        assert not (batch["instruction_mask"][row] & (batch["labels"][row] != -100)).any()
        assert not batch["instruction_mask"][row][batch["attention_mask"][row] == 0].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_pixels_are_those_of_the_processor(family):
    processor = FAMILIES[family]()
    for one in [*SAMPLES, sample(images=2, size=(40, 20))]:
        ours = Collator(processor)([one])
        theirs = processor.apply_chat_template([talk_of(one)], tokenize=True, return_dict=True, return_tensors="pt")
        assert set(ours) == set(theirs) | {"instruction_mask", "labels"}
        for name, value in theirs.items(): assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_else(family, side):
    processor = FAMILIES[family]()
    collator = Collator(processor, padding_side=side)
    batch, alone = collator(SAMPLES), [collator([one]) for one in SAMPLES]
    assert len({len(unpadded(batch, row)) for row in range(2)}) == 2, "the rows must differ in length for this test"
    edge = 0 if side == "left" else -1
    assert batch["attention_mask"][:, edge].min() == 0 and batch["attention_mask"][:, -1 - edge].min() == 1
    for name in set(batch) & {"input_ids", "instruction_mask", "labels", "token_type_ids"}:
        for row in range(2): assert unpadded(batch, row, name) == alone[row][name][0].tolist()
    outside = batch["attention_mask"] == 0
    assert (batch["labels"][outside] == -100).all() and (batch["input_ids"][outside] == processor.tokenizer.pad_token_id).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_the_beginning_of_training_rows(family):
    collator = Collator(FAMILIES[family]())
    train, prompts = collator(SAMPLES), collator(SAMPLES, answers=False)
    assert "labels" not in prompts and prompts["attention_mask"][:, -1].all(), "prompts end at the right"
    for row in range(2):
        ids, prompt = unpadded(train, row), unpadded(prompts, row)
        assert ids[:len(prompt)] == prompt
        assert unpadded(train, row, "instruction_mask")[:len(prompt)] == unpadded(prompts, row, "instruction_mask")


def test_generation_blocks_give_the_labels_of_transformers():
    processor = internvl(QWEN25)
    ours = Collator(processor)([SAMPLES[0]])
    theirs = processor.apply_chat_template([talk_of(SAMPLES[0])], tokenize=True, return_dict=True, return_tensors="pt",
                                           return_assistant_tokens_mask=True)
    assert torch.equal(ours["labels"][0] != -100, torch.as_tensor(theirs["assistant_masks"])[0] == 1)


def test_blocks_and_prompts_agree():
    plain = QWEN25.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    assert torch.equal(Collator(internvl(QWEN25))(SAMPLES)["labels"], Collator(internvl(plain))(SAMPLES)["labels"])


@pytest.mark.parametrize("family", FAMILIES)
def test_system_prompt_is_never_instruction(family):
    processor = FAMILIES[family]()
    system = "you are wise. " + QUESTION                      # repeats the question word by word
    batch = Collator(processor, system=system)(SAMPLES)
    assert said(processor, batch, 0) == QUESTION
    assert processor.tokenizer.decode(unpadded(batch, 0)).count(QUESTION) == 2


def test_text_before_image():
    processor = internvl()
    batch = Collator(processor, image_first=False)(SAMPLES)
    assert said(processor, batch, 1) == SAMPLES[1].instruction
    ids = unpadded(batch, 0)
    assert ids.index(processor.image_token_id) > unpadded(batch, 0, "instruction_mask").index(True)


def test_text_of_image_expansion_is_not_instruction():
    "Gemma's pan and scan writes words around the crops; a question of the same words is still found at its own place."
    processor, words = gemma(), "Here is the original image"
    crops = dict(do_pan_and_scan=True, pan_and_scan_min_crop_size=4, pan_and_scan_max_num_crops=2, pan_and_scan_min_ratio_to_activate=1.0)
    batch = Collator(processor, images_kwargs=crops)([sample(words, size=(48, 16))])
    assert said(processor, batch, 0) == words
    assert processor.tokenizer.decode(unpadded(batch, 0)).count(words) == 2
    assert batch["pixel_values"].shape[0] == 3


def test_tiles_multiply_image_tokens():
    processor = internvl(crop_to_patches=True)
    batch = Collator(processor)([sample(size=(32, 16))])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 4 * batch["pixel_values"].shape[0] == 12
    assert said(processor, batch, 0) == QUESTION


def test_without_images_nothing_but_pixels_is_missing():
    processor = internvl()
    whole, light = Collator(processor)(SAMPLES), Collator(processor, images=False)(SAMPLES)
    assert set(whole) - set(light) == {"pixel_values"}
    for name, value in light.items(): assert torch.equal(value, whole[name])


def test_image_processor_is_asked_once_a_size(monkeypatch):
    processor, calls = internvl(), []
    once = type(processor.image_processor).__call__
    monkeypatch.setattr(type(processor.image_processor), "__call__", lambda self, *a, **k: calls.append(1) or once(self, *a, **k))
    collator = Collator(processor, images=False)
    for size in ((24, 24), (24, 24), (30, 24)): collator([sample(size=size)] * 3)
    assert len(calls) == 2


def test_images_may_be_made_late():
    one = sample()
    late = types.SimpleNamespace(**{**vars(one), "images": (lambda: one.images[0],)})
    processor = internvl()
    assert torch.equal(Collator(processor)([late])["pixel_values"], Collator(processor)([one])["pixel_values"])


def test_collator_goes_to_a_worker():
    collator = pickle.loads(pickle.dumps(Collator(internvl())))
    assert torch.equal(collator(SAMPLES)["input_ids"], Collator(internvl())(SAMPLES)["input_ids"])


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip))
def test_any_text_is_found(text):
    collator = test_any_text_is_found.__dict__.setdefault("collator", Collator(internvl(), images=False))
    batch = collator([sample(text)])
    assert said(collator.processor, batch, 0).strip() == text.strip()


def test_thinking_off_belongs_to_the_prompt():
    processor = internvl(QWEN3)
    batch = Collator(processor, template_kwargs={"enable_thinking": False})(SAMPLES)
    assert said(processor, batch, 0, "labels") == "red<|im_end|>"


# --- the mask alone -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answers", [True, False])
def test_function_and_collator_give_the_same_mask(family, answers):
    processor = FAMILIES[family]()
    batch = Collator(processor)(SAMPLES, answers=answers)
    talks = [talk_of(one, answers) for one in SAMPLES]
    assert torch.equal(instruction_mask(processor, talks, batch["input_ids"]), batch["instruction_mask"])
    bare = [conversation(1, [one.instruction, one.answer][:1 + answers]) for one in SAMPLES]
    mask = instruction_mask(processor, bare, batch["input_ids"], images=[one.images for one in SAMPLES])
    assert torch.equal(mask, batch["instruction_mask"])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_user_turn_counts(family):
    processor = FAMILIES[family]()
    talk = [*talk_of(SAMPLES[0]), {"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template([talk], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    mask = instruction_mask(processor, [talk], inputs["input_ids"])[0]
    assert processor.tokenizer.decode(inputs["input_ids"][0][mask]).strip() == QUESTION
    first = np.flatnonzero(mask.numpy())[0]
    assert processor.tokenizer.decode(inputs["input_ids"][0][:first]).count(QUESTION) == 1, "the second of two equal questions"


def test_a_tokenizer_alone_serves_texts_alone():
    tokenizer = internvl().tokenizer
    tokenizer.chat_template = INTERNVL_TEMPLATE
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": QUESTION}]
    ids = torch.tensor(tokenizer.apply_chat_template([talk], add_generation_prompt=True, return_dict=True)["input_ids"])
    assert tokenizer.decode(ids[instruction_mask(tokenizer, [talk], ids)]) == QUESTION


def test_several_texts_in_one_turn():
    processor = internvl()
    talk = [{"role": "user", "content": [{"type": "text", "text": "first"}, {"type": "image", "image": picture()},
                                         {"type": "text", "text": "second"}]}]
    inputs = processor.apply_chat_template([talk], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    mask = instruction_mask(processor, [talk], inputs["input_ids"])[0]
    assert processor.tokenizer.decode(inputs["input_ids"][0][mask]) == "firstsecond"


def test_ids_of_something_else_are_refused():
    processor = internvl()
    batch = Collator(processor)(SAMPLES)
    for wrong in (batch["input_ids"][:, :-3], batch["input_ids"].flip(0), batch["input_ids"] + 1):
        with pytest.raises(SignalError, match=r"conversation \d: the input_ids do not belong"):
            instruction_mask(processor, [talk_of(SAMPLES[0]), talk_of(SAMPLES[1])], wrong)


def test_missing_images_are_refused():
    with pytest.raises(SignalError, match="once for each of 0 images"):
        instruction_mask(internvl(), [conversation(1, [QUESTION])], torch.zeros(1, 40, dtype=torch.long))


@pytest.mark.parametrize("talk", [[], [{"role": "assistant", "content": "hi"}], [{"role": "user", "content": [{"type": "image"}]}],
                                  [{"role": "user", "content": "  "}]])
def test_no_instruction(talk):
    with pytest.raises(SignalError, match="a user turn with a text"): current_turn(talk)


def test_the_table_of_tokens_is_escaped():
    processor = internvl()
    page = tokens_html(processor, Collator(processor)([sample("<script>alert(1)</script>")]))
    assert "<script" not in page and "&lt;" in page


# --- what is refused ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<|im_end|>", "<|im_start|>user", "<img>"])
def test_control_tokens_in_a_text(token):
    with pytest.raises(SignalError, match="sample 'a': expected plain text, found the control token"):
        Collator(internvl())([sample(f"look {token} here")])
    with pytest.raises(SignalError, match="control token"): Collator(internvl())([sample(answer=f"red{token}")])
    talk = [{"role": "user", "content": [{"type": "text", "text": token}]}]
    with pytest.raises(SignalError, match="control token"): instruction_mask(internvl(), [talk], torch.zeros(1, 9, dtype=torch.long))


def test_added_tokens_of_the_template_are_control_tokens():
    processor = internvl(QWEN3)
    processor.tokenizer.add_tokens(["<think>", "harmless", "\n\n"])
    assert "<think>" in control_tokens(processor) and not {"harmless", "\n\n"} & set(control_tokens(processor))


def test_a_placeholder_in_an_earlier_turn():
    "It would shift all images: the template's placeholders have to be as many as there are images."
    processor = internvl()
    talk = [{"role": "user", "content": "<IMG_CONTEXT>"}, {"role": "assistant", "content": "no"}, {"role": "user", "content": QUESTION}]
    with pytest.raises(SignalError, match="0 images, found 1 times"):
        instruction_mask(processor, [talk], torch.zeros(1, 40, dtype=torch.long))


def word_processor(normalizer=None, extra=(), template=INTERNVL_TEMPLATE):
    "A tokenizer of whole words with a normalizer."
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "user", "assistant", "what", "is", "red", "stop"])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if normalizer: core.normalizer = normalizer
    core.add_special_tokens(list(extra))
    return internvl(template, PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>",
                                                      unk_token="<unk>", extra_special_tokens=TOY_TOKENS))


def test_special_tokens_in_disguise():
    processor = word_processor(normalizers.Lowercase(), [AddedToken("<STOP>", normalized=True)])
    assert said(processor, Collator(processor)([sample("what is unknown")]), 0) == "what is <unk>", "unknown words are words"
    with pytest.raises(SignalError, match="reads a part of the text as a special token"):
        Collator(processor)([sample("what <stop> is")])


def test_a_tokenizer_that_drops_characters():
    processor = word_processor(normalizers.Replace("zzz", ""))
    assert said(processor, Collator(processor)([sample("what is")]), 0) == "what is"
    with pytest.raises(SignalError, match="drops a part of the text"): Collator(processor)([sample("what is zzz")])


def greedy_processor(template):
    "A tokenizer without any borders: tokens may cover template and text."
    core = Tokenizer(models.BPE())
    text = "".join(c for c in template if c.isalpha())
    corpus = "ask:what colour is it? ok red user assistant \n" + text
    core.train_from_iterator([corpus] * 2, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    core.decoder = decoders.Fuse()
    return internvl(template, PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>",
                                                      extra_special_tokens=TOY_TOKENS))


GLUED = ("{% for m in messages %}{% if m.role == 'user' %}<IMG_CONTEXT>ask:{{ m.content[-1].text }}"
         "{% else %}<|im_start|>{{ m.content[0].text }}{% endif %}<|im_end|>{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>{% endif %}")


def test_a_token_over_the_border():
    with pytest.raises(SignalError, match="one token covers 'ask:' of the template"):
        Collator(greedy_processor(GLUED))([sample("what colour")])
    spaced = greedy_processor(GLUED.replace("ask:", " "))
    assert said(spaced, Collator(spaced)([sample("what colour")]), 0).strip() == "what colour", "white space is harmless"


@pytest.mark.parametrize("change, bad, good", [("lower", "What Is It?", "what is it?"), ("trim", "what is it? ", "what is it?"),
                                               ("replace('  ', ' ')", "what  is it?", "what is it?")])
def test_templates_that_alter_the_text(change, bad, good):
    written = f"part['text'].{change}" if "(" in change else f"part['text'] | {change}"
    processor = internvl(INTERNVL_TEMPLATE.replace("part['text']", written))
    assert said(processor, Collator(processor)([sample(good)]), 0) == good
    with pytest.raises(SignalError, match="sample 'a': the chat template altered a text.*remove white space"):
        Collator(processor)([sample(bad)])
    with pytest.raises(SignalError, match="altered a text"): Collator(processor)([sample(good, answer=bad)])


@pytest.mark.parametrize("template", [INTERNVL_TEMPLATE.replace("part['text']", "part['text'] | upper"),
                                      INTERNVL_TEMPLATE.replace("{{ part['text'] }}", "{{ part['text'] }} {{ part['text'] }}"),
                                      INTERNVL_TEMPLATE.replace("{{ part['text'] }}", "text")])
def test_templates_that_change_repeat_or_drop_every_text(template):
    with pytest.raises(SignalError, match="alters, repeats, moves or drops"): Collator(internvl(template))([sample()])


def test_a_mark_in_an_earlier_turn():
    talk = [{"role": "user", "content": MARK.format(0)}, {"role": "assistant", "content": "no"}, {"role": "user", "content": QUESTION}]
    with pytest.raises(SignalError, match="alters, repeats"): frame(internvl().apply_chat_template, talk, current_turn(talk))


def test_slow_tokenizers():
    with pytest.raises(SignalError, match="a fast tokenizer, found SimpleNamespace"): tokenize(types.SimpleNamespace(is_fast=False), ["a"])


def test_offsets_trimmed_to_nothing():
    "Some tokenizers trim spaces off the offsets; a token that is a space keeps its place by its neighbours."
    text = "ask: a  b end"
    offsets = [(0, 4), (5, 6), (7, 7), (8, 9), (10, 13)]
    assert tokens_of(offsets, 5, 9, text).tolist() == [False, True, True, True, False]
    assert tokens_of([(0, 0), *offsets, (0, 0)], 5, 9, text).tolist() == [False, False, True, True, True, False, False]


@pytest.mark.parametrize("change, found", [
    (dict(images=()), "expected at least one image, found none"), (dict(instruction=""), "expected a text as instruction, found ''"),
    (dict(instruction=" \n"), "expected a text as instruction"), (dict(answer=""), "expected a text as answer"),
    (dict(answer=None), "expected a text as answer, found None")])
def test_incomplete_samples(change, found):
    bad = types.SimpleNamespace(**{**vars(sample(id="x-7")), **change})
    with pytest.raises(RecordError, match=f"sample 'x-7': {found}"): Collator(internvl())([sample(), bad])


def test_prompts_need_no_answer():
    bad = types.SimpleNamespace(**{**vars(sample()), "answer": ""})
    assert "input_ids" in Collator(internvl())([bad], answers=False)


def test_samples_that_are_too_long():
    collator = Collator(internvl(), max_length=60)
    length = int(collator(SAMPLES)["attention_mask"].sum(1).max())
    assert Collator(internvl(), max_length=length)(SAMPLES)["input_ids"].shape[1] == length
    for answers in (True, False):
        with pytest.raises(RecordError, match=r"sample '[ab]': expected at most 20 tokens, found \d+"):
            Collator(internvl(), max_length=20)(SAMPLES, answers=answers)


def test_an_empty_batch():
    with pytest.raises(RecordError, match="an empty batch"): Collator(internvl())([])


def test_a_template_without_an_end():
    endless = INTERNVL_TEMPLATE.replace("{{ '<|im_end|>\n' }}", "{{ '\n' }}")
    with pytest.raises(SpecError, match="no token ends the assistant's turn"): Collator(internvl(endless))(SAMPLES)


def test_a_prompt_that_training_does_not_begin_with():
    thoughtless = QWEN3.replace("{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}", "")
    with pytest.raises(SpecError, match="not the beginning of the training conversation"):
        Collator(internvl(thoughtless), template_kwargs={"enable_thinking": False})(SAMPLES)


def test_tokens_that_merge_behind_the_prompt():
    "Asked to go on after a space, trained on a word with the space in front."
    template = INTERNVL_TEMPLATE.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant ' }}")
    template = template.replace("message['role'] + '\n'", "message['role'] + (' ' if message['role'] == 'assistant' else '\n')")
    processor = internvl(template, toy_tokenizer(CORPUS + " red red red"))
    with pytest.raises(SpecError, match="sample 'a': the tokens of the prompt are not the beginning"): Collator(processor)([sample()])


def test_a_generation_block_round_something_else():
    wrong = QWEN25.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    wrong = wrong.replace("{{ '<|im_start|>' + message.role + '\n' }}", "{% generation %}{{ '<|im_start|>' + message.role + '\n' }}{% endgeneration %}")
    with pytest.raises(SpecError, match="does not enclose the answer"): Collator(internvl(wrong))(SAMPLES)


def test_settings():
    with pytest.raises(SpecError, match="'left' or 'right', found 'up'"): Collator(internvl(), padding_side="up")
    bare = internvl()
    bare.chat_template = None
    with pytest.raises(SpecError, match="no chat template"): Collator(bare)
    padless = internvl()
    padless.tokenizer.pad_token = None
    with pytest.raises(SpecError, match="no pad token"): Collator(padless)


def test_processors_of_other_makes_are_refused():
    processor = internvl()
    honest = type(processor).__call__

    class Silent(type(processor)):
        def __call__(self, *args, return_text_replacement_offsets=False, **kwargs): return honest(self, *args, **kwargs)

    processor.__class__ = Silent
    with pytest.raises(SignalError, match="Silent does not say which tokens stand for an image"): Collator(processor)(SAMPLES)


def test_gemma_writes_its_beginning_once():
    processor = gemma()
    ids = Collator(processor)(SAMPLES[:1])["input_ids"][0].tolist()
    assert ids.count(processor.tokenizer.bos_token_id) == 1 and ids[0] == processor.tokenizer.bos_token_id
