"Two processes learn what one learns, whatever a method keeps beside the weights."
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import make_base
from two_processes import learned

STATEFUL = ("strlora", "ewc", "lwf", "replay", "olora", "smolora", "same", "branchlora")
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
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script), base, str(out), *STATEFUL, *SHARED],
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
    assert both[0] == both[1]
    assert both[0]["kept"] < found["kept"] if "+" in method else both[0]["kept"] == found["kept"]
    assert kept[0].keys() == kept[1].keys() and all(torch.equal(kept[0][n], kept[1][n]) for n in kept[0])
    for a, b in zip(found["steps"], both[0]["steps"], strict=True): assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    assert found["answers"] == both[0]["answers"] and found["state"].keys() == both[0]["state"].keys()
    chosen = lambda rows: [(r["layer"], r["task"], r["expert"], r["selected"]) for r in rows]
    assert chosen(found["routing"]) == chosen(both[0]["routing"])
    assert tensors.keys() == kept[0].keys()
    # AdamW divides a gradient by its own size: where it is all but zero, float noise decides the sign of a whole step
    off = {n: float((t.float() - kept[0][n].float()).norm() / t.float().norm().clamp(min=1e-6)) for n, t in tensors.items()}
    assert max(off.values()) < 0.1, {n: o for n, o in off.items() if o >= 0.1}
