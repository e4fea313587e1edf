# SPDX-License-Identifier: Apache-2.0
"""FSDP2 over one CUDA device: the sharded step, clip and average give what the plain ones do. Exits with 0 if so.

Without such a device it does the same on the CPU, where all that is new on a GPU is the kernels.
"""

import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import AdamW
from lightning_optkit.step.compiled import CompiledSegment
from lightning_optkit.step.cuda import CudaSegment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def no_waiting():
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def trained(sharded):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 10)).to(DEVICE)
    if sharded:
        for module in (net[0], net[2], net):
            fully_shard(module)
    optimizer = AdamW(net.parameters(), lr=0.01, clip=ClipNorm(0.1), average=EMA(0.9))
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        x = torch.randn(32, 64, generator=generator).to(DEVICE)
        net(x).square().mean().backward()
        with no_waiting() if step == 5 else contextlib.nullcontext():
            optimizer.step()
        optimizer.zero_grad()
    kind = CudaSegment if DEVICE == "cuda" else CompiledSegment
    assert all(isinstance(segment, kind) for segment in optimizer._engine.plan.segments)
    averages = [optimizer.state[p]["ema"] for p in net.parameters()]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in [*net.parameters(), *averages]]
    return [t.detach() for t in whole], optimizer.grad_norm


def main():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if DEVICE == "cuda" else "gloo")
    try:
        found, norm = trained(sharded=True)
        wanted, plain_norm = trained(sharded=False)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert abs(norm - plain_norm) <= 1e-5 * plain_norm
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
