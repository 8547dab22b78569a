"""Where questions in other words go: the prototypes that a run's model takes them for, beside those of the same questions in usual words.

    python tools/held_out_routing.py RUN [RUN ...]      runs of strlora_prototypes with a checkpoint; writes a table
"""
import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd

from strlora import checkpoint
from strlora.checkpoint import load_adapter_state
from strlora.core import StrLoraError
from strlora.folder import info_of
from strlora.job import Job
from strlora.methods.prototypes import image_vectors
from strlora.runs import spec_in
from strlora.spec import EXECUTION
from strlora.tuner.state import layers_of

TABLE = Path(__file__).resolve().parents[1] / "results" / "mini" / "trials" / "held_out_routing.csv"


def went(
    folder: Path,  # of a run
) -> pd.DataFrame:  # run, stream, seed, task, own, same: shares
    "Of each task's questions in other words: how many go where questions of that task go, how many where they would go in usual words."
    info = info_of(folder)
    job = Job(spec_in(folder, info))
    load_adapter_state(job.model, checkpoint.load(folder / "checkpoint", info["spec"], EXECUTION)[0], folder)
    router = next(iter(layers_of(job.model)[0].strlora_router.values()))
    kinds = lambda samples: router.instructions.recognise(job.trainer.instructions(samples), image_vectors(job.trainer, samples)).tolist()
    usual, other = ({task: kinds(samples) for task, samples in job.stream.tested(split).items()} for split in ("full", "held_out"))
    owners = pd.Series({(kind, task): n for task, found in usual.items() for kind, n in pd.Series(found).value_counts().items()})
    owner = owners.groupby(level=0).idxmax().map(lambda pair: pair[1])  # of whose questions a prototype has most
    return pd.DataFrame([{"method": info["method"], "stream": job.stream.name, "seed": info["spec"]["seed"], "task": task,
                          "own": sum(owner.get(kind) == task for kind in found) / len(found),
                          "same": sum(a == b for a, b in zip(found, usual[task], strict=True)) / len(found)} for task, found in other.items()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of strlora_prototypes with a checkpoint")
    args = parser.parse_args()
    try: found = pd.concat([went(folder) for folder in args.runs])
    except StrLoraError as error:
        print(error, file=sys.stderr)
        return 2
    found.round(4).to_csv(TABLE, index=False, lineterminator="\n")
    print(found.groupby("task", sort=False)[["own", "same"]].mean().round(3).to_string())
    return 0


if __name__ == "__main__":
    sys.exit(main())
