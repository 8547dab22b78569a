"""How long the runs of make's targets take on two cores: `tools/hours.py TARGET ...`, each after those before it.

Counted from the commands that `make -n` prints and from the seconds that stand in the run.json of runs in results/mini; a run that is not
there is taken to be as long as others of its method, on the same stream if there are any. Needs neither torch nor numpy.
"""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from strlora.cli import parser

CORES = 2
Run = tuple[str, str, str, str]  # stream, method, seed, what is set otherwise


def planned(
    target: str,  # of the Makefile
) -> set[Run]:
    "The runs of a target's `strlora compare` and `strlora ablate`."
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of a make that runs this
    said = subprocess.run(["make", "-ns", target, "ARGS="], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
    found: set[Run] = set()
    for line in said.replace("\\\n", " ").splitlines():
        command, *words = shlex.split(line) or [""]
        if not command.endswith("strlora") or words[:1] not in (["compare"], ["ablate"]): continue
        args = parser().parse_args(words)
        name, _, values = getattr(args, "setting", "").partition("=")
        settings = ["tuned", *(" ".join([f"{name}={value}", *args.also]) for value in values.split(","))] if name else [""]
        methods, seeds = [args.method] if name else args.methods, args.seeds.split(",")
        found |= {(args.stream or "windows", method, seed, setting) for method in methods for seed in seeds for setting in settings}
    return found


def recorded() -> dict[Run, float]:
    "The seconds that runs took; of some they were not written down."
    found = {}
    for path in ROOT.glob("results/mini/*/*/seed*/run.json"):
        stream, method, seed = path.parts[-4:-1]
        seconds = json.loads(path.read_text(encoding="utf-8")).get("seconds")
        if seconds: found[stream, method, seed.removeprefix("seed"), ""] = seconds
    return found


def seconds_of(
    run: Run,                   # made or not
    known: dict[Run, float],    # of `recorded`
) -> float:
    "What a run takes, as far as is known."
    if run in known: return known[run]
    same = [[s for other, s in known.items() if other[part] == run[part]] for part in (slice(0, 2), slice(1, 2))]
    return mean(next(filter(None, same), list(known.values())))


def main(
    targets: list[str],  # of the Makefile
) -> int:
    "Say how long they take."
    known, before, parts = recorded(), set(), []
    if not known: return 0
    for target in targets:
        runs = planned(target) - before
        before |= runs
        parts.append(f"{target} {sum(seconds_of(run, known) for run in runs) / CORES / 3600:.0f} h for {len(runs)} runs")
    print(f"  On two cores: {', then '.join(parts)}. {len(before & set(known))} of them stand in results/mini with their seconds;\n"
          "  the others are taken to be as long as those of their method.")
    return 0


if __name__ == "__main__": raise SystemExit(main(sys.argv[1:]))
