# SPDX-License-Identifier: Apache-2.0
"""One rank of the sharded cases of test_write.py: initializes an FSDP2 model and saves what it holds.

Usage: python sharded_worker.py RANK WORLD_SIZE RENDEZVOUS_FILE OUTPUT_FILE
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_optkit.init import depth_scaled, he, initialize, lsuv, mup_width, orthogonal, zero_residual


def model():
    layer = nn.TransformerEncoderLayer(6, 2, 10, batch_first=True)
    tied = nn.Embedding(5, 6, padding_idx=1)
    head = nn.Linear(6, 5, bias=False)
    head.weight = tied.weight
    return nn.Sequential(tied, nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.LSTM(6, 3), head)


def sharded(mesh, device="cpu"):
    with torch.device(device):
        return fully_shard(model(), mesh=mesh)


def cases(mesh, seed):
    generator = torch.Generator().manual_seed(seed)
    net = model() if mesh is None else sharded(mesh, "meta").to_empty(device="cpu")
    for scheme in (he, orthogonal):
        rows = initialize(net, scheme, forget_bias=1.0, generator=generator)
        yield scheme.__name__, net, rows
    yield "depth_scaled", net, depth_scaled(net)
    yield "zero_residual", net, zero_residual(net)


def layers():
    """A convolution, a layer without bias, one used twice, and one with a bias."""
    shared = nn.Linear(8, 8)
    flat = [
        nn.Flatten(),
        nn.Linear(12, 8, bias=False),
        nn.ReLU(),
        shared,
        nn.Tanh(),
        shared,
        nn.Tanh(),
        nn.Linear(8, 2),
    ]
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), *flat)


def lsuv_cases(mesh):
    """State and rows after lsuv of a whole and of a sharded net, whose biases are not zero."""
    batch = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    whole = layers()
    torch.manual_seed(5)
    split = layers()
    fully_shard(split[3], mesh=mesh)  # one by itself, the rest together
    fully_shard(split, mesh=mesh)
    found = []
    for net in (whole, split):
        rows = lsuv(net, batch, start=None)
        state = net.state_dict().items()
        found.append(({k: v.full_tensor().clone() if hasattr(v, "full_tensor") else v for k, v in state}, rows))
    return found


def message(call):
    try:
        call()
    except ValueError as error:
        return str(error)


def main(rank, world_size, rendezvous, output):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size,))
    state = torch.get_rng_state()
    result = {
        name: ({key: value.full_tensor().clone() for key, value in net.state_dict().items()}, rows)
        for name, net, rows in cases(mesh, seed=0)
    }
    result["global state untouched"] = torch.equal(torch.get_rng_state(), state)
    result["shards"] = {key: tuple(value.to_local().shape) for key, value in sharded(mesh).state_dict().items()}

    other_seed = torch.Generator().manual_seed(rank)
    result["different seeds"] = message(lambda: initialize(sharded(mesh), he, generator=other_seed))
    result["tensor"] = message(lambda: he(sharded(mesh)[2].weight_ih_l0))
    result["lsuv"] = lsuv_cases(mesh)
    narrow = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    wide = fully_shard(nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2)), mesh=mesh)
    result["mup"] = mup_width(wide, narrow, generator=torch.Generator().manual_seed(0))
    torch.save(result, output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # wait until the other process has saved too
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run
