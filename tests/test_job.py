"The base model of a run: where it may come from, in which numbers it is kept, and what is refused before anything is loaded."
import importlib.util
import json
import types

import huggingface_hub
import pytest
import tiny
import torch
from chats import internvl
from peft import get_peft_model
from small import make_base, session

import strlora
from strlora.backbones.processor import InternVLImageProcessor
from strlora.core import SpecError, read_json
from strlora.folder import parameter_counts
from strlora.job import load_model, packed
from strlora.trainer import train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A native InternVL with its processor."
    where, processor = tmp_path_factory.mktemp("internvl"), internvl()
    tiny.internvl(pixels=16, image=processor.image_token_id, vocab=400).save_pretrained(where)
    processor.save_pretrained(where)
    return where


def settings(folder, **changes):
    found = read_json(folder/"config.json") | changes
    (folder/"config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


# --- where it comes from --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder(folder, dtype):
    "InternVL's own processor needs a video library; ours reads the same files."
    model, processor = load_model(str(folder), dtype)
    assert type(processor) is InternVLImageProcessor and {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    again = tiny.internvl(pixels=16, image=processor.image_token_id, vocab=400).to(model.dtype).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mini_base(dtype):
    model, _ = load_model("mini", dtype)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}


def test_a_name_is_looked_up_in_the_cache(folder, tmp_path, monkeypatch):
    cache, commit = tmp_path/"models--org--name", "0" * 40
    (cache/"refs").mkdir(parents=True)
    (cache/"refs"/"main").write_text(commit)
    (cache/"snapshots"/commit).mkdir(parents=True)
    for file in folder.iterdir(): (cache/"snapshots"/commit/file.name).symlink_to(file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model, processor = load_model("org/name")
    assert model.config.model_type == "internvl" and processor.image_seq_length == 4
    (cache/"snapshots"/commit/"model.safetensors").unlink()
    with pytest.raises(SpecError, match="model.base: expected org/name in the local cache or on the hub.*hf download org/name"):
        load_model("org/name")


@pytest.mark.parametrize("base, words", [
    ("org/absent", r"model.base: expected org/absent in the local cache or on the hub, found .*hf download org/absent"),
    ("absent", r"`mini`, a folder with a model, or a name on the hub \(org/name\), found 'absent'"),
    ("a/b/c", "found 'a/b/c'"), ("/absent", "found '/absent'"), ("../absent", r"found '\.\./absent'")])
def test_a_base_that_is_nowhere(base, words):
    with pytest.raises(SpecError, match=words) as caught: load_model(base)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, words", [
    (dict(model_type="internvl_chat"), r"found model_type 'internvl_chat'. Convert it first: strlora convert \S+ DST"),
    (dict(model_type="evil", auto_map={"AutoModelForImageTextToText": "evil.Model"}), "found model_type 'evil'. Code of a checkpoint is never run"),
    (dict(model_type=None), "found model_type None")], ids=str)
def test_models_that_would_need_code(folder, tmp_path, change, words):
    copy = tmp_path/"copy"
    copy.mkdir()
    for file in folder.iterdir(): (copy/file.name).write_bytes(file.read_bytes())
    (copy/"evil.py").write_text("import os; os._exit(3)")
    settings(copy, **change)
    with pytest.raises(SpecError, match=words): load_model(str(copy))


def test_a_folder_that_is_not_whole(folder, tmp_path):
    for file in folder.iterdir(): (tmp_path/file.name).write_bytes(file.read_bytes())
    (tmp_path/"model.safetensors").write_bytes((folder/"model.safetensors").read_bytes()[:-10])
    with pytest.raises(SpecError, match="model.base: expected a whole model.*Complete the folder"): load_model(str(tmp_path))
    (tmp_path/"model.safetensors").rename(tmp_path/"pytorch_model.bin")
    with pytest.raises(SpecError, match="Pickles are not read"): load_model(str(tmp_path))
    (tmp_path/"config.json").unlink()
    with pytest.raises(SpecError, match="Complete the folder"): load_model(str(tmp_path))


# --- its numbers ----------------------------------------------------------------------------------------------------

def test_a_base_in_bfloat16_trains_adapters_in_float32(tmp_path):
    made = session(make_base(tmp_path), "method=strlora", "model.dtype=bfloat16")
    made.trainer.moment("stream_start")
    made.trainer.model.train()
    made.trainer.moment("chunk_start")
    rows = [train_step(made.trainer, make(), 1.0) for make in made.trainer.batches(made.seen.chunks[0])[:2]]
    assert all(0 < r["loss"] < 20 and r["grad_norm"] > 0 for r in rows)
    kinds = {p.requires_grad: p.dtype for p in made.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16} and made.ask("proxy", 1) and made.route(1)


@pytest.mark.parametrize("device, here, found", [("cpu", True, "no GPU"), ("cuda", False, "no bitsandbytes"), ("cpu", False, "no GPU and no bitsandbytes")])
def test_four_bits_need_a_gpu_and_a_package(folder, monkeypatch, device, here, found):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if here else None)
    with pytest.raises(SpecError, match=rf"model.quantize: expected a GPU in use and the package bitsandbytes, found {found}\. .*"
                                        "pip install bitsandbytes.*model.quantize = 'no'"):
        load_model(str(folder), quantize="4bit", device=device)
    monkeypatch.undo()
    with pytest.raises(SpecError, match="model.quantize"): session("mini", "model.quantize=4bit")


def test_what_is_packed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    how = packed("internvl", "cuda:0")
    config = how["quantization_config"]
    assert how["device_map"] == {"": "cuda:0"} and config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    assert config.bnb_4bit_use_double_quant and config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.llm_int8_skip_modules == ["vision_tower", "multi_modal_projector", "lm_head"]
    assert packed("qwen2_5_vl", "cuda")["quantization_config"].llm_int8_skip_modules == ["visual", "merger", "lm_head"]


class Packed(torch.nn.Linear):
    "Like bitsandbytes' linear layer: bytes for weights, of another shape, and their meaning kept beside them."

    @classmethod
    def of(cls, layer):
        made = cls(1, 1, bias=False)
        made.in_features, made.out_features, made.bias = layer.in_features, layer.out_features, layer.bias
        made.scale = layer.weight.detach().abs().amax() / 127
        codes = (layer.weight.detach() / made.scale).round().to(torch.int8)
        made.weight = torch.nn.Parameter(codes.view(torch.uint8).reshape(-1, 1), requires_grad=False)
        made.weight.quant_state = types.SimpleNamespace(shape=codes.shape)
        return made

    def whole(self): return self.weight.view(torch.int8).reshape(self.out_features, self.in_features).float() * self.scale

    def forward(self, x): return torch.nn.functional.linear(x, self.whole().to(x.dtype), self.bias)


def test_adapters_work_beside_packed_weights():
    "The same adapter over packed layers, and over plain ones that hold what the packed ones mean: equal numbers, equal gradients."
    def config(): return strlora.StrLoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, attention_dim=8)
    low, plain = tiny.internvl(), tiny.internvl()
    for name, layer in list(low.model.language_model.named_modules()):
        if not isinstance(layer, torch.nn.Linear): continue
        made = Packed.of(layer)
        low.model.language_model.set_submodule(name, made)
        plain.model.language_model.get_submodule(name).weight.data = made.whole()
    models = [tiny.stir(get_peft_model(base, config())) for base in (low, plain) if torch.manual_seed(0)]
    given = tiny.batch(tiny.internvl())
    out = [model(**given) for model in models]
    for one in out: one.loss.backward()
    assert torch.equal(out[0].logits, out[1].logits) and torch.equal(out[0].penalties["kl"], out[1].penalties["kl"])
    grads = [{n: p.grad for n, p in model.named_parameters() if p.grad is not None} for model in models]
    assert grads[0].keys() == grads[1].keys() and grads[0] and all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())
    assert {p.dtype for p in models[0].parameters() if p.requires_grad} == {torch.float32}
    assert any(p.dtype == torch.uint8 for p in models[0].parameters())
    assert parameter_counts(models[0]) == parameter_counts(models[1]), "counted as weights, not as bytes"
