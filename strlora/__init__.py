"StrLoRA: streaming continual visual instruction tuning with routed LoRA experts."
__version__ = "0.1.0"
