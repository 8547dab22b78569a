"""Make a run of the study once more and compare it with its artefact: row by row, then by its scores.

    tools/reproduce.py [RUN]     RUN: a folder such as results/mini/windows/lora/seed4; without one, any

Exit code 0: the same to the last digit, or scores within `NEAR`; 1: further apart; 2: nothing that could be compared.
"""
import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from strlora import report, runs
from strlora.core import SpecError, StrLoraError, read_json
from strlora.folder import PACKAGES, commit, hardware, installed
from strlora.spec import resolve

ROOT = Path(__file__).resolve().parents[1] / "results" / "mini"
TABLES = {"train": ["seconds"], "predictions": []}  # and what of them differs from time to time
SPLITS = ("proxy", "full")                          # what a run asks by itself; other words are asked later
# Points. Ours: sums in another order (the layer before and after a rewrite, two seeds) moved MAP by half a point; a final score rests
# on fewer answers. Seeds are no measure: each has a stream of its own, and they differ by tens of points.
NEAR = {"MAP": 3.0, "MAF": 3.0, "final AP": 6.0}


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


def circumstances(
    info: dict[str, Any],  # run.json
) -> dict[str, Any]:       # by name, what numbers may depend on
    "Machine, packages and commit of a run."
    return {"commit": info.get("commit"), **info.get("hardware", {}), **info.get("versions", {})}


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
    folder: Path,  # of a finished run
) -> int:          # exit code
    "Say how it was made, make it again, say what is the same."
    info = checked(folder)
    spec = resolve(info["spec"])
    print(f"{folder}: {info['method']}, seed {spec.seed}", flush=True)
    now = {"commit": commit()[0], **hardware(), **{name: installed(name) for name in PACKAGES}}
    for name, value in now.items():
        then = circumstances(info).get(name, "not written down")
        if then != value: print(f"  {name}: {then} there, {value} here")
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch, "run")
        runs.start(spec, other)
        found = differing(folder, other)
        if not any(found.values()):
            print(f"the same to the last digit: {' and '.join(found)}")
            return 0
        print("rows that differ: " + ", ".join(f"{n} of {name}" for name, n in found.items()))
        table, close = near(report.load_run(folder), report.load_run(other))
    print(table.round(1).to_string())
    print("scores are near" if close else "scores are further apart than another order of sums explains")
    return 0 if close else 1


def main(
    words: list[str] | None = None,  # of the command line
) -> int:
    "Compare one run."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a finished run (default: any of the study)")
    folder = chosen(parser.parse_args(words).run)
    try: return once_more(folder)
    except (KeyboardInterrupt, runs.Interrupted):
        print("stopped; nothing is kept", file=sys.stderr)
        return 130
    except (KeyError, ValueError, StrLoraError) as error:  # a record that is not one of ours
        print(f"{folder}: cannot be compared: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__": raise SystemExit(main())
