"""Build the documentation: notebooks -> pages in _proc -> HTML in _docs, then check every link, anchor and picture.

    python tools/build_site.py              render with smalldocs (pure Python)
    python tools/build_site.py --quarto     render with Quarto, as the published site is
    python tools/build_site.py --check      only check what lies in _docs

Pages show stored outputs; nothing is executed. Unlike nbdev's own pages they show the source of every exported
definition, because a chapter is read with its code. A symbol in backticks becomes a link to where it is defined.
"""
import argparse
import ast
import html
import json
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package as it lies here, installed or not
NBS, PROC, DOCS = ROOT / "nbs", ROOT / "_proc", ROOT / "_docs"
NUMBER = re.compile(r"^\d+[a-zA-Z0-9]*_")
FIGURE = re.compile(r"^\d+[a-zA-Z0-9]*_fig_")    # pages that show results: their code waits behind a click


class SiteError(SystemExit):
    "A page that cannot be built, or links that do not hold: the message names them all."


# --- pages ---------------------------------------------------------------------------------------------------------

def page_name(path: Path) -> str:
    "The address of a notebook without its number, as nbdev has it: 07_layer.ipynb -> layer."
    return NUMBER.sub("", path.stem)


def directives(source: str) -> set[str]:
    "The words after #| at the top of a cell."
    return {m.group(1).rstrip(":") for m in re.finditer(r"^#\|\s*(\S+)", source, re.M)}


def definitions(source: str) -> list[str]:
    "Names of the classes and functions that a cell defines; methods patched on with a decorator do not count."
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)]


def only_imports(source: str) -> bool:
    "True for a cell that holds nothing but imports."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return bool(body) and all(isinstance(n, ast.Import | ast.ImportFrom) for n in body)


def text(cell: dict) -> str:
    "The source of a cell as one string."
    source = cell.get("source", "")
    return "".join(source) if isinstance(source, list) else source


def symbols(notebooks: dict[Path, dict]) -> dict[str, str]:
    "Where each exported name is defined: name -> page#anchor. A name defined twice is not linked."
    found: dict[str, list[str]] = {}
    for path, notebook in notebooks.items():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code" and directives(text(cell)) & {"export", "exports"}:
                for name in definitions(text(cell)):
                    if not name.startswith("_"): found.setdefault(name, []).append(f"{page_name(path)}.html#{name.lower()}")
    return {name: places[0] for name, places in found.items() if len(places) == 1}


def link_symbols(markdown: str, index: dict[str, str], here: str) -> str:
    "Turn `Name` into a link, outside code blocks, headings and existing links, unless it is defined on this page."
    def link(match):
        name = match.group(1).removesuffix("()")
        parts = name.split(".")
        if parts[0] == "strlora": name = parts[-1]                          # strlora.moe.layer.TwoStageRouter
        elif parts[0][:1].isupper(): name = parts[0]                        # StrLoraConfig.released
        target = index.get(name)
        plain = name.islower() and "_" not in name and len(name) < 7      # `report`, `score`: too ordinary to link
        return match.group(0) if not target or plain or target.startswith(f"{here}.html") else f"[{match.group(0)}]({target})"
    parts, fenced = [], False
    for line in markdown.split("\n"):
        if line.lstrip().startswith("```"): fenced = not fenced
        keep = fenced or line.startswith(("#", "    ")) or line.lstrip().startswith("```")
        parts.append(line if keep else re.sub(r"(?<![\[`\w])(?<!Hugging Face's )`([A-Za-z_][\w.]*(?:\(\))?)`(?![`\]])", link, line))
    return "\n".join(parts)


def front_matter(notebook: dict, path: Path) -> tuple[dict, list[dict]]:
    "Title and description of a notebook (its first raw cell, or its `# Title` with `> line`), and the other cells."
    cells = [c for c in notebook["cells"] if text(c).strip()]
    meta: dict = {}
    for i, cell in enumerate(cells):
        if cell["cell_type"] == "raw" and text(cell).lstrip().startswith("---"):
            meta = yaml.safe_load(text(cell).strip().strip("-"))
            return meta, cells[:i] + cells[i + 1:]
        if cell["cell_type"] == "markdown" and text(cell).lstrip().startswith("# "):
            head, _, rest = text(cell).lstrip().partition("\n")
            meta["title"] = head[2:].strip()
            if quote := re.match(r"\s*((?:> ?.*\n?)+)", rest):
                meta["description"] = " ".join(x.lstrip("> ").strip() for x in quote.group(1).splitlines())
                rest = rest[quote.end():]
            cells[i] = dict(cell, source=rest.strip("\n"))
            return meta, [c for c in cells if text(c).strip()]
    raise SiteError(f"{path.name}: no title; begin with a markdown cell '# Title' and a line '> what it is'")


def page(path: Path, notebook: dict, index: dict[str, str]) -> dict:
    "A notebook as a page: no hidden cells, no directives, anchors at definitions, links at symbols, code of results folded."
    meta, cells = front_matter(notebook, path)
    here, out = page_name(path), []
    for cell in cells:
        source = text(cell)
        if cell["cell_type"] == "markdown":
            source = link_symbols(rename_links(source), index, here)
            out.append({"cell_type": "markdown", "metadata": {}, "source": source})
            continue
        if cell["cell_type"] != "code": continue
        words = directives(source)
        if words & {"hide", "default_exp", "exporti"} or "nbdev_export(" in source: continue
        exported = bool(words & {"export", "exports"})
        if exported and only_imports(source): continue
        kept = [line for line in source.split("\n") if not re.match(r"#\|\s*(export|exports|eval:|slow|gpu|exec_doc)\b", line)]
        kept = [line for line in kept if not re.search(r"#\|\s*hide_line\s*$", line)]
        if "hide_input" in words: kept = ["#| echo: false"] + [k for k in kept if "hide_input" not in k]
        if "hide_output" in words: cell = dict(cell, outputs=[])
        cell = dict(cell, outputs=[linked(out) for out in cell.get("outputs", ())])
        kept = [k for k in kept if "hide_output" not in k and not re.match(r"\s*%%?\w", k)]
        if FIGURE.match(path.name): kept = ["#| code-fold: true", *kept]                # as Quarto has it, and smalldocs
        if exported and (names := [n for n in definitions(source) if not n.startswith("_")]):
            anchors = "".join(f'<span class="definition" id="{n.lower()}"></span>' for n in names)
            out.append({"cell_type": "markdown", "metadata": {}, "source": anchors})
        out.append(dict(cell, metadata={}, source="\n".join(kept).strip("\n")))
    meta["output-file"] = f"{here}.html"
    head = {"cell_type": "raw", "metadata": {}, "source": f"---\n{yaml.safe_dump(meta, allow_unicode=True, width=1000)}---\n"}
    return dict(notebook, cells=[head, *out])


def rename_links(markdown: str) -> str:
    "Links to notebooks as links to pages."
    def rename(match):
        target, anchor = match.group(1), match.group(2) or ""
        return f"]({page_name(Path(target))}.html{anchor})"
    return re.sub(r"\]\((?:\./)?([\w.-]+)\.(?:ipynb|html)(#[^)\s]*)?\)", rename, markdown)


def linked(output: dict) -> dict:
    "A stored output; links to notebooks in its Markdown lead to pages."
    shown = output.get("data", {}).get("text/markdown")
    if shown is None: return output
    return dict(output, data={**output["data"], "text/markdown": rename_links(shown if isinstance(shown, str) else "".join(shown))})


def process() -> int:
    "Fill _proc; the number of pages."
    shutil.rmtree(PROC, ignore_errors=True)
    PROC.mkdir()
    paths = sorted(p for p in NBS.glob("*.ipynb") if not p.name.startswith(("_", ".")))
    notebooks = {p: json.loads(p.read_text(encoding="utf-8")) for p in paths}
    names = [page_name(p) for p in paths]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise SiteError(f"two notebooks have the same page name: {', '.join(twice)}")
    index = symbols(notebooks)
    for path, notebook in notebooks.items():
        target = PROC / f"{page_name(path)}.ipynb"
        target.write_text(json.dumps(page(path, notebook, index), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in NBS.iterdir():
        if path.suffix in {".yml", ".css", ".png", ".svg", ".html"}: shutil.copyfile(path, PROC / path.name)
        if path.suffix in {".md", ".qmd"}:
            (PROC / path.name).write_text(link_symbols(rename_links(path.read_text(encoding="utf-8")), index, path.stem), encoding="utf-8")
    (PROC / "reference.md").write_text(reference(notebooks, index), encoding="utf-8")
    (PROC / "configuration.md").write_text(configuration(), encoding="utf-8")
    sidebar = PROC / "sidebar.yml"
    sidebar.write_text(re.sub(r"\b(\w+)\.ipynb", lambda m: f"{page_name(Path(m.group(0)))}.ipynb", sidebar.read_text(encoding="utf-8")),
                       encoding="utf-8")
    return len(paths)


def reference(notebooks: dict[Path, dict], index: dict[str, str]) -> str:
    "A page that lists each module's public names with the first line of what they are."
    parts = ["---\ntitle: Names of the package\ndescription: Every public name, module by module, with a link to the chapter that explains it.\n---\n"]
    for path, notebook in notebooks.items():
        exported = [text(c) for c in notebook["cells"] if c["cell_type"] == "code" and directives(text(c)) & {"export", "exports"}]
        module = next((m.group(1) for c in notebook["cells"] if (m := re.match(r"#\|\s*default_exp\s+(\S+)", text(c)))), None)
        rows = []
        for source in exported:
            for node in ast.parse(source).body:
                if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"): continue
                words = (ast.get_docstring(node) or "").split("\n")[0].replace("|", "\\|")
                target = index.get(node.name)
                rows.append(f"| {f'[`{node.name}`]({target})' if target else f'`{node.name}`'} | {words} |")
        if module and rows:
            title = front_matter(notebook, path)[0]["title"]
            parts.append(f"## `strlora.{module}`\n\nChapter: [{title}]({page_name(path)}.html)\n\n| name | what it is |\n|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def configuration() -> str:
    "A page with every setting of a run and of each method: default, meaning, and where the default comes from."
    from strlora.core import sources
    from strlora.methods.table import METHODS
    from strlora.settings import GROUPS, RunSpec

    cell = lambda text: str(text).replace("|", "\\|") or " "
    parts = ["---\ntitle: Configuration\ndescription: Every setting with its default, its meaning and the source of the default.\n---\n",
             "Settings are given by `--set NAME=VALUE` or in a file; `strlora run --dry-run` shows those of a run. *ours* stands before a default that "
             "no publication names; *official* means the code or the scripts of the paper's authors.\n"]

    def table(title: str, record: type, prefix: str) -> None:
        rows = [f"| `{prefix}{s['name']}` | `{cell(s['default'])}` | {cell(s['help'])} | {cell(s['source'])} |" for s in sources(record)]
        if rows: parts.append(f"## {title}\n\n| setting | default | meaning | source |\n|---|---|---|---|\n" + "\n".join(rows) + "\n")

    table("The run", RunSpec, "")
    for name, record in GROUPS.items(): table(f"`{name}`", record, f"{name}.")
    records: dict[type, list[str]] = {}
    for name, method in METHODS.items(): records.setdefault(method.settings, []).append(name)
    for record, names in records.items(): table("Settings of " + ", ".join(f"`{n}`" for n in names), record, "settings.")
    return "\n".join(parts)


# --- rendering -----------------------------------------------------------------------------------------------------

EXPECTED = ("execute.enabled", "html-math-method", "output-file", "html.grid")       # settings for Quarto that smalldocs does not read


def render_smalldocs() -> None:
    "Render _proc with smalldocs; its warnings are errors, but for settings that only Quarto reads."
    from smalldocs.site import build

    site = build(PROC, quiet=True)
    warnings = [str(w) for w in site.warnings if not any(word in str(w) for word in EXPECTED)]
    if warnings: raise SiteError("smalldocs:\n  " + "\n  ".join(warnings))
    for path in (PROC / DOCS.name).rglob("*.html"):
        path.write_text(to_mathml(path.read_text(encoding="utf-8"), path.name), encoding="utf-8")


def to_mathml(page: str, name: str) -> str:
    "Formulas as MathML, which browsers draw by themselves, instead of a script from a server."
    from latex2mathml.converter import convert

    def formula(match):
        kind, tex = match.group(1), html.unescape(match.group(2)).strip()
        tex = tex.removeprefix(r"\(" if kind == "inline" else r"\[").removesuffix(r"\)" if kind == "inline" else r"\]").strip()
        tex = re.sub(r"\{(aligned|split|gathered)\}", "{align*}", tex)
        try:
            mathml = convert(tex, display="block" if kind == "display" else "inline")
        except Exception as error:                                      # the converter's errors share no base class
            raise SiteError(f"{name}: formula {tex!r}: {type(error).__name__}") from error
        if odd := re.search(r"<m[ion]>(\\\w*|&(?!#?\w+;)[^<]*)</m[ion]>", mathml):
            raise SiteError(f"{name}: formula {tex!r}: the converter does not know {odd.group(1)!r}")
        return f'<span class="math {kind}">{mathml}</span>'

    page = re.sub(r'<span class="math (inline|display)">(.*?)</span>', formula, page, flags=re.S)
    page = re.sub(r'<link[^>]*katex[^>]*>', "", page)
    page = re.sub(r'<script[^>]*katex[^>]*></script>', "", page)
    return re.sub(r'<script>[^<]*renderMathInElement[^<]*</script>', "", page)


def render_quarto() -> None:
    "Render _proc with Quarto."
    if not shutil.which("quarto"): raise SiteError("Quarto is not installed; leave out --quarto to render with smalldocs")
    subprocess.run(["quarto", "render", "--no-cache"], cwd=PROC, check=True)


# --- checking ------------------------------------------------------------------------------------------------------

class Page(HTMLParser):
    "The ids, links, pictures and outside resources of one page."

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.images, self.outside, self.no_alt = set(), [], [], [], 0

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"): self.ids.add(a["id"])
        if tag == "a" and a.get("name"): self.ids.add(a["name"])
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag in {"img", "source"} and a.get("src"): self.images.append(a["src"])
        loads = a.get("src") if tag in {"script", "img", "iframe"} else a.get("href") if tag == "link" and "stylesheet" in (a.get("rel") or "") else None
        if loads and urlsplit(loads).scheme in {"http", "https"}: self.outside.append(loads)


def check(folder: Path, offline: bool = True) -> list[str]:
    "What does not hold: links to pages or anchors that are not there, missing pictures, resources loaded from elsewhere."
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        if "site_libs" in path.parts: continue
        pages[path.resolve()] = parsed = Page()
        parsed.feed(path.read_text(encoding="utf-8"))
    base = yaml.safe_load((NBS / "nbdev.yml").read_text(encoding="utf-8"))["website"]
    problems = []
    for path, parsed in pages.items():
        name = path.relative_to(folder.resolve())
        if offline: problems += [f"{name}: loads {x} from elsewhere" for x in parsed.outside]
        for link in parsed.links + parsed.images:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith(("#!", "javascript:")):
                if link.startswith(base["site-url"] + "/") and not link.startswith(base["repo-url"] + "/"):
                    problems.append(f"{name}: {link} should be a relative link")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir(): target = target / "index.html"
            if not target.exists():
                problems.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                problems.append(f"{name}: {link}: no such anchor")
    listed = (folder.parent / "nbs" / "sidebar.yml").read_text(encoding="utf-8") if (folder.parent / "nbs").exists() else ""
    for path in NBS.glob("*.ipynb"):
        if listed and not path.name.startswith(("_", ".")) and path.name not in listed and path.stem != "index":
            problems.append(f"{path.name} is not in nbs/sidebar.yml")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quarto", action="store_true", help="render with Quarto instead of smalldocs")
    parser.add_argument("--check", action="store_true", help="only check the links of what was built")
    args, start = parser.parse_args(), time.time()
    if not args.check:
        count = process()
        (render_quarto if args.quarto else render_smalldocs)()
        shutil.rmtree(DOCS, ignore_errors=True)
        shutil.move(PROC / DOCS.name, DOCS)
        print(f"{count} notebooks -> {DOCS.relative_to(ROOT)}/index.html in {time.time() - start:.1f} s")
    problems = check(DOCS, offline=not args.quarto)
    if problems: raise SiteError("links that do not hold:\n  " + "\n  ".join(problems))
    print("every link, anchor and picture holds")


if __name__ == "__main__":
    sys.exit(main())
