"Two processes learn what one learns, whatever a method keeps beside the weights."
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import make_base, rows, short_spec
from two_processes import STOPPED, learned

from strlora import runs

STATEFUL = ("strlora", "ewc", "lwf", "replay", "olora", "smolora", "same", "branchlora", "strlora_prototypes")
STOPS = ("stop", "stop+shares")
SHARED = tuple(f"{method}+shares" for method in STATEFUL)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pair(base, tmp_path_factory):
    "All methods in one launch of two processes."
    out = tmp_path_factory.mktemp("pair")
    script = Path(__file__).with_name("two_processes.py")
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(script.parent), str(script.parent.parent)]))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script), base, str(out), *STATEFUL, *SHARED, *STOPS],
                          capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def alone(base):
    "What one process learns, once a method."
    return functools.cache(functools.partial(learned, base))


@pytest.mark.parametrize("method", STATEFUL + SHARED)
def test_two_are_one(alone, pair, method):
    "Terms of the loss to 1e-5, answers and choices of experts exactly, weights and the method's state up to noise; both processes alike to the last bit."
    found, tensors = alone(method.partition("+")[0])
    both = [json.loads((pair/f"{method}-{rank}.json").read_text()) for rank in (0, 1)]
    kept = [load_file(pair/f"{method}-{rank}.safetensors") for rank in (0, 1)]
    assert [b["world"] for b in both] == [2, 2] and found["world"] == 1
    looked = [b.pop("looked") for b in both]
    assert looked == [0, 0] if not found["routing"] else looked == [3, 3 if "+" in method else 2] and found["looked"] == 5
    assert both[0] == both[1]
    assert both[0]["kept"] < found["kept"] if "+" in method else both[0]["kept"] == found["kept"]
    assert kept[0].keys() == kept[1].keys() and all(torch.equal(kept[0][n], kept[1][n]) for n in kept[0])
    for a, b in zip(found["steps"], both[0]["steps"], strict=True): assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert found["answers"] == both[0]["answers"] and found["state"].keys() == both[0]["state"].keys()
    assert both[0]["routing"] == both[0]["routing by one"]
    chosen = lambda rows: [(r["layer"], r["task"], r["expert"], r["selected"]) for r in rows]
    assert chosen(found["routing"]) == chosen(both[0]["routing"])
    assert tensors.keys() == kept[0].keys() and any(n.startswith("steps/") for n in tensors) == (method.partition("+")[0] == "strlora_prototypes")
    assert all(torch.equal(t, kept[0][n]) for n, t in tensors.items() if n.startswith("steps/")), "each expert has taken as many steps"
    # AdamW divides a gradient by its own size: where it is all but zero, float noise decides the sign of a whole step
    off = {n: float((t.float() - kept[0][n].float()).norm() / t.float().norm().clamp(min=1e-6)) for n, t in tensors.items()}
    assert max(off.values()) < 0.1, {n: o for n, o in off.items() if o >= 0.1}


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    "Answers of the run of `stopped`, by one process that nobody stops."
    return rows(runs.start(short_spec(base, *STOPPED), tmp_path_factory.mktemp("whole")/"run"))


@pytest.mark.parametrize("word", STOPS)
def test_both_stop_between_two_batches_of_questions(pair, whole, word):
    "One is told to; both save and stop with its signal, and go on without asking anything twice."
    both = [json.loads((pair/f"{word}-{rank}.json").read_text()) for rank in (0, 1)]
    for b in both: assert (b["signal"], b["asked before"], b["status"], b["kept"]) == (signal.SIGTERM, 1, "interrupted", 1)
    assert [b["asked"] for b in both] == [3, 3 if "+" in word else 2]  # five batches; without shares no idle one
    assert both[0]["predictions"] == both[1]["predictions"] == whole
