"What importing costs, and when PEFT learns of the method."
import json
import subprocess
import sys

import pytest

import strlora
from strlora.core import SpecError


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_light():
    heavy = python("import sys, strlora, json\nprint(json.dumps([m for m in ('torch', 'peft', 'transformers', 'numpy', 'pandas') if m in sys.modules]))")
    assert heavy == []
    assert set(strlora._NAMES) <= set(dir(strlora))
    with pytest.raises(AttributeError, match="no attribute"): getattr(strlora, "StrLoraConfigs")  # noqa: B009


def test_registered_at_once_if_peft_is_there():
    stub = "import sys, types, json, importlib; seen = []\n" \
           "importlib.import_module = lambda name: seen.append(name) or types.SimpleNamespace(register=lambda: None)\n"
    assert python(stub + "import strlora; print(json.dumps(seen))") == []
    assert python(stub + "sys.modules['peft'] = types.ModuleType('peft'); import strlora; print(json.dumps(seen))") == ["strlora.tuner.register"]


def test_registered_on_first_use():
    assert python("import strlora; strlora.StrLoraConfig(); strlora.register(); import peft, json\n"
                  "print(json.dumps(['STRLORA' in peft.PeftType.__members__, peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING['STRLORA'].__name__]))") \
        == [True, "StrLoraConfig"]


@pytest.mark.parametrize("wrong, message", [
    (dict(r=10), "Use r=8 or r=12"), (dict(r=0), "at least 1"), (dict(r=8.5), "whole number"), (dict(num_experts=0), "at least 1"),
    (dict(top_k=5), "from 0 to 4"), (dict(sub_top_k=5), "from 0 to 4"), (dict(top_k=-1), "from 0 to 4"), (dict(router="two_stge"), "two_stage"),
    (dict(stage1="priors"), "prior"), (dict(instruction_norm="rms"), "layer"), (dict(kl_weight=-0.1), "at least 0"),
    (dict(kl_weight=float("nan")), "at least 0"), (dict(lora_dropout=1.5), "from 0 to 1"), (dict(ema_decay=2), "from 0 to 1"),
    (dict(kl_temperature=0), "number"), (dict(attention_dim=-8), "at least 0"), (dict(lora_alpha=True), "number"), (dict(bias="lora_only"), "strlora_only")])
def test_settings_that_do_not_fit(wrong, message):
    with pytest.raises(SpecError, match=message): strlora.StrLoraConfig(**wrong)


def test_presets():
    assert strlora.StrLoraConfig(router="constant", num_experts=1).top_k == 2  # the constant router has no k
    released = strlora.StrLoraConfig.released(r=16)
    assert (released.r, released.num_experts, released.lora_alpha, released.top_k, released.sub_top_k) == (16, 4, 128, 2, 1)
    assert (released.stage1, released.instruction_norm, released.kl_padding, released.ema_decay) == ("frozen", "none", True, 0.999)
    with pytest.raises(SpecError, match="top_k"): strlora.StrLoraConfig.released(topk=2)
