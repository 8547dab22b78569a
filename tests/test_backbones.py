"The table of backbones: every row against a real architecture at toy size, and against the tuner's own default."
import re

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from strlora.backbones.mini import build_model, build_tokenizer
from strlora.backbones.processor import InternVLImageProcessor, toy_processor
from strlora.backbones.table import BACKBONES, Backbone, backbone_of, parts_of, target_regex
from strlora.core import SpecError
from strlora.tuner.model import default_targets

TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            vocab_size=64, pad_token_id=0)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
QWEN_VISION = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32)


def auto(name, **settings):
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, image_token_id=5, **settings))


MODELS = {
    "strlora_mini": lambda: build_model(build_tokenizer(["what", "is", "red"]), layers=2),
    "internvl": tiny.internvl,
    "gemma3": tiny.gemma3,
    "qwen2_5_vl": lambda: auto("qwen2_5_vl", text_config=TEXT, vision_config=QWEN_VISION),
    "idefics3": lambda: auto("idefics3", text_config=TEXT | {"model_type": "llama"}, vision_config=VISION, scale_factor=2),
    "smolvlm": lambda: auto("smolvlm", text_config=TEXT | {"model_type": "llama"}, vision_config=VISION, scale_factor=2),
}


def test_every_row_has_a_model_here():
    assert set(MODELS) == set(BACKBONES)


@pytest.mark.parametrize("name", MODELS)
def test_row_fits_its_architecture(name):
    model = MODELS[name]()
    row, parts = backbone_of(model), parts_of(model)
    assert row.model_type == name and backbone_of(model.config) is row and backbone_of(name) is row
    language = {id(m) for m in parts.language_model.modules()}
    assert len(parts.linears) == 14 and all(isinstance(m, torch.nn.Linear) and id(m) in language for m in parts.linears.values())
    others = {id(m) for part in (parts.vision_tower, parts.language_model) for m in part.modules()}
    assert not others & {id(m) for m in parts.projector.modules()} or name == "qwen2_5_vl", "its merger is inside the tower"
    assert parts.image_token_id == getattr(model.config, row.image_token)


@pytest.mark.parametrize("name", MODELS)
def test_scaling_of_embeddings(name):
    model = MODELS[name]()
    table, ids = model.get_input_embeddings(), torch.arange(6, 9)
    ratio = (table(ids).norm() / table.weight[ids].norm()).item()
    assert (abs(ratio - 1) > 0.01) == backbone_of(name).scaled_embeddings


@pytest.mark.parametrize("name", [name for name, row in BACKBONES.items() if row.language_model == "model.language_model"])
def test_row_and_tuner_name_the_same_layers(name):
    model = MODELS[name]()
    chosen = default_targets(model)
    layers = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and re.fullmatch(chosen, n)}
    assert layers == set(parts_of(model).linears)


@pytest.mark.parametrize("name", MODELS)
def test_rows_serve_peft(name):
    row = backbone_of(name)
    model = get_peft_model(MODELS[name](), LoraConfig(r=2, target_modules=target_regex(name), modules_to_save=row.modules_to_save))
    assert backbone_of(model) is row
    trained = {n.split(".lora_")[0] for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n}
    assert len(trained) == 14 and not any("vis" in n for n in trained)
    assert any("modules_to_save" in n for n, p in model.named_parameters() if p.requires_grad)


def test_unknown_types():
    with pytest.raises(SpecError, match="unknown model type 'intern_vl', expected 'internvl'.*Add a row"): backbone_of("intern_vl")
    with pytest.raises(SpecError, match="unknown model type 'Linear'"): backbone_of(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("field, value", [("vision_tower", "model.eye"), ("projector", "model.bridge"), ("language_model", "model.reader"),
                                          ("linears", "(w1|w2)"), ("image_token", "picture_token_id")])
def test_rows_that_do_not_fit_say_where(field, value):
    with pytest.raises(SpecError, match=rf"BACKBONES\['internvl'\].{field}"):
        parts_of(tiny.internvl(), Backbone("internvl", **{field: value}))


def test_a_row_can_be_added(monkeypatch):
    monkeypatch.setitem(BACKBONES, "mine", Backbone("mine", "model.reader", "model.eye", "model.bridge"))
    assert target_regex("mine").startswith(".*reader.*")


def test_processor_saves_and_loads(tmp_path):
    processor = toy_processor(crop_to_patches=True, image_seq_length=9)
    processor.save_pretrained(tmp_path)
    again = InternVLImageProcessor.from_pretrained(tmp_path)
    assert (again.image_seq_length, again.crop_to_patches, again.images_kwargs) == (9, True, {"crop_to_patches": True})
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab() and again.chat_template == processor.chat_template
