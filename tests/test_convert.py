"A checkpoint of InternVL's own code becomes one of transformers: the same numbers, or one clear error and nothing written."
import errno
import json
import os
import re
import shutil

import pytest
import torch
from chats import picture
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_cli import said
from transformers import AutoConfig, AutoModelForImageTextToText, InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig

from strlora.backbones import shards as module
from strlora.backbones.convert import IMAGES, convert
from strlora.backbones.processor import InternVLImageProcessor, toy_tokenizer
from strlora.backbones.table import INTERNVL_TEMPLATE
from strlora.core import CheckpointError, SpecError

VOCAB = 320


def native(kind="qwen3", tied=False, norm="layer_norm", qk=False, bias=True):
    "A model of transformers whose every number is random."
    torch.manual_seed(0)
    text = AutoConfig.for_model(kind, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                num_key_value_heads=2, head_dim=8, max_position_embeddings=256, rope_theta=5e5, tie_word_embeddings=tied)
    vision = InternVLVisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=24,
                                  patch_size=4, attention_bias=bias, norm_type=norm, use_qk_norm=qk)
    image = toy_tokenizer().context_image_token_id
    model = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text, image_token_id=image, image_seq_length=9,
                                                            tie_word_embeddings=tied))
    with torch.no_grad():
        for p in model.parameters(): p.normal_(std=0.3)
    return model.eval()


def backwards(state):
    "The names of InternVL's own code, written down without the rules of the package."
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.")
        if name == "lm_head.weight": out["language_model.lm_head.weight"] = tensor
        elif name.startswith("language_model."): out["language_model.model." + name.split(".", 1)[1]] = tensor
        elif name.startswith("multi_modal_projector."):
            _, layer, kind = name.split(".")
            out[f"mlp1.{dict(layer_norm=0, linear_1=1, linear_2=3)[layer]}.{kind}"] = tensor
        elif name.startswith("vision_tower.embeddings."):
            end = {"cls_token": "class_embedding", "position_embeddings": "position_embedding",
                   "patch_embeddings.projection.weight": "patch_embedding.weight", "patch_embeddings.projection.bias": "patch_embedding.bias"}
            out["vision_model.embeddings." + end[name.split(".", 2)[2]]] = tensor
        else:
            _, _, _, number, rest = name.split(".", 4)
            if rest.startswith(("attention.k_proj", "attention.v_proj")): continue
            if rest.startswith("attention.q_proj"):
                tensor = torch.cat([state[f"model.{name}".replace("q_proj", f"{part}_proj")] for part in "qkv"])
            for old, new in (("attention.q_proj", "attn.qkv"), ("attention.projection_layer", "attn.proj"), ("attention.", "attn."),
                             ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("lambda_", "ls")):
                rest = rest.replace(old, new)
            out[f"vision_model.encoder.layers.{number}.{rest}"] = tensor
    return {name: tensor.clone().contiguous() for name, tensor in out.items()}


def original(folder, model, shards=1, **changes):
    "Write a model as InternVL's own code would have."
    folder.mkdir()
    text, vision = model.config.text_config.to_dict(), model.config.vision_config
    rope = text.pop("rope_parameters")
    tower = {"model_type": "intern_vit_6b", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
             "image_size": 24, "patch_size": 4, "qkv_bias": vision.attention_bias, "qk_normalization": vision.use_qk_norm,
             "norm_type": vision.norm_type, "use_flash_attn": True, "drop_path_rate": 0.1}
    config = {"model_type": "internvl_chat", "architectures": ["InternVLChatModel"], "auto_map": {"AutoModel": "evil.InternVLChatModel"},
              "vision_config": tower, "llm_config": {**text, "rope_theta": rope["rope_theta"], "top_p": 0.9}, "downsample_ratio": 0.5,
              "dynamic_image_size": True, "max_dynamic_patch": 12, "use_thumbnail": True, "ps_version": "v2", "select_layer": -1,
              "force_image_size": 24, "torch_dtype": "float32", **changes}
    (folder/"config.json").write_text(json.dumps(config))
    (folder/"evil.py").write_text("import os; os._exit(3)")
    (folder/"preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}))
    (folder/"generation_config.json").write_text(json.dumps({"eos_token_id": 311}))
    (folder/"LICENSE").write_text("as you like")
    qwen_tokenizer(folder)
    weights = backwards({k: v for k, v in model.state_dict().items() if not (k == "lm_head.weight" and model.config.tie_word_embeddings)})
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    held = {key: names[i % shards] for i, key in enumerate(weights)}
    for name in names: save_file({k: t for k, t in weights.items() if held[k] == name}, folder/name, {"format": "pt"})
    if shards > 1: (folder/"model.safetensors.index.json").write_text(json.dumps({"weight_map": held}))
    return weights


def qwen_tokenizer(folder):
    "A tokenizer in the files that Qwen's has on the hub: vocabulary, merges, added tokens, and a template that must not be used."
    tokenizer = toy_tokenizer()
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = {str(i): {"content": t.content, "special": True} for i, t in tokenizer.added_tokens_decoder.items()}
    (folder/"vocab.json").write_text(json.dumps(core["vocab"]))
    (folder/"merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in core["merges"]) + "\n")
    (folder/"added_tokens.json").write_text(json.dumps({t["content"]: int(i) for i, t in added.items()}))
    (folder/"tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "additional_special_tokens": ["<img>", "</img>"],
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "chat_template": "{{ messages[0]['content'] }}", "model_max_length": 64}))


@pytest.fixture
def source(tmp_path):
    original(tmp_path/"source", native())
    return tmp_path/"source"


def inputs(processor):
    talk = [{"role": "user", "content": [{"type": "image", "image": picture(48, 24)}, {"type": "text", "text": "What colour is the car?"}]}]
    return processor.apply_chat_template([talk], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)


def stored(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize("shards, settings", [
    (1, {}), (3, {"tied": True}), (2, {"kind": "qwen2"}), (1, {"kind": "llama", "norm": "rms_norm", "qk": True, "bias": False})], ids=str)
def test_key_by_key_and_logit_by_logit(tmp_path, shards, settings):
    model = native(**settings)
    original(tmp_path/"source", model, shards)
    report = convert(tmp_path/"source", tmp_path/"new"/"native", limit=40_000)
    model.save_pretrained(tmp_path/"own")
    ours, own = stored(tmp_path/"new"/"native"), stored(tmp_path/"own")
    assert list(sorted(ours)) == sorted(own) and all(torch.equal(ours[k], own[k]) for k in own)
    assert report["status"] == "converted" and report["tensors"] == len(own) and report["files"] > 1
    assert report["bytes"] == sum(t.numel() * 4 for t in own.values())
    assert max(os.path.getsize(f) for f in (tmp_path/"new"/"native").glob("*.safetensors")) < 50_000
    again, loading = AutoModelForImageTextToText.from_pretrained(tmp_path/"new"/"native", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = InternVLImageProcessor.from_pretrained(tmp_path/"new"/"native")
    given = inputs(processor)
    assert given["pixel_values"].shape[0] == 3, "two tiles and the view of the whole"
    with torch.no_grad(): assert torch.equal(again.eval()(**given).logits, model(**given).logits)


def test_what_goes_with_the_weights(source, tmp_path):
    report = convert(source, tmp_path/"native")
    names = {p.name for p in (tmp_path/"native").iterdir()}
    assert "evil.py" not in names and "LICENSE" in names and report["files left"] == ["evil.py"]
    assert {"auto_map", "llm_config.top_p", "vision_config.use_flash_attn"} <= set(report["settings not used"])
    assert "evil" not in "".join(p.read_text() for p in (tmp_path/"native").glob("*.json"))
    processor = InternVLImageProcessor.from_pretrained(tmp_path/"native")
    tokenizer, toy = processor.tokenizer, toy_tokenizer()
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>what colour, ça va?<|im_end|>"
    assert tokenizer(text)["input_ids"] == toy(text)["input_ids"] and tokenizer.context_image_token_id == toy.context_image_token_id
    assert processor.chat_template == INTERNVL_TEMPLATE and processor.crop_to_patches and processor.image_seq_length == 9
    assert tuple(processor.image_processor.image_mean) == (0.5, 0.4, 0.3) and tuple(processor.image_processor.image_std) == (0.2, 0.3, 0.4)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path/"native")
    assert model.generation_config.eos_token_id == [tokenizer.convert_tokens_to_ids("<|im_end|>"), 311]
    assert model.dtype == torch.float32 and model.config.text_config.rope_parameters["rope_theta"] == 5e5
    saved = json.loads((tmp_path/"native"/"processor_config.json").read_text())
    assert saved["processor_class"] == "InternVLProcessor", "with torchvision, transformers' own processor is found by name"


def test_numbers_are_copied_bit_by_bit(tmp_path):
    "In bfloat16, as real checkpoints are."
    model = native().to(torch.bfloat16)
    original(tmp_path/"source", model, torch_dtype="bfloat16")
    convert(tmp_path/"source", tmp_path/"native")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path/"native")
    assert again.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items(): assert torch.equal(again.state_dict()[name], tensor)


def test_what_is_computed_anyway_is_not_needed(tmp_path):
    "Word embeddings shared with the output, and the frequencies that old files hold."
    model = native(tied=True)
    weights = original(tmp_path/"source", model)
    weights |= {"language_model.lm_head.weight": torch.zeros(VOCAB, 32), "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights, tmp_path/"source"/"model.safetensors")
    report = convert(tmp_path/"source", tmp_path/"native")
    assert len(report["tensors not needed"]) == 2 and "language_model.lm_head.weight" not in stored(tmp_path/"native")


def test_a_single_tile(tmp_path):
    original(tmp_path/"source", native(), dynamic_image_size=False)
    convert(tmp_path/"source", tmp_path/"native")
    assert inputs(InternVLImageProcessor.from_pretrained(tmp_path/"native"))["pixel_values"].shape[0] == 1


# --- what is refused ------------------------------------------------------------------------------------------------

def rewrite(change):
    def damage(folder):
        weights = load_file(folder/"model.safetensors")
        change(weights)
        save_file(weights, folder/"model.safetensors")
    return damage


def settings(name, **changes):
    def damage(folder):
        found = json.loads((folder/name).read_text())
        for key, value in changes.items():
            if value is None: found.pop(key)
            else: found[key] = found[key] | value if isinstance(value, dict) and isinstance(found.get(key), dict) else value
        (folder/name).write_text(json.dumps(found))
    return damage


def pickled(folder):
    (folder/"model.safetensors").rename(folder/"pytorch_model.bin")


def cut(folder):
    whole = (folder/"model.safetensors").read_bytes()
    (folder/"model.safetensors").write_bytes(whole[:len(whole) // 2])


def index(listed):
    return lambda folder: (folder/"model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def wordless(folder):
    found = json.loads((folder/"added_tokens.json").read_text())
    (folder/"added_tokens.json").write_text(json.dumps({k: v for k, v in found.items() if k != "</img>"}))
    settings("tokenizer_config.json", additional_special_tokens=[], added_tokens_decoder=None)(folder)


KEY = "vision_model.encoder.layers.1.attn.qkv.weight"
DAMAGE = {
    "unknown key": (rewrite(lambda w: w.update(extra=torch.zeros(2))), CheckpointError, "unknown tensor 'extra'"),
    "a third block": (rewrite(lambda w: w.update({KEY.replace(".1.", ".2."): torch.zeros(48, 16)})), CheckpointError, "unknown tensor 'vision"),
    "missing key": (rewrite(lambda w: w.pop(KEY)), CheckpointError, r"without 'vision_tower.*k_proj.weight'.*fetch all its files"),
    "wrong shape": (rewrite(lambda w: w.update({KEY: torch.zeros(48, 15)})), CheckpointError, r"qkv.weight: expected shape \(48, 16\), found \(48, 15\)"),
    "integers": (rewrite(lambda w: w.update({KEY: torch.zeros(48, 16, dtype=torch.int8)})), CheckpointError, "found I8.*not quantised"),
    "pickle": (pickled, CheckpointError, "found pytorch_model.bin. A pickle runs code"),
    "no weights": (lambda f: (f/"model.safetensors").unlink(), CheckpointError, "found no weights"),
    "cut off": (cut, CheckpointError, "model.safetensors: expected a whole safetensors file.*Fetch this file anew"),
    "empty": (lambda f: (f/"model.safetensors").write_bytes(b""), CheckpointError, "expected a whole safetensors file"),
    "index to elsewhere": (index({"a": "../secret.safetensors"}), CheckpointError, "names of safetensors files beside it"),
    "index to a pickle": (index({"a": "pytorch_model.bin"}), CheckpointError, "names of safetensors files beside it"),
    "index without file": (index({"a": "model-2.safetensors"}), CheckpointError, "expected a whole safetensors file"),
    "index of another version": (index({KEY: "model.safetensors"}), CheckpointError, "expected '.*' in no file, as the index says"),
    "index with more": (lambda f: index({k: "model.safetensors" for k in [*load_file(f/"model.safetensors"), "more"]})(f), CheckpointError,
                        "expected 'more' in model.safetensors.*found nowhere"),
    "no JSON": (lambda f: (f/"config.json").write_text("{"), CheckpointError, "config.json: expected a JSON file"),
    "no config": (lambda f: (f/"config.json").unlink(), SpecError, "a folder with config.json"),
    "not InternVL": (settings("config.json", model_type="llava"), SpecError, "found 'llava'"),
    "InternLM2": (settings("config.json", llm_config={"model_type": "internlm2"}), SpecError, "llm_config: expected a language model"),
    "old pixel shuffle": (settings("config.json", ps_version="v1"), SpecError, "ps_version: expected 'v2', found 'v1'"),
    "no pixel shuffle": (settings("config.json", ps_version=None), SpecError, "ps_version: expected 'v2', found 'v1'"),
    "other tiles": (settings("config.json", force_image_size=448), SpecError, "force_image_size"),
    "no thumbnail": (settings("config.json", use_thumbnail=False), SpecError, "use_thumbnail"),
    "adapter inside": (settings("config.json", use_llm_lora=16), SpecError, "use_llm_lora"),
    "other kinds": (settings("config.json", vision_config={"hidden_size": "wide"}), SpecError, "a configuration of InternVL"),
    "wider than said": (settings("config.json", llm_config={"intermediate_size": 40}), CheckpointError, "expected shape"),
    "few words": (settings("config.json", llm_config={"vocab_size": 300}), SpecError, "<IMG_CONTEXT>: expected an id below vocab_size 300"),
    "no special token": (wordless, SpecError, "none called </img>"),
    "tokenizer of its own": (settings("tokenizer_config.json", tokenizer_class="EvilTokenizer"), SpecError, "tokenizer_config.json: expected a tokenizer of "
                             "transformers.*one that needs code of its own is not converted"),
    "no tokenizer": (lambda f: (f/"tokenizer_config.json").unlink(), CheckpointError, "tokenizer_config.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_one_error_and_nothing_written(source, tmp_path, name):
    damage, error, words = DAMAGE[name]
    damage(source)
    for dry_run in (True, False):
        with pytest.raises(error, match=words) as caught: convert(source, tmp_path/"native", dry_run)
        assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")], ids=str)
def test_a_disk_that_fills_up(source, tmp_path, monkeypatch, error):
    def full(*args): raise error
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"native: expected [\d.]+ GB free, found a full disk.*Nothing was left behind"):
        convert(source, tmp_path/"native")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_disk_that_is_full_from_the_start(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match="found a full disk"): convert(source, tmp_path/"native")
    assert convert(source, tmp_path/"native", dry_run=True)["status"] == "could be converted"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_another_error_of_the_system_stays_itself(source, tmp_path, monkeypatch):
    def denied(*args): raise PermissionError(errno.EACCES, "no")
    monkeypatch.setattr(module, "save_file", denied)
    with pytest.raises(PermissionError): convert(source, tmp_path/"native")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_only_a_new_or_empty_target(source, tmp_path):
    (tmp_path/"native").mkdir()
    (tmp_path/"native"/"mine.txt").write_text("keep")
    for taken in (tmp_path/"native", source, source/"config.json"):
        with pytest.raises(SpecError, match="a new or empty folder"): convert(source, taken)
    assert [p.name for p in (tmp_path/"native").iterdir()] == ["mine.txt"]
    (tmp_path/"native"/"mine.txt").unlink()
    assert convert(source, tmp_path/"native")["status"] == "converted"


def test_links_are_followed(source, tmp_path):
    "A snapshot in the cache of the hub is a folder of links."
    snapshot = tmp_path/"snapshot"
    snapshot.mkdir()
    for file in source.iterdir(): (snapshot/file.name).symlink_to(file)
    convert(snapshot, tmp_path/"native")
    assert not any(p.is_symlink() for p in (tmp_path/"native").iterdir())


# --- the command line -----------------------------------------------------------------------------------------------

def test_the_verb(source, tmp_path):
    code, out, err = said("convert", source, tmp_path/"native", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0 and found["status"] == "could be converted" and not (tmp_path/"native").exists()
    code, out, err = said("convert", source, tmp_path/"native")
    assert code == 0 and re.search(r"status +converted", out) and f"{found['tensors']}" in out
    with safe_open(tmp_path/"native"/"model.safetensors", "pt") as file: assert len(list(file.keys())) == found["tensors"]
    code, out, err = said("convert", tmp_path/"native", tmp_path/"again")
    assert code == 0 and "nothing to do" in out and not (tmp_path/"again").exists()
    assert json.loads(said("convert", tmp_path/"native", tmp_path/"again", "--json")[1])["layout"] == "internvl"
    code, out, err = said("convert", tmp_path/"none", tmp_path/"again")
    assert code == 2 and not out and err.startswith("strlora: ") and err.count("\n") == 1 and "config.json" in err
    assert set(IMAGES.values()) == {"<img>", "</img>", "<IMG_CONTEXT>"}


def test_a_name_on_the_hub_is_to_be_downloaded_first(tmp_path):
    code, out, err = said("convert", "OpenGVLab/InternVL3_5-8B", tmp_path/"native")
    assert code == 2 and not out and err.count("\n") == 1 and "hf download OpenGVLab/InternVL3_5-8B --local-dir SRC" in err
    assert not (tmp_path/"native").exists()
