"On a GPU: every method trains, is asked, stops and goes on; numbers agree with those of a CPU as far as arithmetic allows."
import pytest
import torch
from accelerate.state import AcceleratorState
from small import make_base, rows, session, short_spec

from strlora import runs
from strlora.fullsize import Way, random_model, spec_for
from strlora.methods.table import METHODS
from strlora.trainer import train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


@pytest.fixture(autouse=True)
def fresh():
    "A process has one precision; each test here stands for a process of its own."
    forget()
    torch.cuda.reset_peak_memory_stats()
    yield
    assert torch.cuda.max_memory_allocated() > 0, "the test has run on a CPU"
    forget()


def forget():
    "Accelerate keeps device and precision of the first job of a process: without this a second one would follow it onto the CPU."
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory): return make_base(tmp_path_factory.mktemp("base"))


def words(method, device, *pairs):
    "A method on a device; 32 experts need a rank that they divide."
    return (f"method={method}", f"device={device}", *(["r=64"] if method in ("strlora_prototypes", "olora") else []), *pairs)


def first_losses(base, method, device, steps=3):
    "Losses of the first steps in float32, without dropout."
    forget()
    job = session(base, *words(method, device, "lora_dropout=0.0"))
    run, chunk = job.trainer, job.seen.chunks[0]
    assert run.accelerator.device.type == ("cpu" if device == "cpu" else "cuda")
    run.samples = chunk.samples
    for moment in ("stream_start", "chunk_start"): run.moment(moment)
    run.model.train()
    return [train_step(run, make(), 1.0)["loss"] for make in run.batches(chunk)[:steps]]


@pytest.mark.parametrize("method", ["lora", "strlora", "strlora_prototypes", "same"])
def test_losses_are_those_of_a_cpu(base, method):
    here, there = first_losses(base, method, "cpu"), first_losses(base, method, "auto")
    assert there == pytest.approx(here, rel=2e-3)


def test_the_gradient_of_the_penalty_alone_is_that_of_a_cpu(base):
    "Attention by cuDNN left its own gradients unset where none came in: they were of any size, and some no numbers."
    found = {}
    for device in ("cpu", "auto"):
        forget()
        job = session(base, *words("strlora", device, "precision=bf16", "grad_norm_every=1", "lora_dropout=0.0"))
        run, chunk = job.trainer, job.seen.chunks[0]
        run.samples = chunk.samples
        for moment in ("stream_start", "chunk_start"): run.moment(moment)
        run.model.train()
        found[device] = [train_step(run, make(), 1.0)["grad_norm_kl"] for make in run.batches(chunk)[:3]]
    assert found["cpu"][-1] > 0 and found["auto"] == pytest.approx(found["cpu"], rel=0.5, abs=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_from_stream_to_answers(base, method, precision, tmp_path):
    spec = short_spec(base, *words(method, "auto", f"precision={precision}"))
    runs.start(spec, tmp_path/"run")
    asked = rows(tmp_path/"run")
    assert asked and {row["after_chunk"] for row in asked} >= {0 if method == "zero_shot" else spec.stream.chunks}
    if method != "zero_shot": assert all(row["loss"] > 0 for row in rows(tmp_path/"run", "train"))


@pytest.mark.parametrize("method", ["strlora", "strlora_prototypes", "ewc"])
def test_an_interrupted_run_goes_on(base, method, tmp_path, monkeypatch):
    true = runs.Recorder.step_done

    def stop(self, run, row):
        true(self, run, row)
        if run.total == 5: raise KeyboardInterrupt
    monkeypatch.setattr(runs.Recorder, "step_done", stop)
    with pytest.raises((KeyboardInterrupt, runs.Interrupted)): runs.start(short_spec(base, *words(method, "auto")), tmp_path/"run")
    monkeypatch.undo()
    runs.resume(tmp_path/"run")
    assert [row["step"] for row in rows(tmp_path/"run", "train")] == list(range(1, 10))


def test_adapters_share_their_weights_and_what_they_take_is_counted():
    model = random_model("mini", torch.bfloat16, torch.device("cuda"))
    frozen = {p.data_ptr() for p in model.parameters() if p.dim() > 1}
    way = Way(model, spec_for("mini", "strlora"), 1, peft=False)
    assert frozen <= {p.data_ptr() for p in way.model.parameters()}, "no weight was copied"
    there, planned = way.gigabytes()
    assert 0.3 * planned < there < 3 * planned, "small tensors round up, so a mini model is not where a plan is exact"
