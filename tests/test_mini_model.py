"The mini model: tower, tokenizer, processor, saving, generation, and the base that ships with the package."
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from strlora.backbones import mini
from strlora.core import CheckpointError

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import convert_tower  # noqa: E402

WORDS = "describe the picture . a red blue circle square left of right ?".split()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    tokenizer = mini.build_tokenizer(WORDS)
    return mini.build_model(tokenizer, width=64, layers=2, heads=2, intermediate=64).eval(), mini.build_processor(tokenizer)


@pytest.fixture(scope="module")
def base():
    return mini.load_base()


def pictures(n, size=(96, 96)):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(n)]


def prompt(processor, text):
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    return processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


def test_folding_equals_a_normalisation_in_evaluation():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=convert_tower.EPSILON)
    norm.running_mean.normal_(); norm.running_var.uniform_(0.5, 2); nn.init.normal_(norm.weight); nn.init.normal_(norm.bias)
    weights = {"c.weight": conv.weight, **{f"n.{k}": v for k, v in norm.state_dict().items()}}
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(F.conv2d(x, *convert_tower.fold(weights, "c", "n")), norm.eval()(conv(x)), rtol=1e-5, atol=1e-5)


def test_tower_does_not_change_in_training_and_is_frozen(small):
    tower = small[0].model.vision_tower
    pixels = mini.pixel_values(pictures(2))
    with torch.no_grad():
        first = tower.train()(pixels).last_hidden_state
        assert torch.equal(first, tower.eval()(pixels).last_hidden_state)
    assert first.shape == (2, 37, 272) and not any(p.requires_grad for p in tower.parameters())
    torch.testing.assert_close(first[:, 0], first[:, 1:].mean(1))


def test_tower_places_features_where_the_picture_has_them(small):
    blank = Image.new("RGB", (96, 96), (128, 128, 128))
    dotted = blank.copy(); dotted.paste((255, 0, 0), (70, 6, 86, 22))
    with torch.no_grad(): a, b = small[0].model.vision_tower(mini.pixel_values([blank, dotted])).last_hidden_state[:, 1:].reshape(2, 6, 6, -1)
    row, column = divmod(int((a - b).abs().sum(-1).argmax()), 6)
    assert row in (0, 1) and column in (4, 5)


@pytest.mark.parametrize("size", [(96, 96), (50, 40), (200, 120)])
def test_fast_pixels_equal_the_processor(small, size):
    images, processor = pictures(2, size), small[1]
    slow = processor(images=images, text=[prompt(processor, "describe the picture .")] * 2, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(mini.pixel_values(images), slow, rtol=0, atol=1e-6)


def test_grey_and_transparent_pictures_become_rgb():
    grey = Image.new("L", (96, 96), 127)
    torch.testing.assert_close(mini.pixel_values([grey, grey.convert("RGBA")]), torch.zeros(2, 3, 96, 96), rtol=0, atol=1e-6)


def test_processor_writes_nine_image_tokens(small):
    model, processor = small
    ids = processor(images=pictures(1), text=[prompt(processor, "describe the picture .")], return_tensors="pt")["input_ids"]
    assert (ids == model.config.image_token_id).sum() == 9 == model.config.image_seq_length


def test_words_are_single_tokens(small):
    tokenizer = small[1].tokenizer
    for word in WORDS: assert tokenizer.convert_ids_to_tokens(tokenizer(word)["input_ids"]) == [word]
    assert tokenizer.decode(tokenizer("A red circle, left of the square?")["input_ids"]).endswith("left of the square ?")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.context_image_token_id}) == 4


def test_assistant_mask_covers_the_answer_and_its_end(small):
    turns = [{"role": "system", "content": "describe"}, {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "left ?"}]},
             {"role": "assistant", "content": "a red circle"}]
    out = small[1].tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    kept = [i for i, on in zip(out["input_ids"], out["assistant_masks"], strict=True) if on]
    assert small[1].tokenizer.convert_ids_to_tokens(kept) == ["a", "red", "circle", "<|im_end|>"]


def test_round_trip_through_auto_classes(small, tmp_path):
    model, processor = small
    model.save_pretrained(tmp_path); processor.save_pretrained(tmp_path)
    again, reader = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is mini.MiniForConditionalGeneration and type(reader) is type(processor)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    batch = processor(images=pictures(2), text=[prompt(processor, "describe the picture .")] * 2, return_tensors="pt")
    read = reader(images=pictures(2), text=[prompt(reader, "describe the picture .")] * 2, return_tensors="pt")
    assert all(torch.equal(batch[k], read[k]) for k in batch)
    with torch.no_grad(): assert torch.equal(model(**batch).logits, again.eval()(**read).logits)


def test_generation_with_cache_without_and_from_features(small):
    model, processor = small
    batch = processor(images=pictures(3), text=[prompt(processor, t) for t in ("the circle ?", "describe the picture .", "left of the red square ?")],
                      return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(**batch, **settings)
    assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))
    features = mini.encode_images(model, batch.pop("pixel_values"), batch=2)
    assert features.shape == (3, 9, 64)
    assert torch.equal(cached, model.generate(**batch, **settings, mm_encoder_outputs={"image": mini.image_output(features)}))


def test_left_padding_changes_nothing(small):
    model, processor = small
    images, texts = pictures(2), [prompt(processor, "the circle ?"), prompt(processor, "a red square left of the blue circle ?")]
    both = processor(images=images, text=texts, return_tensors="pt", padding=True)
    alone = processor(images=images[:1], text=texts[:1], return_tensors="pt")
    with torch.no_grad(): torch.testing.assert_close(model(**both).logits[0, -1], model(**alone).logits[0, -1], rtol=1e-4, atol=1e-5)


def test_missing_base_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match="model.safetensors"): mini.load_base(tmp_path)


def test_base_is_small_plain_and_float32_when_loaded(base):
    files = [p for p in (mini.ASSETS / "base").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".jinja", ".md"}
    assert {p.dtype for p in base[0].parameters()} == {torch.float32} and not base[0].training
    assert not any(p.requires_grad for p in base[0].model.vision_tower.parameters())


def test_base_has_the_shipped_tower(base):
    from safetensors.torch import load_file

    tower, stored = base[0].model.vision_tower.state_dict(), load_file(mini.ASSETS / "tower" / "model.safetensors")
    assert all(torch.equal(tower[k], v.float()) for k, v in stored.items()) and len(tower) == len(stored)


def test_base_knows_every_word_of_the_benchmark(base):
    from strlora.data.mini.bench import vocabulary

    tokenizer = base[1].tokenizer
    assert [w for w in vocabulary() if tokenizer(w)["input_ids"] in ([], [tokenizer.unk_token_id]) or len(tokenizer(w)["input_ids"]) > 1] == []


def test_base_describes_new_pictures(base):
    import random

    from strlora.data.mini.captions import MAKERS, PROMPTS, SAY
    from strlora.data.mini.scenes import draw

    model, processor = base
    rng = random.Random("test of the base")
    facts = [MAKERS[kind](rng) for kind in ("symbol", "place", "bars", "candles", "road", "aerial") for _ in range(5)]
    images = [draw(one) for one in facts]
    batch = processor(images=images, text=[prompt(processor, PROMPTS[0])] * len(images), return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=40, do_sample=False)[:, batch["input_ids"].shape[1]:]
    said = processor.tokenizer.batch_decode(out, skip_special_tokens=True)
    true = [text in {t for seed in range(60) for t in SAY[one["kind"]](one, random.Random(seed))} for one, text in zip(facts, said, strict=True)]
    assert np.mean(true) >= 0.8


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_tower_is_the_one_that_its_note_describes():
    folder = mini.ASSETS / "tower"
    assert sha256(folder / "model.safetensors") in (folder / "README.md").read_text(encoding="utf-8")


def test_record_of_the_base_names_its_making():
    from strlora.core import read_json

    record = read_json(mini.ASSETS / "base" / "training.json")
    assert record["weights"] == sha256(mini.ASSETS / "base" / "model.safetensors")
    assert set(record) >= {"plan", "sha256", "command", "seconds", "loss", "torch", "threads"} and record["loss"][-1] < record["loss"][0] / 10
