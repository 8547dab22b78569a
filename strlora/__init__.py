"StrLoRA: streaming continual visual instruction tuning with routed LoRA experts."
import importlib
import sys

__version__ = "0.1.0"

_NAMES = {
    "StrLoraConfig": "strlora.tuner.config",
    "StrLoraModel": "strlora.tuner.model",
    "EmaCallback": "strlora.tuner.model",
    "update_ema": "strlora.tuner.state",
    "observe_batch": "strlora.tuner.state",
    "penalties_of": "strlora.tuner.root",
    "Collator": "strlora.backbones.collate",
    "load_base": "strlora.backbones.mini",
}
__all__ = ["register", *_NAMES]


def _register_peft():
    importlib.import_module("strlora.tuner.register").register()


def register():
    "Make saved adapters loadable by PEFT and the small base model by transformers' Auto classes."
    _register_peft()
    importlib.import_module("strlora.backbones.mini").register()


def __getattr__(name):
    if name not in _NAMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _register_peft()
    value = globals()[name] = getattr(importlib.import_module(_NAMES[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *_NAMES})


if "peft" in sys.modules: _register_peft()
