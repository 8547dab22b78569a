"The card of an adapter: its five lines give back the model that the run ended with."
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from small import SHORT, make_base, short_spec

from strlora import runs
from strlora.card import card_of, loading
from strlora.job import Job
from strlora.checkpoint import load, load_adapter_state
from strlora.spec import override, resolve


def test_a_finished_run_has_a_card_beside_its_adapter(tmp_path):
    folder = runs.start(short_spec(make_base(tmp_path/"base"), "method=lora", "stream.chunks=2"), tmp_path/"run")
    card = (folder/"checkpoint"/"README.md").read_text()
    assert card == card_of(folder) and "settings.r | 8" in card and "final AP" in card and "license: apache-2.0" in card
    assert all(task in card for task in ("gqa", "ocr", "textcaps")) and "Left out" not in card
    sent_along(folder/"checkpoint")


def sent_along(folder):
    "What the documented call would send to the hub: card and adapter, nothing else."
    sent = set(filter_repo_objects((p.name for p in folder.iterdir()), allow_patterns=["README.md", "adapter_*"]))
    assert sent == {"README.md", "adapter_config.json", "adapter_model.safetensors"} < {p.name for p in folder.iterdir()}
    assert '["README.md", "adapter_*"], repo_id=' in (Path(__file__).parents[1]/"nbs"/"14f_card.ipynb").read_text().replace('\\"', '"')


@pytest.mark.slow
def test_the_five_lines_load_the_adapter(tmp_path):
    spec = resolve(override({}, ["stream.chunks=1", *SHORT[1:], "lr=5e-3"]))
    folder = runs.start(spec, tmp_path/"run")
    code = re.search(r"```python\n(.+?)```", (folder/"checkpoint"/"README.md").read_text(), re.S)[1]
    assert code.strip() == loading("mini")
    found = {}
    exec(code.replace("the folder of this card", str(folder/"checkpoint")), found)
    job = Job(spec)
    load_adapter_state(job.model, load(folder/"checkpoint")[0])
    prompt = job.collate([job.stream.tests["gqa"].samples[0]], answers=False)
    from strlora.backbones.mini import image_output
    prompt["mm_encoder_outputs"] = {"image": image_output(job.encode([job.stream.tests["gqa"].samples[0]])[0])}
    with torch.no_grad(): assert torch.equal(found["model"](**prompt).logits, job.model.eval()(**prompt).logits)
