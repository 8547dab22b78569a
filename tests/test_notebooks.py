"""Every notebook is a test: run by nbdev_test's rules, in a process of its own, two at a time.

Cells flagged `#| slow` run with --slow and write to a folder of their own, not to the package and the results. Pages that
show results must say what is stored in them. Time limit: 60 s a notebook on a quiet machine, here with room for a busy one.
"""
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.name for p in (ROOT / "nbs").glob("*.ipynb") if not p.name.startswith(("_", ".")))
LIMIT, SLOW_LIMIT = 300, 3600

RUN = """
import sys
from pathlib import Path
import matplotlib
matplotlib.use("agg")
from nbdev.config import get_config
from nbdev.test import test_nb
config = get_config()
passed, _ = test_nb(Path(sys.argv[1]).absolute(), skip_flags=config.tst_flags.split(), force_flags=sys.argv[2:],
                    basepath=config.config_path)
sys.exit(not passed)
"""


def run(name: str, slow: bool) -> tuple[int, str]:
    "Run one notebook; its exit status and what it printed."
    command = [sys.executable, "-W", "ignore", "-c", RUN, f"nbs/{name}", *(["slow"] if slow else [])]
    if "_fig_" in name or name == "index.ipynb": command = [sys.executable, "tools/run_nbs.py", "--same", f"nbs/{name}"]
    slow = slow and "#| slow" in (ROOT / "nbs" / name).read_text(encoding="utf-8")
    limit = SLOW_LIMIT if slow else LIMIT
    with tempfile.TemporaryDirectory() as trial:
        env = dict(os.environ, PYTHONWARNINGS="ignore", **({"STRLORA_TRIAL": trial} if slow else {}))
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
        except subprocess.TimeoutExpired as late:
            return 124, f"{late.stdout or ''}\nstopped after {limit} s"
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def runs(request):
    "Runs a notebook. Without pytest's own workers two notebooks run at a time, and each test waits for its own."
    slow = request.config.getoption("--slow")
    if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the tests, and so the notebooks
        yield lambda name: run(name, slow)
        return
    chosen = [item.callspec.params["name"] for item in request.session.items
              if item.path == Path(__file__) and item.originalname == "test_notebook"]
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        futures = {name: pool.submit(run, name, slow) for name in chosen}
        yield lambda name: futures[name].result()
        for future in futures.values(): future.cancel()


@pytest.mark.timeout(0)                                   # each notebook has its own limit
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, runs):
    status, output = runs(name)
    assert status == 0, f"{name} failed; run it with: .venv/bin/nbdev_test --path nbs/{name}\n{output[-6000:]}"


def test_there_are_notebooks():
    assert NOTEBOOKS and "00_core.ipynb" in NOTEBOOKS
