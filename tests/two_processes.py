"""Methods trained for two short chunks, by one process or as one of several: `python two_processes.py BASE OUT METHOD...`

`METHOD+shares` lets the processes share out the frozen weights, as a launch with recipes/fsdp2.yaml does. `stop` is no method: a run that
the last process is told to stop while questions are answered, and that goes on.
"""
import contextlib
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from safetensors.torch import save_file
from small import rows, short_spec
from torch.distributed.tensor import DTensor

from strlora import checkpoint, evaluation, runs
from strlora.core import write_json
from strlora.job import Job

LARGE = ("stream.chunks=2", "chunk_size=10", "lora_dropout=0.0", "save_every=0", "grad_norm_every=2", "lr=5e-3", "lr_later=5e-3",
         "weight_decay=0.0", "r=32", "batch_size=2", "accumulation=2",
         "eval.prompts=5")  # five batches of proxies
STOPPED = ("method=lora", "stream.chunks=1", "chunk_size=8", "lora_dropout=0.0", "save_every=0",
           "eval.before=false", "eval.prompts=5", "batch_size=2", "accumulation=2")
OWN = {"same": ("freeze_after=1", "survey=5"), "ewc": ("fisher_samples=3",)}  # not the same number for both processes  # within the few steps of a chunk


def learned(base: str, method: str, *pairs: str) -> tuple[dict, dict]:
    "Everything that must not depend on the number of processes: numbers of the steps, answers, routing; tensors of adapter and parts."
    job, steps = Job(short_spec(base, f"method={method}", *LARGE, *OWN.get(method, ()), *pairs)), []
    job.trainer.fit(job.seen, Steps(steps))
    state, tensors = checkpoint.pack({name: part.state_dict() for name, part in job.trainer.parts.items()})
    kept = {f"adapter/{n}": t for n, t in checkpoint.adapter_state(job.model).items()} | {f"state/{n}": t for n, t in tensors.items()}
    own = getattr(job.trainer.optimizer, "optimizer", job.trainer.optimizer).state.values()  # steps of single experts, where they have some
    kept |= {f"steps/{i}": moments["step"] for i, moments in enumerate(own) if moments["step"].numel() > 1}
    answers = [{k: row[k] for k in ("sample_id", "prediction")} for row in job.ask("proxy", 2)]
    with counted("routed") as looked: routing = job.route(2)
    whole = evaluation.routing(job.model, job.questions("proxy"), 2) if routing else []
    return {"world": job.accelerator.num_processes, "kept": sum(held(p) for p in job.model.parameters()), "steps": steps, "answers": answers,
            "routing": routing, "routing by one": whole, "looked": len(looked), "state": state}, kept


@contextlib.contextmanager
def counted(name, press=0):
    "The calls of a function of evaluation in this process; at the one of this number it is told to stop."
    true, calls = getattr(evaluation, name), []
    def called(*args):
        calls.append(1)
        if len(calls) == press: os.kill(os.getpid(), signal.SIGTERM)
        return true(*args)
    setattr(evaluation, name, called)
    try: yield calls
    finally: setattr(evaluation, name, true)


def stopped(base: str, folder: Path) -> dict:
    "What this process sees of a run that is interrupted in its evaluation, and resumed."
    state, spec, found = PartialState(cpu=True), short_spec(base, *STOPPED), {}
    with counted("answers", press=state.process_index) as calls:  # the second of two; the first hears of it
        state.wait_for_everyone()  # all look at the folder before one writes there
        try: runs.start(spec, folder)
        except runs.Interrupted as error: found = {"signal": int(error.signal), "asked before": len(calls)}
        state.wait_for_everyone()
        found |= {"status": runs.status_of(folder), "kept": len(list((folder/"parts").glob("*.answered.parquet")))}
        state.wait_for_everyone()
        runs.resume(folder)
    return {**found, "asked": len(calls), "predictions": rows(folder)}


def held(p: torch.Tensor) -> int:
    "Numbers of a parameter that this process has."
    return p.to_local().numel() if isinstance(p, DTensor) else p.numel()


class Steps:
    def __init__(self, found): self.found = found

    def step_done(self, run, row): self.found.append({k: v for k, v in row.items() if k not in ("seconds", "grad_norm")})

    def chunk_trained(self, run): "Nothing to do."

    def chunk_done(self, run): "Nothing to do."


if __name__ == "__main__":
    torch.set_num_threads(1)
    for word in sys.argv[3:]:
        method, _, shares = word.partition("+")
        with patch_environment(ACCELERATE_USE_FSDP=bool(shares), FSDP_VERSION=2):
            more = ("gradient_checkpointing=true",) if shares else ()  # changes no number
            if method == "stop": found, tensors = stopped(sys.argv[1], Path(sys.argv[2], word)), {}
            else: found, tensors = learned(sys.argv[1], method, *more)
        out = Path(sys.argv[2], f"{word}-{os.environ['RANK']}")
        write_json(out.with_suffix(".json"), found)
        if tensors: save_file({n: t.contiguous() for n, t in tensors.items()}, out.with_suffix(".safetensors"))
