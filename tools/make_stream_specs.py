"Write experiments/mini of the other streams: the settings that the search chose on `windows`, the same for every stream."
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "experiments" / "mini"
STREAMS = ("strcvit", "abrupt", "cyclic", "uniform", "alike1", "alike2", "alike3", "alike4", "long", "few")
BASES = ("gemma3",)  # bases of another family, in results/mini/base, on the windows stream
LOOKED_AT = {("strcvit", name) for name in ("lora", "joint", "zero_shot", "strlora")}  # full sets after every fifth chunk, for a figure


def moved(
    text: str,    # a spec of the windows stream
    method: str,  # whose
    stream: str,  # where it goes
) -> str:
    "The same settings on another stream."
    head, body = re.match(r"((?:#[^\n]*\n)*)\n*(.*)", text, re.DOTALL).groups()
    often = (stream, method) in LOOKED_AT
    body = body.replace("[stream]\n", f'[stream]\nname = "{stream}"\n')
    body = re.sub(r"full_every = \d+", f"full_every = {5 if often else 25}", body)
    if stream == "few": body = body.replace("chunk_size = 400", "chunk_size = 144")  # about as many samples of a task as on `windows`
    if stream == "long":  # the samples of the other streams in ten times as many chunks
        body = body.replace("chunk_size = 400", "chunks = 250\nchunk_size = 40").replace("full_every = 25", "every = 10\nfull_every = 250")
    chosen = [line.replace("chosen", "chosen on the windows stream") for line in head.splitlines() if "chosen by" in line]
    when = "chunks 5, 10 ... 25" if often else "the last"
    size = {"long": "250 x 40", "few": "25 x 144"}.get(stream, "25 x 400")
    what = f"{size} samples, proxies after every {'tenth chunk' if stream == 'long' else 'chunk'}"
    first = f"# {method} on the {stream} stream: {what}, full sets after {when}."
    return "\n".join([first, *chosen, body])


def on_base(
    text: str,    # a spec of the windows stream
    method: str,  # whose
    base: str,    # another base than the package's
) -> str:
    "The same settings on another base model."
    head, body = re.match(r"((?:#[^\n]*\n)*)\n*(.*)", text, re.DOTALL).groups()
    chosen = [line.replace("chosen", "chosen on the package's base") for line in head.splitlines() if "chosen by" in line]
    first = f"# {method} on a base with a language model of another family ({base}): the windows stream, 25 x 400 samples."
    return "\n".join([first, *chosen, body.rstrip("\n"), "", "[model]", f'base = "results/mini/base/{base}"', ""])


if __name__ == "__main__":
    for stream in STREAMS:
        for path in sorted((FOLDER / "windows").glob("*.toml")):
            (FOLDER / stream).mkdir(exist_ok=True)
            (FOLDER / stream / path.name).write_text(moved(path.read_text(encoding="utf-8"), path.stem, stream), encoding="utf-8")
    for base in BASES:
        for path in sorted((FOLDER / "windows").glob("*.toml")):
            (FOLDER / f"windows-{base}").mkdir(exist_ok=True)
            spec = on_base(path.read_text(encoding="utf-8"), path.stem, base)
            (FOLDER / f"windows-{base}" / path.name).write_text(spec, encoding="utf-8")
