"""Run notebooks by nbdev_test's rules and store their outputs.

    python tools/run_nbs.py [--check | --same] [--slow] [NOTEBOOK ...]      (no notebook: all of nbs/)

Cells that nbdev_test would skip keep the outputs they have.
"""
import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["IN_TEST"] = "1"

import warnings

warnings.filterwarnings("ignore")

from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from fastcore.basics import str2bool
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor


def skip_cell(cell, flags: set[str]) -> bool:
    "True for a cell that nbdev_test does not run."
    if cell.cell_type != "code" or "nbdev_export" + "(" in cell.source:
        return True
    directives = getattr(cell, "directives_", {}) or {}
    if directives.get("eval:", [""])[0].lower() == "false":
        return True
    return bool(flags & directives.keys())


def drop_progress_bars(nb) -> None:
    "Remove what a progress bar wrote to stderr; it differs from run to run and says nothing to a reader."
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        for out in cell.outputs:
            if out.get("name") == "stderr":
                out["text"] = [line for line in "".join(out["text"]).replace("\r", "\n").splitlines(True) if "it/s]" not in line]
        cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr" or "".join(out["text"]).strip()]


def told(nb) -> list[str]:
    "What each cell says in words: tables, sentences, prints."
    said = []
    for cell in nb.cells:
        parts = []
        for out in getattr(cell, "outputs", None) or []:
            data = out.get("data", {})
            parts.append(data.get("text/markdown") or (None if "image/png" in data or "text/html" in data else data.get("text/plain")) or out.get("text"))
        said.append("\n".join("".join(part) for part in parts if part).strip())
    return said


NUMBER = re.compile(r"\d+(?:\.\d+)?")


def differs(old: str, new: str) -> bool:
    "Whether words differ, or a number by more than the last digit shown: other processors round otherwise."
    if NUMBER.sub("#", old) != NUMBER.sub("#", new): return True
    near = lambda a, b: abs(float(a) - float(b)) <= (1.01 * 10.0 ** -len(a.partition(".")[2]) if "." in a else 0)
    return not all(itertools.starmap(near, zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)))


def run(path: Path, save: bool = True, slow: bool = False, same: bool = False) -> bool:
    "Run one notebook in its folder; store outputs unless `save` is False. True if every cell ran and, if asked, said what is stored."
    from execnb.nbio import read_nb

    flags = set(get_config().tst_flags.split()) - ({"slow"} if slow else set())
    processed = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if str2bool(getattr(processed, "frontmatter_", {}).get("skip_exec", False)):
        print(f"skipped {path.name} (skip_exec)")
        return True
    raw, before = read_nb(path), told(read_nb(path))     # processing strips directives: run these cells, keep the rest
    skipped = {i for i, cell in enumerate(processed.cells) if skip_cell(cell, flags)}
    order = iter(range(len(raw.cells)))

    def skip(cell):
        return next(order) in skipped

    start, shell = time.time(), CaptureShell(path)
    shell.run_cell("%config InlineBackend.figure_formats = ['svg']")
    shell.run_cell("%config InlineBackend.print_figure_kwargs = {'metadata': {'Date': None, 'Creator': None}}")
    try:
        with working_directory(path.parent):
            shell.run_all(raw, exc_stop=True, preproc=skip)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        sys.stderr.write(shell.prettytb(fname=path) + "\n")
        return False
    drop_progress_bars(raw)
    clean_nb(raw)
    if save: write_nb(raw, path)
    other = [i for i, (old, new) in enumerate(zip(before, told(raw), strict=True)) if i not in skipped and differs(old, new)] if same else []
    for i in other: print(f"{path.name}, cell {i}: stored\n\n{before[i]}\n\nnow\n\n{told(raw)[i]}\n", file=sys.stderr)
    print(f"ran {path.name} in {time.time() - start:.1f} s")
    return not other


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="notebooks to run (default: all)")
    parser.add_argument("--check", action="store_true", help="run without storing outputs")
    parser.add_argument("--same", action="store_true", help="the same, and what is stored must be what the cells say now")
    parser.add_argument("--slow", action="store_true", help="run cells flagged slow, too")
    args = parser.parse_args()
    paths = [Path(p) for p in args.notebooks or sorted(nbglob(as_path=True))]
    save = not (args.check or args.same)
    if len(paths) == 1: return int(not run(paths[0].absolute(), save=save, slow=args.slow, same=args.same))
    flags = [flag for flag, given in (("--check", args.check), ("--same", args.same), ("--slow", args.slow)) if given]
    alone = [sys.executable, __file__, *flags]   # a process each: how one notebook draws must not change another's pictures
    failed = [p.name for p in paths if subprocess.run([*alone, str(p)]).returncode]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
