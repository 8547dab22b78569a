"Two processes train as one does, slow routers included."
import os
import socket

import pytest
import torch
from peft import get_peft_model
from tiny import batch, internvl

import strlora


def train(parts, rank=None):
    "Three steps on the mean loss of the parts, or under DDP on one part."
    torch.manual_seed(0)
    model = get_peft_model(internvl(), strlora.StrLoraConfig(r=8, lora_dropout=0.0, attention_dim=8, kl_weight=1.0, ema_decay=0.9)).train()
    run = model if rank is None else torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for _ in range(3):
        (sum(run(**part).loss for part in parts) / len(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
        strlora.update_ema(model)
    return {n: t.clone() for n, t in model.base_model.trainable_state().items()}


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    whole = batch(internvl(), rows=4)
    torch.save(train([{k: v[2 * rank:2 * rank + 2] for k, v in whole.items()}], rank), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    whole = batch(internvl(), rows=4)
    one = train([{k: v[i:i + 2] for k, v in whole.items()} for i in (0, 2)])
    assert a.keys() == b.keys() == one.keys() and any(".ema." in n for n in one)
    for n in one: assert torch.equal(a[n], b[n]) and torch.allclose(a[n], one[n], atol=1e-5), n
