"Write experiments/paper: one file a backbone and method, only what differs from the defaults, every value with its source."
from pathlib import Path

from strlora.spec import as_dict, flat, resolve
from strlora.toml import written

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "paper"

BACKBONES = {
    "internvl3_5_8b": "InternVL3.5-8B-Pretrained",
    "internvl3_5_4b": "InternVL3.5-4B-Pretrained",
    "gemma3_4b": "Gemma3-4B-PT",
}
METHODS = ("strlora", "strlora_released", "strlora_prototypes", "lora", "ewc", "lwf", "replay", "olora", "moelora", "smolora",
           "smolora_released", "same", "branchlora", "joint", "zero_shot")

COMMON = {
    "seed": (42, "official scripts: 42 (there plus the rank)"),
    "scale": ("paper", "first folder of the results"),
    "stream.name": ("strcvit", "the released composition"),
    "stream.chunk_size": (2000, "official scripts"),
    "stream.data": ("data/StrCVIT", "folder of the released files, or a link to it; CC BY-NC 4.0, not shipped with this package"),
    "stream.images": ("data/images", "folder of their pictures, or a link to it"),
    "model.dtype": ("bfloat16", "official scripts"),
    "train.device": ("auto", "GPUs, if there are any"),
    "train.threads": (0, "ours: as the machine has them"),
    "train.precision": ("bf16", "official scripts"),
    "eval.full_every": (25, "ours: full sets once, after the last chunk (official: proxies only)"),
    "eval.prompts": (8, "ours: bounds the cache of keys and values (official: 1)"),
    "eval.max_new_tokens": (100, "official scripts"),
}
TRAINED = {
    "train.lr": (1e-4, "official scripts, chunk 1"),
    "train.lr_later": (2e-5, "official scripts, from chunk 2 on"),
    "train.batch_size": (2, "official scripts"),
    "train.accumulation": (16, "official scripts: 4 on each of 4 GPUs; 32 samples a step"),
    "train.gradient_checkpointing": (True, "official scripts"),
    "train.max_length": (4096, "official scripts, where another sample takes the place of a longer one"),
    "train.workers": (4, "ours: some cores for each GPU, which would wait for pictures to be decoded and cut into tiles"),
    "train.grad_norm_every": (63, "ours: once a chunk, 63 steps of 32 samples"),
    "settings.lora_dropout": (0.05, "official scripts: the framework's default"),
}
PROJECTOR = {"train.train_projector": (True, "official scripts for InternVL; its rate 1e-5 is the default")}
OWN = {
    "replay": {"settings.memory": (500, "ours: 1 % of 50 000 samples")},
    "lwf": {"settings.lwf_top_k": (64, "ours: bounds memory with a vocabulary of 10^5 words")},
    **{name: {"settings.init_experts": ("normal", "official code: deviation 0.01")} for name in ("strlora_released", "smolora_released")},
}
RELEASED = {
    ("strlora_released", "gemma3_4b"): {"settings.freeze_from_chunk": (4, "official scripts for Gemma; InternVL: 5")},
    **{("smolora_released", name): {"train.lr": (2e-5, "official scripts for SMoLoRA on InternVL: no higher rate in chunk 1"),
                                    "train.batch_size": (1, "official scripts for SMoLoRA on InternVL"),
                                    "train.accumulation": (32, "official scripts: 8 on each of 4 GPUs; 32 samples a step")}
       for name in ("internvl3_5_8b", "internvl3_5_4b")},
}
NOTES = {
    ("strlora_released", "gemma3_4b"): ("The official scripts for Gemma also train chunk 1 for three epochs with all experts, and freeze the prototypes from",
                                        "chunk 2 on. Here chunk 1 is one pass with top_k = 2, and all parts of a router freeze together."),
    ("ewc", ""): ("The official EWC changes no gradient; weight, decay and samples of the Fisher are ours.",),
    ("strlora_prototypes", ""): ("Experts, gate and springs are those of the mini benchmark before its search; nobody has searched them at this size.",),
    ("joint", ""): ("One chunk, so one learning rate: the official one of chunk 1.",),
}


def settings(backbone: str, method: str) -> dict[str, tuple]:
    "Dotted setting → value and source."
    base = {"model.base": (f"models/{backbone}", f"weights of {BACKBONES[backbone]}, or a link to them")}
    if method == "zero_shot": return {**COMMON, **base}
    projector = {} if backbone == "gemma3_4b" else PROJECTOR
    found = {**COMMON, **base, **TRAINED, **projector, **OWN.get(method, {}), **RELEASED.get((method, backbone), {})}
    if method == "joint": del found["train.lr_later"]
    return found


def text(backbone: str, method: str) -> str:
    "The file: tables in the order of the record, each value with its source behind it."
    known = flat(as_dict(resolve({"method": method})))
    found = {name: pair for name, pair in settings(backbone, method).items() if known.get(name, "") != pair[0]}  # unset places of files are not in the record
    what = "no training" if method == "zero_shot" else "25 x 2000 samples in steps of 32, proxies after every chunk, full sets after the last"
    head = [f"# {method} on {BACKBONES[backbone]}: {what}."]
    head += [f"# {line}" for key in ((method, ""), (method, backbone)) for line in NOTES.get(key, ())]
    head += ["# Written by tools/make_paper_specs.py; what is not here has its default (`strlora run FILE --dry-run` shows all)."]
    lines = [f"method = {written(method)}"] if method != "strlora" else []
    lines += [line(name, *pair) for name, pair in found.items() if "." not in name]
    parts = ["\n".join(lines)]
    for group in ("stream", "model", "train", "eval", "settings"):
        rows = [line(name.partition(".")[2], *pair) for name, pair in found.items() if name.startswith(f"{group}.")]
        if rows: parts.append("\n".join([f"[{group}]", *rows]))
    return "\n".join(head) + "\n" + "\n\n".join(parts) + "\n"


def line(name: str, value, source: str) -> str:
    return f"{name} = {written(value)}  # {source}"


def main() -> None:
    for backbone in BACKBONES:
        (FOLDER / backbone).mkdir(parents=True, exist_ok=True)
        for method in METHODS: (FOLDER / backbone / f"{method}.toml").write_text(text(backbone, method), encoding="utf-8")


if __name__ == "__main__": main()
