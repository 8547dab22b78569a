"Settings of every test: quiet, offline, one thread; tests marked `slow` run with --slow."
import os

os.environ.setdefault("PYTHONWARNINGS", "ignore")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):      # read once, when torch is imported
    os.environ[name] = "1"

import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", default=False, help="run tests and notebook cells marked slow, too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    skip = pytest.mark.skip(reason="slow: runs with --slow (make test-all)")
    for item in items:
        if "slow" in item.keywords: item.add_marker(skip)
