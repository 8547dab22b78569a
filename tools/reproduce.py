"""Make a run of the study once more and compare it with its artefact: row by row, then by its scores.

    tools/reproduce.py [RUN]     RUN: a folder such as results/mini/windows/lora/seed4; without one, any

Exit code 0: the same to the last digit, or as near as runs of other seeds are to each other; 1: neither.
"""
import argparse
import random
import tempfile
from pathlib import Path

import pandas as pd

from strlora import report, runs
from strlora.core import SpecError, read_json
from strlora.folder import hardware
from strlora.spec import resolve

ROOT = Path(__file__).resolve().parents[1] / "results" / "mini"
TABLES = {"train": ["seconds"], "predictions": []}  # and what of them differs from time to time


def chosen(
    name: str | None,  # of a folder; None: any of the study
) -> Path:
    "A finished run."
    if name: return Path(name)
    return random.choice(sorted(path.parent for path in ROOT.glob("*/*/seed*/run.json")))


def differing(
    one: Path,    # folder of a run
    other: Path,  # and of another
) -> dict[str, int]:  # table -> rows that differ
    "What is not the same."
    found = {}
    for name, free in TABLES.items():
        if not (one / f"{name}.parquet").exists(): continue
        a, b = (pd.read_parquet(folder / f"{name}.parquet").drop(columns=free) for folder in (one, other))
        found[name] = len(a) if a.shape != b.shape else int((~(a.eq(b) | (a.isna() & b.isna())).all(axis=1)).sum())
    return found


def near(
    there: report.Run,  # the artefact
    here: report.Run,   # made once more
    peers: list[Path],  # runs of other seeds
) -> tuple[pd.DataFrame, bool]:  # scores, and whether they stray less than seeds do
    "MAP, MAF and final AP of both, beside how far seeds are apart."
    one, other = (report.summary([run]).iloc[0] for run in (there, here))
    names = [name for name in ("MAP", "MAF", "final AP") if name in one]
    one, other, seeds = one[names], other[names], report.summary([report.load_run(path) for path in peers])[names]
    table = pd.DataFrame({"artefact": one, "once more": other, "lowest seed": seeds.min(), "highest seed": seeds.max()})
    apart = seeds.max() - seeds.min()
    return table, bool(((one - other).abs() <= apart).all())


def main(
    words: list[str] | None = None,  # of the command line
) -> int:
    "Say what is the same."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a finished run (default: any of the study)")
    folder = chosen(parser.parse_args(words).run)
    if not (folder / "run.json").is_file():
        raise SystemExit(f"{folder}: expected a run, found no run.json. Name a folder such as {ROOT}/windows/lora/seed0.")
    info, now = read_json(folder / "run.json"), hardware()
    print(f"{folder}: {info['method']}, seed {info['spec']['seed']}, commit {str(info['commit'])[:12]}", flush=True)
    for name in sorted({*info["hardware"], *now}):
        then = info["hardware"].get(name, "not written down")
        if then != now.get(name): print(f"  {name}: {then} there, {now.get(name)} here")
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch, "run")
        try: runs.start(resolve(info["spec"]), other)
        except SpecError as error: raise SystemExit(f"its settings are not known any more: {error}") from error
        found = differing(folder, other)
        if not any(found.values()):
            print(f"the same to the last digit: {' and '.join(found)}")
            return 0
        print("rows that differ: " + ", ".join(f"{n} of {name}" for name, n in found.items()))
        peers = sorted(path.parent for path in folder.parent.glob("seed*/run.json"))
        table, close = near(report.load_run(folder), report.load_run(other), peers)
        print(table.round(1).to_string())
        print("nearer than runs of different seeds are to each other" if close else "further apart than runs of different seeds")
        return 0 if close else 1


if __name__ == "__main__": raise SystemExit(main())
