"What may go wrong while a run is written: two runs in one folder, a signal, a process that dies."
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small import SHORT, make_base, rows, timeless

from strlora import folder
from strlora.cli import main
from strlora.core import read_json
from strlora.folder import locked, status_of

LONG = ("stream.chunks=4", "chunk_size=40", "save_every=1", "grad_norm_every=0", "lora_dropout=0.0", "batch_size=2", "accumulation=2")
CODE = "import sys; from strlora.cli import main; sys.exit(main(sys.argv[1:]))"
PAIR = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--no-python", sys.executable]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def words(base, out, *pairs):
    return ["run", *(x for pair in (f"model.base={base!r}", *SHORT, *LONG, *pairs) for x in ("--set", pair)), "--out", str(out)]


def begun(out, command, after=1):
    "A process that has gone beyond so many steps."
    path = os.pathsep.join([str(folder.PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path))
    deadline = time.monotonic() + 250
    while time.monotonic() < deadline and process.poll() is None and steps(out) <= after: time.sleep(0.1)
    assert process.poll() is None, process.stderr.read()[-2000:]
    assert steps(out) > after
    return process


def steps(out):
    try: return read_json(Path(out, "checkpoint", "state.json"))["state"]["position"]["total"]
    except RuntimeError: return 0  # none yet, or just being replaced


def test_a_folder_belongs_to_one_run(base, tmp_path, capsys):
    out = tmp_path/"run"
    with locked(out):
        for again in ([], ["--again"]): assert main([*words(base, out), *again]) == 2
        assert "in use" in capsys.readouterr().err and not out.exists()
    assert list(tmp_path.iterdir()) == [], "the lock is gone"


@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_itself(base, tmp_path):
    process = begun(tmp_path/"run", ["-c", CODE, *words(base, tmp_path/"run")])
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 143 and "strlora resume" in err and status_of(tmp_path/"run") == "interrupted"


def ranks(process):
    "The processes of a launch, in the order of their ranks."
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try: parent, env = int((path/"stat").read_text().rpartition(")")[2].split()[1]), (path/"environ").read_bytes()
        except OSError: continue  # ended meanwhile
        if parent == process.pid and b"\0RANK=" in env: found[int(env.partition(b"\0RANK=")[2].partition(b"\0")[0])] = int(path.name)
    return [found[r] for r in sorted(found)]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes of a launch in /proc")
def test_processes_stop_together_and_the_run_goes_on_with_one(base, tmp_path):
    "One of two is told to stop: both save at the same step. One of two dies: the other says so. One alone ends the run as if nothing had been."
    out = tmp_path/"two"
    process = begun(out, [*PAIR, "-c", CODE, *words(base, out)])
    os.kill(ranks(process)[1], signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    assert status_of(out) == "interrupted" and "strlora resume" in err
    process = begun(out, [*PAIR, "-c", CODE, "resume", str(out)], after=steps(out))
    os.kill(ranks(process)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=100)
    assert process.returncode and "2 processes that answer" in err, err
    assert status_of(out) == "failed"
    assert main(["resume", str(out)]) == 0 and main(words(base, tmp_path/"one")) == 0
    said = [[(r["sample_id"], r["prediction"]) for r in rows(tmp_path/name)] for name in ("one", "two")]
    assert said[0] == said[1] and len(timeless(rows(out, "train"))) == 40
