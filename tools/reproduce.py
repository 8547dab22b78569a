"""Make a run of the study once more and compare it with its artefact: row by row, then by its scores.

    tools/reproduce.py [RUN]     RUN: a folder such as results/mini/windows/lora/seed4; without one, any

It is made with the code of the commit that it came from, checked out under scratch/ for the time it takes, or with the code at hand where
git does not have that commit. Digits repeat on the same processor with the same packages; where these differ, or are not written down,
no equality can be claimed, and scores are compared instead.
Exit code 0: the same to the last digit, or scores within `NEAR` where equality cannot be claimed; 1: neither; 2: nothing that could be compared.
"""
import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from strlora import report
from strlora.core import SpecError, StrLoraError, TrainingError, read_json
from strlora.folder import PACKAGES, commit, hardware, installed
from strlora.spec import resolve

TOP = Path(__file__).resolve().parents[1]
ROOT = TOP / "results" / "mini"
KEPT = ROOT / "reproduced.jsonl"                    # one line a run that was made once more, for `--keep`
TABLES = {"train": ["seconds"], "predictions": []}  # and what of them differs from time to time
SPLITS = ("proxy", "full")                          # what a run asks by itself; other words are asked later
# Points. Ours: sums in another order (the layer before and after a rewrite, two seeds) moved MAP by half a point; a final score rests
# on fewer answers. Seeds are no measure: each has a stream of its own, and they differ by tens of points.
NEAR = {"MAP": 3.0, "MAF": 3.0, "final AP": 6.0}
BEGIN = "import json, sys; from strlora import runs, spec; runs.start(spec.resolve(json.load(sys.stdin)), sys.argv[1])"


def chosen(
    name: str | None,  # of a folder; None: any of the study
) -> Path:
    "A run."
    if name: return Path(name)
    return random.choice(sorted(path.parent for path in ROOT.glob("*/*/seed*/run.json")))


def checked(
    folder: Path,  # of a run
) -> dict[str, Any]:  # its run.json
    "A finished run with everything that is compared; a `SpecError` for anything else."
    if not (folder / "run.json").is_file():
        raise SpecError(expected="a run", found="no run.json", where=folder, remedy=f"Name a folder such as {ROOT}/windows/lora/seed0.")
    info = read_json(folder / "run.json")
    if info.get("status") != "finished":
        raise SpecError(expected="a finished run", found=info.get("status", "no status"), where=folder, remedy="Finish it: strlora resume.")
    needed = ["predictions"] if info["spec"]["method"] == "zero_shot" else list(TABLES)
    missing = [f"{name}.parquet" for name in needed if not (folder / f"{name}.parquet").is_file()]
    if missing: raise SpecError(expected="all tables of a run", found=f"no {' and no '.join(missing)}", where=folder, remedy="Copy all of it.")
    return info


# --- how it was made ------------------------------------------------------------------------------------------------

def named(
    sha: str | None,        # of a commit
    changed: bool | None,   # whether the code was another
) -> str | None:
    "The name of some code."
    return f"{sha}, changed" if sha and changed else sha


def circumstances(
    info: Mapping[str, Any],  # run.json
) -> dict[str, Any]:          # by name, what digits may depend on
    "Machine, packages and commit of a run."
    return {"commit": named(info.get("commit"), info.get("dirty")), **info.get("hardware", {}), **info.get("versions", {})}


def threads_of(
    info: Mapping[str, Any],  # run.json
) -> int:
    "CPU threads that a run was made with."
    return info["spec"].get("train", {}).get("threads") or info.get("hardware", {}).get("threads") or 1


def at_hand(
    info: Mapping[str, Any],  # run.json of a run that is made once more
    code: str | None,         # commit that it is made with; None: what lies here
) -> dict[str, Any]:          # by the names of `circumstances`
    "The same of this machine."
    return {"commit": code or named(*commit()), **hardware(), "threads": threads_of(info), **{name: installed(name) for name in PACKAGES}}


def doubts(
    there: Mapping[str, Any],  # of `circumstances`
    here: Mapping[str, Any],   # of `at_hand`
) -> list[str]:                # none: the digits must be the same
    "Why equality cannot be claimed."
    return [f"{name}: {there[name]} there, {value} here" if name in there else f"{name}: not written down there, {value} here"
            for name, value in here.items()
            if name != "cpus" and (there.get(name, "not written down") != value or name == "commit" and "changed" in str(value))]


# --- making it ------------------------------------------------------------------------------------------------------

def git(
    *words: str,  # after `git`
) -> bool:
    "Whether git does something with this repository."
    try: return subprocess.run(["git", "-C", str(TOP), *words], capture_output=True, timeout=300).returncode == 0
    except (OSError, subprocess.TimeoutExpired): return False


@contextlib.contextmanager
def code_of(
    info: Mapping[str, Any],  # run.json
    home: Path,               # where it may be checked out
) -> Iterator[tuple[Path, str | None]]:  # folder with the package, and the commit if it is the recorded one
    "The code that a run came from; what lies here if that is the same or there is no other, which is said."
    sha, tree = info.get("commit"), home / "code"
    if not sha or info.get("dirty"): why = "the code that it came from was never committed"
    elif commit() == (sha, False): why = ""
    elif not git("cat-file", "-e", f"{sha}^{{commit}}"): why = f"git does not have {sha[:12]}"
    elif not git("worktree", "add", "--detach", str(tree), sha): why = f"git cannot check out {sha[:12]} in {tree.parent}"
    else:
        try: yield tree, sha
        finally: git("worktree", "remove", "--force", str(tree))
        return
    if why: print(f"  {why}: made with the code at hand", flush=True)
    yield TOP, None if why else sha


def make(
    info: Mapping[str, Any],  # run.json
    code: Path,               # folder with the package
    folder: Path,             # new
) -> None:
    "The run once more, in a process of its own, as it was in the study."
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads_of(info)))
    env = {**os.environ, "PYTHONPATH": str(code), "PYTHONWARNINGS": "ignore", **threads}
    done = subprocess.run([sys.executable, "-P", "-c", BEGIN, str(folder)], input=json.dumps(info["spec"]), text=True, env=env,
                          start_new_session=True)
    if done.returncode:
        raise TrainingError(expected="a run", found=f"exit code {done.returncode}", where=code,
                            remedy="Read what it says above; --code here takes the code at hand.")


# --- comparing ------------------------------------------------------------------------------------------------------

def differing(
    one: Path,    # folder of a run
    other: Path,  # and of another
) -> dict[str, int]:  # table -> rows that differ
    "What is not the same."
    found = {}
    for name, free in TABLES.items():
        if not (one / f"{name}.parquet").exists() and not (other / f"{name}.parquet").exists(): continue
        a, b = (pd.read_parquet(folder / f"{name}.parquet").drop(columns=free, errors="ignore") for folder in (one, other))
        if "split" in a: a, b = (rows[rows["split"].isin(SPLITS)].reset_index(drop=True) for rows in (a, b))
        alike = a.shape == b.shape and list(a) == list(b)
        found[name] = int((~(a.eq(b) | (a.isna() & b.isna())).all(axis=1)).sum()) if alike else max(len(a), len(b), 1)
    return found


def near(
    there: report.Run,  # the artefact
    here: report.Run,   # made once more
) -> tuple[pd.DataFrame, bool]:  # scores, and whether each is within `NEAR`
    "MAP, MAF and final AP of both; what a method has none of is left out."
    one, other = (report.summary([run]).iloc[0] for run in (there, here))
    names = [name for name in NEAR if name in one and pd.notna(one[name])]
    table = pd.DataFrame({"artefact": one[names], "once more": other[names], "near": pd.Series(NEAR)[names]}).astype(float)
    return table, bool(len(names) and ((table["artefact"] - table["once more"]).abs() <= table["near"]).all())


def once_more(
    folder: Path,           # of a finished run
    recorded: bool = True,  # with the code that it came from, if git has it
    keep: bool = False,     # write down what was found
) -> int:                   # exit code
    "Say how it was made, make it again, say what is the same."
    info = checked(folder)
    print(f"{folder}: {info['method']}, seed {resolve(info['spec']).seed}", flush=True)
    (scratch := TOP / "scratch").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as home:
        with code_of(info, Path(home)) if recorded else contextlib.nullcontext((TOP, None)) as (code, sha):
            there, here = circumstances(info), at_hand(info, sha)
            why = doubts(there, here)
            if why: print("\n  ".join(["  no equality can be claimed, for digits may depend on", *why]), flush=True)
            make(info, code, other := Path(home, "run"))
        rows = differing(folder, other)
        table, close = near(report.load_run(folder), report.load_run(other))
    same = not any(rows.values())
    row = {"run": "/".join(folder.resolve().parts[-3:]), "commit": here["commit"], "equal": same, "claimed": not why,
           "rows": rows, "largest_difference": round(float((table["artefact"] - table["once more"]).abs().max()), 4) if len(table) else None,
           **{name: here[name] for name in ("processor", "threads", "torch")},
           **{f"recorded_{name}": there.get(name) for name in ("commit", "processor", "threads", "torch")}}
    if keep:
        with KEPT.open("a", encoding="utf-8") as file: file.write(json.dumps(row) + "\n")
    if same: print(f"the same to the last digit: {' and '.join(rows)}")
    else:
        print("rows that differ: " + ", ".join(f"{n} of {name}" for name, n in rows.items()))
        print(table.round(1).to_string())
        print("scores are near" if close else "scores are further apart than another order of sums explains")
        if not why: print("nothing is known to differ in how they were made, so they should be the same")
    return 0 if same or (close and why) else 1


def main(
    words: list[str] | None = None,  # of the command line
) -> int:
    "Compare one run."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[4:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a finished run (default: any of the study)")
    parser.add_argument("--code", choices=["recorded", "here"], default="recorded",
                        help="recorded: of the commit that the run came from, if git has it (default); here: as it lies in this folder")
    parser.add_argument("--keep", action="store_true", help="add a line with what was found to results/mini/reproduced.jsonl")
    args = parser.parse_args(words)
    folder = chosen(args.run)
    try: return once_more(folder, args.code == "recorded", args.keep)
    except KeyboardInterrupt:
        print("stopped; nothing is kept", file=sys.stderr)
        return 130
    except (KeyError, ValueError, StrLoraError) as error:  # a record that is not one of ours
        print(f"{folder}: cannot be compared: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__": raise SystemExit(main())
