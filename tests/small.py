"A small untrained base and short specs, for tests of trainer, runs and command line."
import os

import pyarrow.parquet as pq
import pytest
import torch

from strlora import checkpoint, runs
from strlora.job import Job
from strlora.backbones.mini import build_model, build_processor, build_tokenizer
from strlora.data.mini.captions import vocabulary
from strlora.spec import override, resolve

SHORT = ("stream.chunks=3", "chunk_size=12", "test_size=2", "proxy_size=2", "batch_size=4", "threads=1", "save_every=2",
         "grad_norm_every=2", "r=8", "lora_dropout=0.1")


def make_base(folder, seed=0):
    "Write a base model of two narrow layers."
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(vocabulary())
    build_model(tokenizer, image_size=32, width=32, layers=2, heads=2, intermediate=64).save_pretrained(folder)
    build_processor(tokenizer, image_size=32).save_pretrained(folder)
    return str(folder)


def short_spec(base, *pairs):
    "A run of a few seconds."
    short = SHORT[:-2] if "method=zero_shot" in pairs else SHORT
    return resolve(override({}, [f"model.base={base!r}", *short, *pairs]))


def session(base, *pairs):
    "Everything of a short run in memory."
    return Job(short_spec(base, *pairs))


def rows(folder, name="predictions"):
    "A table of a run as a list of rows."
    return pq.read_table(os.path.join(folder, f"{name}.parquet")).to_pylist()


def timeless(found):
    "Rows of train.parquet without what differs from run to run."
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found]


def check_resumed(spec, folder, monkeypatch, kept):
    "A run that is stopped at its fifth step and resumed is a whole one, to the last bit; `kept` is part of a tensor's name in its adapter."
    runs.start(spec, folder/"whole")
    true = runs.Recorder.step_done

    def stop(self, run, row):
        true(self, run, row)
        if run.total == 5: raise KeyboardInterrupt
    monkeypatch.setattr(runs.Recorder, "step_done", stop)
    with pytest.raises((KeyboardInterrupt, runs.Interrupted)): runs.start(spec, folder/"run")
    monkeypatch.undo()
    runs.resume(folder/"run")
    assert rows(folder/"run") == rows(folder/"whole")
    assert timeless(rows(folder/"run", "train")) == timeless(rows(folder/"whole", "train"))
    (a, one), (b, other) = (checkpoint.load(folder/name/"checkpoint") for name in ("run", "whole"))
    assert all(torch.equal(a[n], b[n]) for n in a) and any(kept in n for n in a)
    (plain, tensors), (same, others) = (checkpoint.pack(state["parts"]) for state in (one, other))
    assert plain == same and all(torch.equal(v, others[n]) for n, v in tensors.items())
