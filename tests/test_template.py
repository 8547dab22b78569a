"Checkpoints without a chat template: the family's own in our words, where answers end, and one word of it in run, card and chat."
import contextlib
import io

import pytest
import tiny
import torch
from chats import FAMILIES, GEMMA3, gemma, idefics, internvl, picture, sample
from small import rows
from test_families import SAMPLES
from transformers import Gemma3Processor

from strlora import runs
from strlora.again import ask_again
from strlora.backbones.collate import Collator, conversation
from strlora.backbones.table import BACKBONES, GEMMA_TEMPLATE, INTERNVL_TEMPLATE
from strlora.backbones.template import end_at, ends_of, with_template
from strlora.chat import Speaker
from strlora.core import SpecError, read_json
from strlora.evaluation import answers, prepare
from strlora.job import load_model
from strlora.spec import override, resolve

SHORT = ("method=lora", "stream.chunks=2", "chunk_size=4", "test_size=2", "proxy_size=1", "batch_size=2", "threads=1", "r=4",
         "max_new_tokens=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny pretrained Gemma 3: no chat template, and generation that ends at <eos> alone."
    where, processor = tmp_path_factory.mktemp("gemma"), gemma(None)
    model = tiny.gemma3(pixels=16, image=processor.tokenizer.image_token_id, vocab=400)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(where)
    processor.save_pretrained(where)
    return where


def same(one, other): assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind, bare, own", [("gemma3", gemma, GEMMA3), ("internvl", internvl, INTERNVL_TEMPLATE)])
@pytest.mark.parametrize("system", [None, "be brief."])
def test_a_family_writes_what_its_processors_write(kind, bare, own, system):
    "Ids, masks and labels, of samples and prompts, with one picture or two."
    processor = bare(None)
    given = with_template(processor, kind)
    assert given == {"source": f"the row {kind!r} of BACKBONES", "text": BACKBONES[kind].chat_template} and processor.chat_template == given["text"]
    ours, theirs = Collator(processor, system=system), Collator(bare(own), system=system)
    for answered in (True, False): same(ours(SAMPLES, answered), theirs(SAMPLES, answered))
    assert ends_of(ours) == ends_of(theirs)


def test_the_format_of_gemma():
    processor = gemma(None)
    with_template(processor, "gemma3")
    words = processor.apply_chat_template([conversation(1, ["What is it?"])], tokenize=False, add_generation_prompt=True)[0]
    assert words == "<bos><start_of_turn>user\n<start_of_image>What is it?<end_of_turn>\n<start_of_turn>model\n"
    batch = Collator(processor)([sample()])
    said = lambda chosen: processor.tokenizer.decode(batch["input_ids"][0][chosen])
    assert said(batch["labels"][0] != -100) == "red<end_of_turn>" and said(batch["instruction_mask"][0]) == sample().instruction


def test_a_template_of_its_own_stays():
    for name, make in FAMILIES.items():
        processor = make()
        before = processor.chat_template
        assert with_template(processor, "gemma3") is None and processor.chat_template == before, name


def test_what_cannot_be_had(tmp_path):
    with pytest.raises(SpecError, match="none in the processor, and none for this family.*model.chat_template = FILE"): with_template(idefics(None), "idefics3")
    with pytest.raises(SpecError, match="none for this family"): with_template(gemma(None), "unheard_of")
    file = tmp_path/"template.jinja"
    for content, words in ((None, "FileNotFoundError"), (b"\xff\xfe", "UnicodeDecodeError"), (b" \n", "an empty file"), (b"{% if", "TemplateSyntaxError"),
                           (b"{{ raise_exception('no pictures') }}", "no pictures")):
        if content is not None: file.write_bytes(content)
        with pytest.raises(SpecError, match=words) as caught: with_template(gemma(), "gemma3", str(file))
        assert "\n" not in str(caught.value)


def test_a_file_takes_precedence(tmp_path):
    file = tmp_path/"template.jinja"
    file.write_text(GEMMA3.replace("<start_of_turn>", "<start_of_turn>the "))
    processor = gemma()
    given = with_template(processor, "gemma3", str(file))
    assert given == {"source": str(file), "text": file.read_text()} and "the user" in processor.tokenizer.decode(Collator(processor)([sample()])["input_ids"][0])
    file.unlink()
    again = gemma(None)
    assert with_template(again, "gemma3", str(file), given) == given and again.chat_template == given["text"], "the record is enough"


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_end_with_what_labels_end_with(family):
    collator = Collator(FAMILIES[family]())
    batch = collator([sample()])
    assert ends_of(collator) == (batch["labels"][0][batch["labels"][0] != -100][-1].item(),)


@pytest.mark.parametrize("before, after", [(None, [7]), (7, 7), (1, [1, 7]), ([1, 7], [1, 7]), ([9, 1], [1, 7, 9])])
def test_where_generation_ended_before_it_ends_still(before, after):
    model = tiny.gemma3()
    model.generation_config.eos_token_id = before
    new = end_at(model, (7,))
    assert model.generation_config.eos_token_id == after and new == (() if before in (7, [1, 7]) else (7,))


def script(model, tokens, prompt):
    "Let a model say these tokens one after the other behind a prompt of that length, whatever it is asked."
    def forced(module, args, kwargs, out):
        out.logits[:, -1] = -100.0
        out.logits[:, -1, tokens[kwargs["past_key_values"].get_seq_length() - prompt]] = 100.0
        return out
    return model.register_forward_hook(forced, with_kwargs=True)


@pytest.mark.parametrize("last", ["<end_of_turn>", "<eos>"])
def test_generation_stops_at_the_end_of_a_turn_or_of_a_text(folder, last):
    "Said `red`, an end, and then more: nothing behind the end is kept, and without the end of a turn it would be."
    model, processor = load_model(str(folder))
    assert type(processor) is Gemma3Processor and not processor.chat_template
    with_template(processor, "gemma3")
    collator, tokenizer = Collator(processor), processor.tokenizer
    ids = [*tokenizer("red", add_special_tokens=False)["input_ids"], tokenizer.convert_tokens_to_ids(last), *tokenizer("blue", add_special_tokens=False)["input_ids"]]
    decode = lambda rows: tokenizer.batch_decode(rows, skip_special_tokens=True)
    prompts = prepare([sample()], collator, None, 1, lambda s: len(ids))
    handle = script(model, ids, prompts[0].batch["input_ids"].shape[1])
    before = [text for _, text in answers(model, prompts, decode)]
    new = end_at(model, ends_of(collator))
    after = [text for _, text in answers(model, prompts, decode)]
    handle.remove()
    assert tokenizer.convert_ids_to_tokens(new) == ["<end_of_turn>"] and after == ["red"] and before == (["redblue"] if last == "<end_of_turn>" else ["red"])


def test_a_run_says_it_and_chat_goes_on_with_it(folder, tmp_path):
    spec, run = resolve(override({}, [f"model.base={str(folder)!r}", *SHORT])), tmp_path/"run"
    with contextlib.redirect_stderr(io.StringIO()) as err: runs.start(spec, run)
    info = read_json(run/"run.json")
    assert info["chat_template"] == {"source": "the row 'gemma3' of BACKBONES", "text": GEMMA_TEMPLATE}
    assert err.getvalue().count("chat template: that of the row 'gemma3' of BACKBONES") == 1 and "answers also end at <end_of_turn>" in err.getvalue()
    card = (run/"checkpoint"/"README.md").read_text()
    assert "not by one of the checkpoint" in card and "    {{ bos_token }}" in card
    speaker = Speaker(run)
    assert speaker.collate.processor.chat_template == GEMMA_TEMPLATE
    assert set(ends_of(speaker.collate)) < set(speaker.model.generation_config.eos_token_id)
    assert isinstance(speaker.answer([picture()], "what is it?", 2), str)
    before = rows(run)
    ask_again(run, ["proxy"])
    last = lambda found: {r["sample_id"]: r["prediction"] for r in found if r["after_chunk"] == 2}
    assert last(rows(run)) == last(before)


def test_a_run_with_the_same_template_in_the_processor_gives_the_same_numbers(folder, tmp_path):
    "Our words or those of the checkpoint: the same losses, the same answers, and nothing to say in the second case."
    whole = tmp_path/"whole"
    model, processor = load_model(str(folder))
    processor.chat_template = GEMMA3
    for part in (model, processor): part.save_pretrained(whole)
    for name, base in (("bare", folder), ("own", whole)):
        with contextlib.redirect_stderr(io.StringIO()): runs.start(resolve(override({}, [f"model.base={str(base)!r}", *SHORT])), tmp_path/name)
    bare, own = (read_json(tmp_path/name/"run.json") for name in ("bare", "own"))
    assert "chat_template" in bare and "chat_template" not in own
    assert rows(tmp_path/"bare") == rows(tmp_path/"own")
    assert [r["loss"] for r in rows(tmp_path/"bare", "train")] == [r["loss"] for r in rows(tmp_path/"own", "train")]


def test_a_run_goes_on_with_the_template_it_began_with(folder, tmp_path, monkeypatch):
    "Also when the file is gone."
    file = tmp_path/"template.jinja"
    file.write_text(GEMMA3)
    spec, run = resolve(override({}, [f"model.base={str(folder)!r}", f"model.chat_template={str(file)!r}", *SHORT])), tmp_path/"run"
    true = runs.Recorder.step_done
    def press(self, trainer, row):
        if trainer.total == 2: self.stop = 2
        true(self, trainer, row)
    monkeypatch.setattr(runs.Recorder, "step_done", press)
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises(runs.Interrupted): runs.start(spec, run)
    monkeypatch.undo()
    file.unlink()
    with contextlib.redirect_stderr(io.StringIO()) as err: runs.resume(run)
    info = read_json(run/"run.json")
    assert info["status"] == "finished" and info["chat_template"] == {"source": str(file), "text": GEMMA3} and str(file) in err.getvalue()
