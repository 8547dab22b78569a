"StrLoRA: streaming continual visual instruction tuning with routed LoRA experts."
import importlib
import sys

__version__ = "0.1.0"

_NAMES = {
    "StrLoraConfig": "strlora.tuner.config",
    "StrLoraModel": "strlora.tuner.model",
    "EmaCallback": "strlora.tuner.model",
    "update_ema": "strlora.tuner.model",
    "penalties_of": "strlora.tuner.call",
}
__all__ = ["register", *_NAMES]


def register():
    "Make `StrLoraConfig` known to PEFT, so that saved adapters load; importing any public name does it too."
    importlib.import_module("strlora.tuner.register").register()


def __getattr__(name):
    if name not in _NAMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register()
    value = globals()[name] = getattr(importlib.import_module(_NAMES[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *_NAMES})


if "peft" in sys.modules: register()
