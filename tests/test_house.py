"The rules of the house: what is generated is fresh, notebooks are clean, layers hold, nothing unsafe is shipped."
import ast
import configparser
import difflib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement

from strlora.report import seeds_of


ROOT = Path(__file__).resolve().parents[1]
NBS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith(("_", ".")))
PACKAGE = sorted((ROOT / "strlora").rglob("*.py"))
SETTINGS = configparser.ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
META = SETTINGS["DEFAULT"]
ids = {"ids": lambda p: str(Path(p).name)}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [dict(c, source="".join(c["source"])) for c in json.loads(read(path))["cells"] if c["cell_type"] == kind]


def directives(source: str) -> set[str]:
    return {m.group(1).rstrip(":") for m in re.finditer(r"^#\|\s*(\S+)", source, re.M)}


def code(source: str) -> str:
    "A cell without directives and magics."
    return "\n".join(line for line in source.split("\n") if not re.match(r"\s*(#\||%|!)", line))


def tool(name: str):
    "A module of tools/."
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked() -> list[Path]:
    "Files of the repository; without git, what a source archive would hold."
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode: pytest.skip("needs a git checkout")
    return [ROOT / f for f in done.stdout.split("\0") if f and (ROOT / f).is_file()]


def imported(source: str, package: str = "") -> set[str]:
    "Absolute names of the modules that `source` imports, also inside functions."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): names |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level: base = ".".join(filter(None, [*package.split(".")[:len(package.split(".")) - node.level + 1], base]))
            names |= {base, *(f"{base}.{a.name}" for a in node.names)}
    return names


# --- what is generated is fresh ------------------------------------------------------------------------------------

def test_package_is_exported_from_the_notebooks(tmp_path):
    "Export into an empty folder and compare, the index of symbols included."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copyfile(ROOT / "settings.ini", tmp_path / "settings.ini")
    (tmp_path / "strlora").mkdir()
    for init in (ROOT / "strlora").rglob("__init__.py"):
        target = tmp_path / init.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(init, target)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                          cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    fresh = {p.relative_to(tmp_path) for p in (tmp_path / "strlora").rglob("*.py")}
    here = {p.relative_to(ROOT) for p in PACKAGE}
    assert fresh == here, f"only exported: {sorted(map(str, fresh - here))}; only in the package: {sorted(map(str, here - fresh))}"
    changed = [str(p) for p in sorted(fresh) if read(tmp_path / p) != read(ROOT / p)]
    diff = "".join(difflib.unified_diff(read(ROOT / changed[0]).splitlines(True), read(tmp_path / changed[0]).splitlines(True),
                                        "package", "notebook", n=1)) if changed else ""
    assert not changed, f"run nbdev_export: {changed} differ from the notebooks\n{diff[:2000]}"


def test_readme_is_rendered_from_the_index():
    assert not tool("make_readme").stale(), "run: make readme"


@pytest.mark.parametrize("here,there", [("_quarto.yml", "nbs/_quarto.yml"), ("CONTRIBUTING.md", "nbs/contributing.md"),
                                        ("CHANGELOG.md", "nbs/changelog.md")])
def test_links_in_nbs_hold_the_same_text(here, there):
    "They are symbolic links; a checkout that turns them into files with a path inside fails here."
    assert read(ROOT / here) == read(ROOT / there)


def test_site_settings_come_from_settings_ini():
    website = yaml.safe_load(read(ROOT / "nbs/nbdev.yml"))["website"]
    assert website["site-url"] == META["doc_host"] + META["doc_baseurl"]
    assert website["repo-url"] == META["git_url"] and website["description"] == META["description"]


def test_every_notebook_is_in_the_sidebar_once():
    listed = re.findall(r"\b([\w-]+\.ipynb)", read(ROOT / "nbs/sidebar.yml"))
    assert sorted(listed) == sorted(p.name for p in NBS)


BARE = """
import importlib.util, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
tool, pages, *there = sys.argv[1:]

class Absent:
    "Packages that were not installed."
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {"strlora", *there, *sys.stdlib_module_names}: raise ModuleNotFoundError(name)

sys.meta_path[:] = [Absent(), BuiltinImporter, FrozenImporter, PathFinder]
sys.path[:] = [place for place in sys.path if not Path(place, "strlora").exists()]
spec = importlib.util.spec_from_file_location("build_site", tool)
site = importlib.util.module_from_spec(spec)
spec.loader.exec_module(site)
site.PROC = Path(pages)
assert site.process()
"""


def test_pages_are_made_with_what_the_workflow_installs(tmp_path):
    "In an environment with nothing else, the package not among it."
    (install,) = re.findall(r"pip install -c constraints.txt ([\w -]+)$", read(ROOT / ".github/workflows/site.yml"), re.M)
    there = [{"pyyaml": "yaml"}.get(name, name) for name in install.split()]
    done = subprocess.run([sys.executable, "-I", "-c", BARE, ROOT / "tools/build_site.py", tmp_path / "pages", *there],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pages" / "configuration.md").stat().st_size > 10_000


def test_no_two_pages_have_the_same_title():
    titles = [tool("build_site").front_matter(json.loads(read(p)), p)[0]["title"] for p in NBS]
    assert not (twice := {t for t in titles if titles.count(t) > 1}), twice


def test_versions_agree():
    assert f'__version__ = "{META["version"]}"' in read(ROOT / "strlora/__init__.py")
    assert str(yaml.safe_load(read(ROOT / "CITATION.cff"))["version"]) == META["version"]
    assert META["version"] in read(ROOT / "CHANGELOG.md")


# --- notebooks -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", NBS, **ids)
def test_notebook_is_clean(path):
    "What nbdev_clean would leave: no execution counts, no stray metadata."
    from execnb.nbio import nb2str, read_nb
    from nbdev.clean import clean_nb

    notebook = read_nb(path)
    clean_nb(notebook)
    assert nb2str(notebook) == read(path), "run: nbdev_clean"


MACHINE_PATH = re.compile(r"""(?<![\w./:<])(?:/(?:home|root|work|tmp|usr|opt|Users|mnt|var|srv|build)/[\w.-]|[A-Z]:\\\\?\w)""")


@pytest.mark.parametrize("path", NBS, **ids)
def test_outputs_hold_no_errors_warnings_or_machine_paths(path):
    for n, cell in enumerate(cells(path)):
        for out in cell["outputs"]:
            assert out["output_type"] != "error", f"code cell {n} stores an error"
            words = "".join(out.get("text", ""))
            for kind, value in out.get("data", {}).items():
                if kind.startswith("text/"): words += "".join(value)
            assert "Traceback (most recent call last)" not in words, f"code cell {n} stores a traceback"
            assert not re.search(r"\b\w*Warning: ", words), f"code cell {n} stores a warning"
            assert not re.search(r"\d+%\|.*it/s\]", words), f"code cell {n} stores a progress bar"
            assert not MACHINE_PATH.search(words), f"code cell {n} stores the path of a machine: {MACHINE_PATH.search(words)}"
            assert not re.search(r"\.\.\.</td>", words), f"code cell {n} stores a table that is cut off: show it with `report.to_markdown`"


@pytest.mark.parametrize("path", NBS, **ids)
def test_notebook_is_small(path):
    exported = [c["source"] for c in cells(path) if directives(c["source"]) & {"export", "exports", "exporti"}]
    lines = sum(bool(line.strip()) and not line.startswith("#|") for source in exported for line in source.split("\n"))
    stored = sum(len(json.dumps(c["outputs"], ensure_ascii=False).encode()) for c in cells(path))
    assert lines <= 250, f"{lines} exported lines: split the notebook"
    assert stored <= 300_000, f"{stored / 1000:.0f} kB of stored outputs: use SVG for lines, small PNG for pictures"


@pytest.mark.parametrize("path", NBS, **ids)
def test_notebook_opens_with_title_and_summary(path):
    meta, _ = tool("build_site").front_matter(json.loads(read(path)), path)
    assert meta.get("title") and meta.get("description")


@pytest.mark.parametrize("path", NBS, **ids)
def test_lines_are_short(path):
    "120 columns are the rule; 140 the end, for the line that would read worse in two."
    long = [line for c in cells(path) for line in c["source"].split("\n") if len(line) > 140 and "http" not in line]
    assert not long, long


@pytest.mark.parametrize("path", [p for p in NBS if "_fig_" in p.name], **ids)
def test_figure_notebook_reads_artefacts_only(path):
    "Figures import reports and plots, nothing that trains."
    allowed = ("strlora.report", "strlora.plots", "pathlib", "IPython", "pandas")
    for cell in cells(path):
        for name in imported(code(cell["source"])):
            assert any(name == a or name.startswith(a + ".") for a in allowed) or name in {"strlora"}, f"imports {name}"
        assert not re.search(r"from strlora import (?!(report|plots)\b)", cell["source"])


TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
UNITS = "one|two|three|four|five|six|seven|eight|nine"
TEENS = "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|dozen|hundred"
NUMBER = rf"(?:\d+(?:,\d\d\d)*(?:\.\d+)?|(?:{TENS})(?:-(?:{UNITS}))?|{UNITS}|{TEENS})"
DIGITS = r"[-−+±]?\d[\d,.]*(?: ?(?:%|points?|times|seeds?|runs?))?"

# Names and rules that hold a number, wherever they stand.
NAMED = (r"95 % \[?intervals?\b", r"CC BY-NC 4\.0", r"Apache-2\.0", r"Python 3\.11", r"InternVL 3\.5", r"^## \d+\.\d+\.\d+ ",
         r"(?i)\b(?:at least|fewer than) five seeds\b", rf"(?i)\bone (?:[a-z]+ )?(?:seed|run)\b(?! of (?:\w+ )?{NUMBER}\b)")

# Numbers that nobody has measured: page and words around them.
SETTLED = {
    "01a_corpus.ipynb": ["latest release (1.2)"],
    "01a_scorers.ipynb": ["off by 5 % of the reference", "5 % of a year is a century", "sides of 0.05 to 0.3", "`0.67` becomes `0.6`"],
    "01e_questions.ipynb": ["height three is `3`"],
    "01f_captions.ipynb": ["never `4`"],
    "07d_pseudo_tasks.ipynb": ["From 0.8 on"],
    "13c_strlora.ipynb": ["a decay of 0.999 remembers a thousand steps and one of 0.99 a hundred"],
    "13k_branchlora.ipynb": ["20.98 million parameters of projector"],
    "14k_roofline.ipynb": ["3.35 TB/s of memory"],
    "22_fig_experts.ipynb": ["sums to one hundred percent", "two of four here"],
    "24_fig_methods.ipynb": ["asked five times in a stream"],
    "24b_fig_long.ipynb": ["in ten times as many chunks", "ten times as many occasions", "(14_settings.ipynb) ten times as often"],
    "25_fig_cost.ipynb": ["A ratio of 1.1 is a tenth more"],
    "27_fig_diagnosis.ipynb": ["StrLoRA's two of four experts"],
    "27a_fig_verdict.ipynb": ["< 0.001", "at least 95 %", "at most 1.2"],
    "27b_fig_streams.ipynb": ["better on at least three of these five"],
    "27d_fig_suspects.ipynb": ["the size of one of the four", "eight times the rank in all"],
    "29_fig_reproduction.ipynb": ["p < 0.001", "[ten times as many chunks]"],
    "glossary.md": ["a nat is 1.44 bits"],
    "index.ipynb": ["eight times the rank"],
}


def typed(
    text: str,       # of a page: prose, or a value with spaces
    results: bool,   # whether the page shows results
    page: str = "",  # its name, for the exceptions
) -> list[str]:
    "Numbers that look measured: decimals, per cents, bare numbers set as code; of results also so many points, times, seeds, runs."
    for words in SETTLED.get(page, []): text = text.replace(words, " … ")
    shown = re.sub(r"```.*?```|\]\([^)]*\)|arXiv:? ?[\d.]+", " ", text, flags=re.DOTALL)
    shown = re.sub(r"[\u00a0\u202f]|(?<!\n)\n(?![\n#])", " ", shown)  # lines of a paragraph are one
    for words in NAMED: shown = re.sub(words, " … ", shown, flags=re.MULTILINE)
    found = re.findall(rf"`({DIGITS})`|(?<!\$)\$({DIGITS})\$(?!\$)", shown)
    prose = re.sub(r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", " ", shown, flags=re.DOTALL)
    kinds = [r"\b\d+\.\d+\b", rf"\b{NUMBER} ?(?:%|per ?cent\b)"]
    if results:
        kinds += [rf"\b{NUMBER}(?:[ -][a-z]+){{0,2}}[ -](?:points?|times|seeds?|runs?)\b", rf"\b{NUMBER} of (?:\w+ )?{NUMBER}\b"]
    return ["".join(pair) for pair in found] + [n for kind in kinds for n in re.findall(kind, prose, re.IGNORECASE)]


@pytest.mark.parametrize("text", [
    "StrLoRA reaches 62 points of MAP", "leads by twelve points", "leads by twelve\npoints", "a 12-point lead", "ahead by three MAP points",
    "MAP is `73.5`", "MAP is $73.5$", "a share of `73 %`", "MAP is **73.5**", "3 times slower", "seventy-three per cent", "73 percent",
    "73\u00a0%", "on 12 of 12 runs", "on all twelve seeds", "in eleven of the twelve tasks", "one run of three", "one run of the six",
    "won on one of 12 streams", "two different seeds", "1 seed", "twenty-five runs"])
def test_a_typed_number_is_found(text):
    assert typed(f"So {text}, says the page.", results=True)


@pytest.mark.parametrize("text", [
    "with `lr=0.001` and `--seeds 0,1,2`", "one seed, and thin", "one run on the first tuning seed", "fewer than five seeds rank nothing",
    "a 95 % interval", "arXiv 2605.16353", "[a page](24_fig_methods.ipynb)", "a stream of 25 chunks with 400 samples", "points of 100",
    "many times", "[b, t] of `[e, r, d]`", "$\\beta = 0.999$", "two stages", "at most five named parts", "Python 3.11", "```\nMAP 73.5\n```"])
def test_what_is_no_result_may_be_typed(text):
    assert not typed(f"So {text}, says the page.", results=True)


def test_away_from_results_counts_are_examples():
    assert not typed("of three seeds", False) and typed("MAP is 73.5", False) and typed("MAP is `73`", False) and typed("ten per cent", False)
    assert typed("at most 1.2", True) and not typed("at most 1.2", True, "27a_fig_verdict.ipynb"), "an exception belongs to a page"
    assert typed("1.2 at most", True, "27a_fig_verdict.ipynb"), "and to its words"


PAGES = [*NBS, *sorted((ROOT / "nbs").glob("*.md"))]
RESULTS = re.compile(r"2\d|index|why|start")  # pages that speak of results


def words_of(path: Path) -> list[tuple[str, str]]:
    "Place and text of what readers of a page see: prose, words for pictures; of results also values, whatever is shown in the end."
    if path.suffix == ".md": return [("page", read(path))]
    found = []
    for i, cell in enumerate(json.loads(read(path))["cells"]):
        source, place = "".join(cell["source"]), f"cell {i}"
        if cell["cell_type"] == "markdown": found.append((place, source))
        elif RESULTS.match(path.name):
            nodes = list(ast.walk(ast.parse(code(source))))
            formats = {id(n) for f in nodes if isinstance(f, ast.FormattedValue) and f.format_spec for n in ast.walk(f.format_spec)}
            literals = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in formats]
            found += [(place, text) for text in literals if " " in text]  # names and paths have no spaces
            found += [(place, text) for text in re.findall(r"^#\| fig-(?:alt|cap): (.*)$", source, re.MULTILINE)]
    return found


@pytest.mark.parametrize("path", [p for p in NBS if re.match(r"2\d|index", p.name)], **ids)
def test_pictures_of_results_say_in_words_what_they_show(path):
    drawn = [cell for cell in cells(path) if any(kind.startswith("image/") for out in cell["outputs"] for kind in out.get("data", ()))]
    assert not [cell["source"][:80] for cell in drawn if "#| fig-alt: " not in cell["source"]]


@pytest.mark.parametrize("path", PAGES, **ids)
def test_no_measured_number_is_typed(path):
    "What was measured comes out of a cell; of results, there out of a value."
    found = [(typed(text, bool(RESULTS.match(path.name)), path.name), place, text[:80]) for place, text in words_of(path)]
    assert not [row for row in found if row[0]], "compute it, or say it without a number"


@pytest.mark.parametrize("page", sorted(SETTLED))
def test_exceptions_are_in_use(page):
    "Once the words of a page have changed, their exceptions go; none covers what would not be found."
    said = [text for _, text in words_of(ROOT / "nbs" / page)]
    for words in SETTLED.get(page, []):
        assert any(words in text for text in said), f"no longer there, take it off the list: {words!r}"
        assert typed(words, bool(RESULTS.match(page))), f"needs no exception: {words!r}"


@pytest.mark.parametrize("path", NBS, **ids)
def test_links_between_chapters_lead_to_notebooks(path):
    "As `07_layer.ipynb`: such links work in Jupyter, on a code host and, rewritten, on the site."
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([\w./-]+\.(?:ipynb|html|md))[)#]", cell["source"]):
            assert not target.endswith(".html") and (path.parent / target).exists(), target


@pytest.mark.parametrize("path", NBS, **ids)
def test_prose_has_no_machine_paths(path):
    for kind in ("markdown", "code"):
        for cell in cells(path, kind):
            assert not MACHINE_PATH.search(cell["source"]), MACHINE_PATH.search(cell["source"])


# --- the package ---------------------------------------------------------------------------------------------------

def test_import_contracts_hold():
    command = "from importlinter.cli import lint_imports_command; lint_imports_command(['--no-cache'])"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_package_is_free_of_what_it_must_not_use(path):
    tree = ast.parse(read(path))
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    tops = {name.split(".")[0] for name in imported(read(path), package)}
    assert not tops & {"fastcore", "nbdev", "execnb"}, "tools of the notebooks, not of the package"
    assert not tops & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}, "nothing here unpickles"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name != "torch.load", "checkpoints are safetensors and JSON"
            words = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg}
            assert "trust_remote_code" not in words, "never passed"
            assert words.get("allow_pickle", "False") == "False"
            assert name not in {"eval", "exec"}, name
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            silent = all(isinstance(x, ast.Pass) for x in node.body)
            assert caught and not (silent and caught in {"Exception", "BaseException"}), f"line {node.lineno}: errors vanish"
        if isinstance(node, ast.ImportFrom):
            assert not any(a.name == "*" for a in node.names), f"line {node.lineno}: import *"


def requirements(key: str) -> dict[str, Requirement]:
    return {r.name.lower().replace("_", "-"): r for r in map(Requirement, META[key].split())}


def test_requirements_name_what_the_package_imports():
    modules = {"scikit-learn": "sklearn", "pillow": "PIL", "matplotlib-inline": "matplotlib_inline", "huggingface-hub": "huggingface_hub"}
    wanted = {modules.get(name, name) for name in requirements("requirements")}
    tops = {name.split(".")[0] for p in PACKAGE for name in imported(read(p), ".".join(p.relative_to(ROOT).parts[:-1]))}
    ours = tops - set(sys.stdlib_module_names) - {"strlora", ""}
    assert not ours - wanted, f"not in settings.ini: {sorted(ours - wanted)}"
    assert not wanted - ours, f"in settings.ini, never imported: {sorted(wanted - ours)}"


def test_constraints_cover_and_satisfy_the_requirements():
    pins = dict(line.split("==") for line in read(ROOT / "constraints.txt").splitlines() if "==" in line and line[0] != "#")
    for name, wanted in {**requirements("requirements"), **requirements("dev_requirements")}.items():
        assert name in pins and wanted.specifier.contains(pins[name], prereleases=True), f"{wanted}: {pins.get(name)}"


def test_importing_strlora_is_light():
    "No torch, transformers, peft or matplotlib until a name of the package is used."
    heavy = "{'torch', 'transformers', 'peft', 'accelerate', 'matplotlib', 'pandas', 'PIL', 'sklearn'}"
    done = subprocess.run([sys.executable, "-c", f"import sys, strlora; print(sorted({heavy} & set(sys.modules)))"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.name not in {"__init__.py", "_modidx.py"}],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_parameters_of_public_functions_are_documented(path):
    "A docstring for each public function; for each parameter a comment, a word in the docstring or a row of the glossary."
    rows = read(ROOT / "nbs/glossary.md").split("## Parameters")[1]
    glossary = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in rows.split("\n") if row.startswith("| `"))))
    source = read(path)
    lines, missing = source.split("\n"), []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"): continue
        words = set(re.findall(r"\w+", ast.get_docstring(node) or ""))
        if not words: missing.append(f"{node.name}: no docstring")
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        missing += [f"{node.name}: {a.arg}" for a in arguments
                    if a.arg not in words | glossary and "#" not in lines[a.end_lineno - 1] and "#" not in lines[max(a.lineno - 2, 0)]]
    assert not missing, missing


# --- what is shipped -----------------------------------------------------------------------------------------------

def test_notice_names_every_picture():
    sources = ROOT / "strlora/assets/photos/sources.json"
    notice = read(ROOT / "NOTICE")
    listed = {x["file"] for x in json.loads(read(sources))["photos"]}
    files = {p.name for p in sources.parent.iterdir() if p.name != sources.name}
    assert files == listed, "sources.json and the folder differ"
    assert not [f for f in files if f not in notice]


def test_artefacts_are_small():
    def size(folder: Path) -> int: return sum(p.stat().st_size for p in tracked() if folder in p.parents)
    results = ROOT / "results"
    for run in {p.parent for p in tracked() if p.name == "run.json"}:
        assert size(run) <= 300_000, f"{run.relative_to(ROOT)}: {size(run) / 1000:.0f} kB"
    assert size(results) <= 40_000_000 and size(ROOT / "strlora/assets") <= 20_000_000


def test_no_machine_path_in_the_repository():
    endings = {".py", ".md", ".toml", ".yml", ".yaml", ".ini", ".cfg", ".txt", ".cff", ".json", ".csv", ""}
    for path in tracked():
        if path.suffix in endings and path.name not in {"LICENSE", "run"} and "oracle" not in path.parts:
            found = [m for m in MACHINE_PATH.finditer(read(path)) if m.group(0)[:5] not in {"/usr/"}]
            assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_links_of_the_readme_lead_to_files():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", read(ROOT / "README.md")) if not link.startswith("http")]
    assert len(links) > 20 and not [link for link in links if not (ROOT / link).exists()]


def test_documented_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.M))
    for name in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"(?:^|`|\n)\s*make ([a-z-]+)", read(ROOT / name)))
        assert named and named <= targets, f"{name}: {sorted(named - targets)}"


def test_committed_runs_are_made_by_a_target(monkeypatch):
    "Of the Makefile; whatever make runs the tests, and with which words."
    if not shutil.which("make"): pytest.skip("needs make")
    monkeypatch.setenv("MAKEFLAGS", " -- ARGS=--nonsense")
    hours = tool("hours")
    study, more = hours.planned("study"), hours.planned("study-more")
    there = {(*path.parts[-4:-2], path.parts[-2].removeprefix("seed"), "") for path in (ROOT / "results/mini").glob("*/*/seed*/run.json")}
    assert not there - study - more, sorted(there - study - more)
    assert {run[0] for run in study} == {"windows", "strcvit"} and ("few", "strlora", "103", "num_experts=16") in more
    assert hours.seconds_of(("windows", "lora", "999", ""), {("windows", "lora", "0", ""): 2.0, ("windows", "ewc", "0", ""): 9.0}) == 2


def test_tool_tables_hold_no_metadata():
    "The package's metadata have one home: settings.ini."
    assert "project" not in tomllib.loads(read(ROOT / "pyproject.toml"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_and_archive_build_and_hold_the_assets(tmp_path):
    "The wheel is built from the source archive, as an installer would."
    copy = tmp_path / "copy"
    for path in tracked():
        (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / path.relative_to(ROOT))
    done = subprocess.run([sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), str(copy)], capture_output=True,
                          text=True, env=dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert list((tmp_path / "dist").glob("*.tar.gz"))
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(p.relative_to(ROOT)) for p in tracked() if p.is_relative_to(ROOT / "strlora") and p.name != "_modidx.py"}
    assert not wanted - held, sorted(wanted - held)
    assert not [f for f in held if f.startswith(("nbs/", "tests/"))]


@pytest.mark.parametrize("name", ["verdict", "reproduction"])
def test_tables_on_the_front_page_are_of_all_runs(name):
    table = pd.read_csv(ROOT/"results"/"mini"/f"{name}.csv")
    if name == "verdict":
        assert set(table["seeds"]) == {len(seeds_of(list(dict.fromkeys(table["method"]))))}
    else:
        found = dict(zip(table["claim"], table["found here"], strict=True))["StrLoRA scores higher over the stream than one adapter tuned in sequence (LoRA)"]
        assert f", {len(seeds_of(['strlora', 'lora']))} seeds" in found


@pytest.mark.parametrize("path", sorted((ROOT/"nbs").glob("2*_fig_*.ipynb")), ids=lambda p: p.name)
def test_figure_pages_show_what_they_compute(path):
    "A page of results whose cells were changed and not run would show nothing, or something else."
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        last = "".join(cell["source"]).rstrip().split("\n")[-1] if cell["source"] else ""
        if cell["cell_type"] == "code" and re.match(r"(Markdown|HTML|display)\(|plots\.(?!notebook)", last):
            assert cell["outputs"], f"run it: {last}"
