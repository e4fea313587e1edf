# SPDX-License-Identifier: Apache-2.0
"""Trains a sharded net (FSDP2) in two processes and saves what the whole net and its state are.

Usage: python -m torch.distributed.run --nproc-per-node 2 sharded_worker.py OUTPUT
"""

import os
import sys
from dataclasses import astuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue
from lightning_optkit.optimizers import LAMB, SGD, SOAP, Adafactor, AdamW, Muon, Prodigy

CASES = {
    "norm and ema": (AdamW, dict(lr=0.02, clip=ClipNorm(0.1), average=EMA(0.9, start=2), statistics=True)),
    "value": (SGD, dict(lr=0.1, momentum=0.9, clip=ClipValue(0.01), l1=0.01)),
    "estimate": (Prodigy, dict(d0=0.01, clip=ClipNorm(0.1), average=EMA(0.9))),
    "reference": (AdamW, dict(lr=0.02, clip=AutoClip(30), average=EMA(0.9), fused=False, rounding="kahan")),
    "per tensor": (LAMB, dict(lr=0.02, clip=ClipPerTensor(0.05))),
    "units": (AdamW, dict(lr=0.02, clip=ClipUnitwise(0.05))),
    "factored": (Adafactor, dict(lr=0.02, average=EMA(0.9))),
    "rotated": (SOAP, dict(lr=0.02, max_precondition_dim=8)),
}
# They round more coarsely than the gradients of half a batch are exact.
COARSE = {
    "orthogonal": (Muon, dict(variant="normuon")),
    "8 bits": (AdamW, dict(lr=0.02, state_dtype="int8")),
}
BATCH = 8


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 17), nn.Tanh(), nn.Linear(17, 3))  # 17 and 3 rows: uneven shards


def batches(num):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        yield torch.randn(BATCH, 4, generator=generator), torch.randn(BATCH, 3, generator=generator)


def train(net, optimizer, num, part=slice(None)):
    for x, y in batches(num):
        nn.functional.mse_loss(net(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def held(net, optimizer):
    """Parameters and state, whole, and the norm."""
    params = list(net.parameters())
    state = [{name: whole(value).clone() for name, value in optimizer.state[p].items()} for p in params]
    learned = [float(group["d"]) for group in optimizer.param_groups if "d" in group]
    params = [whole(p.detach()).clone() for p in params]
    statistics = [*map(astuple, optimizer.statistics())] if optimizer.record_statistics and optimizer.num_steps else []
    return dict(params=params, state=state, norm=optimizer.grad_norm, learned=learned, statistics=statistics)


def sharded(mesh, dtype=torch.float32):
    net = build().to(dtype)
    for module in (net[0], net[2], net):
        fully_shard(module, mesh=mesh)
    return net


def split_weights(mesh=None):
    """A bf16 network, sharded or not, trained by the same gradients: its fp32 weights, and those in another."""
    nets = [build().bfloat16() if mesh is None else sharded(mesh, torch.bfloat16) for _ in range(2)]
    optimizers = [AdamW(net.parameters(), lr=0.01, rounding="split32") for net in nets]
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for p in nets[0].parameters():
            grad = torch.randn(p.shape, generator=generator).bfloat16()
            p.grad = grad if mesh is None else distribute_tensor(grad, p.device_mesh, p.placements)
        optimizers[0].step()
    exported = optimizers[0].full_precision_state_dict(nets[0])
    optimizers[1].load_full_precision_state_dict(nets[1], exported)
    again = optimizers[1].full_precision_state_dict(nets[1])
    return [{name: whole(value).clone() for name, value in weights.items()} for weights in (exported, again)]


def main(output):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    part, results = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2), {}
    for name, (optimizer_class, kwargs) in (CASES | COARSE).items():
        net = sharded(mesh)
        optimizer = optimizer_class(net.parameters(), **kwargs)
        train(net, optimizer, 4, part)
        results[name] = held(net, optimizer)
        saved = get_optimizer_state_dict(net, optimizer)
        again = sharded(mesh)
        again.load_state_dict(net.state_dict())
        resumed = optimizer_class(again.parameters(), **kwargs)
        set_optimizer_state_dict(again, resumed, saved)
        results[f"{name}, loaded"] = held(again, resumed)
    results["split weights"] = split_weights(mesh)
    if rank == 0:
        torch.save(results, output)
    dist.barrier()  # a process that is gone while the other still talks aborts it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
