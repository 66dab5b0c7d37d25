"""Trains on one process and on two under PyTorch's `DistributedDataParallel`; prints JSON."""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import torch
from replicated import BATCH, STEPS, data, make_model, seen
from torch.nn.parallel import DistributedDataParallel

RANKS = 2


def trained(rank, ranks):
    """Each rank takes its part of every batch."""
    model = make_model()
    module = model if ranks == 1 else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD([variable.value for variable in model.trainable_variables], lr=0.1)
    inputs, targets = (torch.from_numpy(each) for each in data())
    size = BATCH // ranks
    losses = []
    for step in range(STEPS):
        rows = slice(step * BATCH + rank * size, step * BATCH + (rank + 1) * size)
        outputs = module(inputs[rows], training=True)
        loss = torch.mean((outputs - targets[rows]) ** 2) + sum(model.losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"loss": losses, **seen(model)}


def run(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    Path(folder, f"{rank}.json").write_text(json.dumps(trained(rank, RANKS)))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    keras.config.disable_traceback_filtering()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, args=(folder,), nprocs=RANKS)
        replicas = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]
    json.dump({"alone": trained(0, 1), "replicas": replicas}, sys.stdout)
