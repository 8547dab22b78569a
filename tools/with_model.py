"""What needs the trained model of a finished run, which git does not hold: make the run again, compare it, go on from there.

    tools/with_model.py interference RUN ...   where its tasks get in each other's way: RUN/interference.csv
    tools/with_model.py held_out RUN ...       its answers to questions in other words: rows of RUN/predictions.parquet
    tools/with_model.py routes RUN ...         which prototypes such questions go to, if it has some: RUN/held_out_routing.csv
    tools/with_model.py looks RUN ...          how it routes some questions about some pictures: view/METHOD.json beside the streams
    tools/with_model.py model RUN ...          nothing more: says where the model is, for `strlora chat` and the like

A run that has its checkpoint is used where it is; any other is made again in scratch/again, with the settings and the seed of its run.json,
and stays there for the next time. What a run has already is not made anew without --again.
Exit code 0: all is there; 1: a run failed, or came out too far from its artefact, so that nothing of it is copied; 2: not a run.
"""
import argparse
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import reproduce
from transformers.utils import logging

from strlora import again, checkpoint, interference, report
from strlora.chat import Speaker
from strlora.checkpoint import load_adapter_state
from strlora.core import SpecError, StrLoraError, atomic_file
from strlora.data.mini.bench import test_set
from strlora.folder import info_of
from strlora.job import Job
from strlora.methods.prototypes import image_vectors
from strlora.methods.table import METHODS
from strlora.parallel import Child, settle, work_off
from strlora.request import asked
from strlora.runs import Interrupted, spec_in
from strlora.spec import EXECUTION, as_dict, resolve
from strlora.toml import to_toml
from strlora.tuner.state import layers_of
from strlora.view import kept

AGAIN = Path("scratch", "again")
ROUTES = "held_out_routing.csv"
ASKED = (("gqa", 0), ("chart", 3), ("rs", 1), ("fin", 0))   # whose pictures are looked at
MORE = (("vqa", 1),)                                        # whose question is asked, too


# --- what is done with a model: found in `model`, the folder of a run with its checkpoint, left in `run` --------------

def held_out(
    path: Path,  # predictions.parquet
) -> list[dict[str, Any]]:
    "The answers to questions in words that training never shows."
    return [row for row in pq.read_table(path).to_pylist() if row["split"] == "held_out"]


def copied(
    path: Path,   # made
    place: Path,  # where it belongs
) -> None:
    "A file in another folder, whole or not at all."
    if path.resolve() == place.resolve(): return
    with atomic_file(place) as temporary: shutil.copyfile(path, temporary)


def ask(model: Path, run: Path) -> None:
    "Questions in other words, answered by `model`, among the answers of `run`."
    for task, score in again.ask_again(model, ["held_out"])["held_out"].items(): print(f"  {task:<12} {score:6.1f}")
    if model != run: again.replace_rows(run / "predictions.parquet", held_out(model / "predictions.parquet"))


def interfere(model: Path, run: Path) -> None:
    "The table of `strlora interference`, of `model`, for `run`."
    interference.write(model / "interference.csv", list(interference.measure(model)))
    copied(model / "interference.csv", run / "interference.csv")


def route(model: Path, run: Path) -> None:
    "Of each task's questions in other words: the shares that go to a prototype of that task, and to the one of their usual words."
    info = info_of(model)
    job = Job(spec_in(model, info))
    load_adapter_state(job.model, checkpoint.load(model / "checkpoint", info["spec"], EXECUTION)[0], model)
    router = next(iter(layers_of(job.model)[0].strlora_router.values()))
    if not hasattr(router, "instructions"):
        raise SpecError(expected="a run whose router has prototypes", found=info["method"], where=run, remedy="Use strlora_prototypes.")
    kinds = lambda samples: router.instructions.recognise(job.trainer.instructions(samples), image_vectors(job.trainer, samples)).tolist()
    usual, other = ({task: kinds(samples) for task, samples in job.stream.tested(split).items()} for split in ("full", "held_out"))
    counts = pd.Series({(kind, task): found.count(kind) for task, found in usual.items() for kind in set(found)})
    owner = counts.groupby(level=0).idxmax().map(lambda pair: pair[1])  # of whose questions a prototype has most
    table = pd.DataFrame([{"task": task, "own": sum(owner.get(kind) == task for kind in found) / len(found),
                           "same": sum(a == b for a, b in zip(found, usual[task], strict=True)) / len(found)} for task, found in other.items()])
    with atomic_file(run / ROUTES) as temporary: table.round(4).to_csv(temporary, index=False, lineterminator="\n")


def look(model: Path, run: Path) -> None:
    "How `model` routes every question at every picture, in the file for `run`."
    samples = [test_set(task).samples[place] for task, place in ASKED + MORE]
    viewed(run).parent.mkdir(parents=True, exist_ok=True)
    kept(Speaker(model), [s.images[0] for s in samples[:len(ASKED)]], [s.instruction for s in samples], viewed(run), 18)


def viewed(run: Path) -> Path:
    "Where looks at a run of a stream are kept."
    return run.parents[2] / "view" / f"{run.parent.name}.json"


@dataclass(frozen=True)
class Step:
    "Something that needs a model."
    there: Callable[[Path], bool]     # does a run have it?
    do: Callable[[Path, Path], None]  # for a run, with the model in a folder


STEPS = {"interference": Step(lambda run: (run / "interference.csv").is_file(), interfere),
         "held_out": Step(lambda run: bool(held_out(run / "predictions.parquet")), ask),
         "routes": Step(lambda run: (run / ROUTES).is_file(), route),
         "looks": Step(lambda run: viewed(run).is_file(), look),
         "model": Step(lambda run: False, lambda model, run: print(f"{run}: its model is in {model}"))}


# --- the model ------------------------------------------------------------------------------------------------------

def home(
    run: Path,             # folder
    info: Mapping[str, Any],  # its run.json
    limit: int | None,     # of a smoke test
) -> Path:
    "Where the model of a run is, or will be."
    if limit is None and (checkpoint.exists(run / "checkpoint") or not METHODS[info["spec"]["method"]].adapter): return run
    return Path(AGAIN, *run.resolve().parts[-4:-1], run.name + (f"-limit{limit}" if limit else ""))


def once_more(
    run: Path,             # folder
    info: Mapping[str, Any],  # its run.json
    limit: int | None,     # smoke test: at most so many samples a chunk and questions a task
) -> Child:
    "The run that makes the model, with what its artefact was made with."
    spec = resolve(info["spec"], run / "run.json")
    if limit is not None:
        if limit < 2: raise SpecError(expected="at least 2", found=limit, where="--limit", remedy="Some questions are for the proxy, some not.")
        sizes = {"chunk_size": limit, "test_size": limit, "proxy_size": limit // 2}
        spec = replace(spec, stream=replace(spec.stream, **{name: min(getattr(spec.stream, name), n) for name, n in sizes.items()}))
    folder = home(run, info, limit)
    return Child(f"{spec.method} on {spec.stream.name}", [str(folder.with_name(f"{folder.name}.toml"))], spec, folder)


def written(
    child: Child,  # not begun
) -> None:
    "Write the file that the run is started with; a `SpecError` if it says something else."
    settings = {name: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
                for name, value in as_dict(child.spec).items()}
    file = Path(child.words[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary: temporary.write_text(to_toml(settings), encoding="utf-8")
    if asked(child.words)[0] != child.spec:
        raise SpecError(expected="settings that a file can hold", found="one that is unset against its default", where=file,
                        remedy="Make the run by hand: strlora run --out.")


def judged(
    run: Path,    # the artefact
    model: Path,  # made again
) -> bool:        # whether it may speak for the artefact
    "Say whether a run that was made again is the same, or how far it is."
    rows = reproduce.differing(run, model)
    if not any(rows.values()):
        print(f"{run}: made again in {model}, the same to the last digit")
        return True
    table, close = reproduce.near(report.load_run(run), report.load_run(model))
    found = ", ".join(f"{name} {row['artefact']:.1f} there and {row['once more']:.1f} here" for name, row in table.iterrows())
    print(f"{run}: made again in {model}, not the same: {', '.join(f'{n} rows of {name}' for name, n in rows.items())} differ; {found}"
          + ("" if close else "; too far apart, nothing is copied"))
    info = reproduce.checked(run)
    if why := reproduce.doubts(reproduce.circumstances(info), reproduce.at_hand(info, None)):
        print("\n  ".join(["  digits may depend on", *why]))
    return close


# --- the command ----------------------------------------------------------------------------------------------------

def carried_out(
    args: argparse.Namespace,  # of the command line
) -> int:                      # exit code
    "Make the models that are missing, side by side; then the step for each run."
    step, runs = STEPS[args.step], [run for run in dict.fromkeys(args.runs)]
    infos = {run: reproduce.checked(run) for run in runs}
    todo = [run for run in runs if args.again or args.limit is not None or not step.there(run)]
    if todo != runs: print(f"{len(runs) - len(todo)} of {len(runs)} have it ({args.step}); --again makes it anew")
    children = {run: once_more(run, infos[run], args.limit) for run in todo}
    made = [child for run, child in children.items() if child.folder != run]
    if args.dry_run:
        for run, child in children.items(): print(f"{run}: model in {child.folder} ({settle(child) if child in made else 'there'})")
        return 0
    for child in made: written(child)
    work_off(made, args.jobs or os.cpu_count() or 1)
    bad = [run for run, child in children.items() if child in made and child.state != "finished"]
    for run in (run for run in todo if run not in bad):
        model = children[run].folder
        if args.limit is not None: step.do(model, model)
        elif model == run or judged(run, model): step.do(model, run)
        else: bad.append(run)
    for run in bad: print(f"not done: {args.step} of {run}", file=sys.stderr)
    if args.limit is not None: print("a smoke test: its numbers mean nothing and are copied nowhere", file=sys.stderr)
    return int(bool(bad))


def main(
    words: list[str] | None = None,  # of the command line
) -> int:
    "Do one step for some runs."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="\n".join(__doc__.splitlines()[2:]),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS, help="what is to be done")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run, as results/mini/windows/lora/seed3")
    parser.add_argument("--again", action="store_true", help="make anew what a run has already")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time, one thread each (default: the number of cores)")
    parser.add_argument("--limit", type=int, metavar="N", help="smoke test: at most N samples a chunk and N questions a task; nothing is copied")
    parser.add_argument("--dry-run", action="store_true", help="say where the models are or would be and stop")
    args = parser.parse_args(words)
    logging.disable_progress_bar()
    try: return carried_out(args)
    except (KeyboardInterrupt, Interrupted):
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (KeyError, OSError, ValueError, StrLoraError) as error:
        print(f"with_model: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__": raise SystemExit(main())
