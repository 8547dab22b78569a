"""Write README.md from nbs/index.ipynb: prose as it is, code fenced, stored outputs below it, pictures as files.

    python tools/make_readme.py            write README.md and index_files/
    python tools/make_readme.py --check    exit 1 if they are not up to date
"""
import argparse
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from build_site import directives, front_matter, only_imports, text

SOURCE, PICTURES = ROOT / "nbs" / "index.ipynb", "index_files"


def output(out: dict, name: str, alt: str, files: dict[str, bytes]) -> str:
    "One stored output as Markdown; a picture goes to `files`."
    if out["output_type"] == "stream": return indent("".join(out["text"]))
    data = {kind: "".join(value) if isinstance(value, list) else value for kind, value in out.get("data", {}).items()}
    for kind, ending in (("image/svg+xml", "svg"), ("image/png", "png")):
        if kind in data:
            path = f"{PICTURES}/{name}.{ending}"
            files[path] = data[kind].encode() if ending == "svg" else base64.b64decode(data[kind])
            return f"![{alt}]({path})"
    if "text/markdown" in data: return from_root(data["text/markdown"].strip())
    return indent(data.get("text/plain", ""))


def from_root(words: str) -> str:
    "Links as they lead from the root of the repository."
    words = re.sub(r"\]\((contributing|changelog)\.md([#)])", lambda m: f"]({m.group(1).upper()}.md{m.group(2)}", words)
    return re.sub(r"\]\(([\w.-]+\.ipynb|(?:glossary|start|why)\.md)([#)])", r"](nbs/\1\2", words)


def indent(words: str) -> str:
    "Text output as an indented block."
    return "\n".join("    " + line for line in words.rstrip("\n").split("\n"))


def render(source: Path = SOURCE) -> dict[str, bytes]:
    "README.md and its pictures: path -> content."
    meta, cells = front_matter(json.loads(source.read_text(encoding="utf-8")), source)
    files: dict[str, bytes] = {}
    parts = [f"# {meta['title']}", "<!-- Written by tools/make_readme.py from nbs/index.ipynb: edit the notebook. -->", meta["description"]]
    for n, cell in enumerate(cells):
        code = text(cell)
        words = directives(code)
        if cell["cell_type"] == "markdown":
            parts.append(from_root(code))
        if cell["cell_type"] != "code" or words & {"hide", "default_exp"}: continue
        options = dict(re.findall(r"^#\|\s*([\w-]+):\s*(.+)$", code, re.M))
        body = "\n".join(line for line in code.split("\n") if not line.startswith("#|")).strip("\n")
        if options.get("echo", "true") != "false" and not (words & {"export"} and only_imports(body)):
            parts.append(f"```python\n{body}\n```")
        alt = options.get("fig-alt", options.get("fig-cap", "picture")).strip("\"'")
        parts += [output(out, f"figure-{n}", alt, files) for out in cell.get("outputs", [])]
        if "fig-cap" in options: parts.append("*" + options["fig-cap"].strip("\"'") + "*")
    return {"README.md": ("\n\n".join(p for p in parts if p.strip()) + "\n").encode(), **files}


def stale() -> list[str]:
    "Files that differ from what the notebook gives, and pictures that it no longer has."
    files = render()
    wrong = [path for path, content in files.items() if not (ROOT / path).exists() or (ROOT / path).read_bytes() != content]
    return wrong + [str(p.relative_to(ROOT)) for p in (ROOT / PICTURES).glob("*") if str(p.relative_to(ROOT)) not in files]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is out of date")
    if parser.parse_args().check:
        if wrong := stale(): print(f"out of date: {', '.join(wrong)}; run: make readme", file=sys.stderr)
        return bool(wrong)
    for old in (ROOT / PICTURES).glob("*"): old.unlink()
    for path, content in render().items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_bytes(content)
    print("wrote README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
