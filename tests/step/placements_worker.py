# SPDX-License-Identifier: Apache-2.0
"""Steps parameters that are placed in many ways over four processes, by given gradients, and saves what is left.

Usage: python placements_worker.py OUTPUT_FOLDER. It starts the processes itself.
"""

import os
import socket
import sys
from dataclasses import astuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_optkit.averaging import EMA, lookahead_
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise
from lightning_optkit.optimizers import (
    CAME,
    LAMB,
    LARS,
    MARS,
    SGD,
    SOAP,
    Adafactor,
    AdamW,
    DAdaptAdam,
    Muon,
    Prodigy,
    StableAdamW,
)
from lightning_optkit.regularization import (
    asam,
    gradient_noise_,
    grokfast_,
    gsam,
    look_sam,
    look_sam_direction,
    max_norm_,
    sam,
    wsam,
)

SHAPES = ((6, 5), (5,), (1,), (3, 4, 2), (2, 7), (1, 3))
PROCESSES = 4

# name -> optimizer, arguments. Every stage that a whole tensor is needed for, and every rule, with others beside them.
RULES = {
    "per tensor": (AdamW, dict(clip=ClipPerTensor(0.5), average=EMA(0.9), statistics=True)),
    "per tensor, PyTorch": (SGD, dict(momentum=0.9, clip=ClipPerTensor(0.5), fused=False, weight_decay=0.01)),
    "units": (AdamW, dict(clip=ClipUnitwise(0.3), centralize=True, statistics=True)),
    "units, PyTorch": (AdamW, dict(clip=ClipUnitwise(0.3), centralize=True, fused=False, statistics=True)),
    "units, split": (AdamW, dict(clip=ClipUnitwise(0.3), rounding="split32")),
    "centralize": (SGD, dict(centralize=True, clip=ClipNorm(1.0), l1=0.01)),
    "LAMB": (LAMB, dict(clip=ClipPerTensor(0.5), l1=0.01, statistics=True)),
    "another clip": (AdamW, dict(clip=ClipNorm(1.0))),
    "caution": (AdamW, dict(caution=True, clip=ClipNorm(1.0))),
    "LAMB, trust_clip": (LAMB, dict(trust_clip=True, average=EMA(0.9))),
    "LARS": (LARS, dict(momentum=0.9, weight_decay=0.01, clip=ClipNorm(1.0))),
    "Muon": (Muon, dict(clip=ClipNorm(1.0), average=EMA(0.9), statistics=True)),
    "NorMuon": (Muon, dict(variant="normuon", clip=ClipUnitwise(0.3))),
    "AdaMuon": (Muon, dict(variant="adamuon", clip=ClipPerTensor(0.5))),
    "Adafactor": (Adafactor, dict(clip=ClipPerTensor(0.5), weight_decay=0.01, statistics=True)),
    "CAME": (CAME, dict(clip=ClipNorm(1.0))),
    "SOAP": (SOAP, dict(precondition_frequency=2, centralize=True)),
    "MARS": (MARS, dict(clip=ClipUnitwise(0.3), average=EMA(0.9))),
    "StableAdamW": (StableAdamW, dict(clip=ClipNorm(1.0), cautious=True)),
    "8 bits": (AdamW, dict(state_dtype="int8", clip=ClipPerTensor(0.5), average=EMA(0.9))),
    "DAdaptAdam": (DAdaptAdam, dict(d0=0.1, clip=ClipNorm(1.0))),
    "Prodigy, every 2nd": (Prodigy, dict(slice_p=2, d0=0.1, clip=ClipNorm(1.0))),
}
ANOTHER_CLIP = ClipPerTensor(0.5)  # from the second step on
FUNCTIONS = {
    "ClipNorm": lambda params, grads: [ClipNorm(0.5)(params)],
    "ClipPerTensor": lambda params, grads: [ClipPerTensor(0.5)(params)],
    "ClipUnitwise": lambda params, grads: [ClipUnitwise(0.3)(params)],
    "max_norm_": lambda params, grads: max_norm_(params, 0.7),
    "max_norm_, columns": lambda params, grads: max_norm_(params, 0.7, dim=1),
    "gradient_noise_": lambda params, grads: gradient_noise_(grads, 0.1, torch.Generator().manual_seed(3)),
    "sam": lambda params, grads: sam(grads, 0.5),
    "asam": lambda params, grads: asam(params, grads, 0.5),
    "gsam": lambda params, grads: gsam(grads, params, 0.4),
    "look_sam": lambda params, grads: look_sam(grads, look_sam_direction(grads, params), 0.7),
    "wsam": lambda params, grads: wsam(grads, params, 0.9),
    "lookahead_": lambda params, grads: lookahead_(grads, params, 0.3),
    "grokfast_": lambda params, grads: grokfast_(grads, params, 0.9, 2.0),
}
PLACED = ("fsdp", "fsdp x tp", "hsdp", "tp")
# One rule of each way to step is enough for the placements with fewer shards.
EVERYWHERE = ("per tensor", "per tensor, PyTorch", "units", "units, PyTorch", "units, split", "LAMB", "Muon", "8 bits")
CASES = [(name, kind) for name in RULES for kind in PLACED if kind.startswith("fsdp") or name in EVERYWHERE]


def values(seed, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype) for shape in SHAPES]


def placements_of(kind, tensor):
    is_matrix = tensor.ndim > 1
    if kind == "fsdp":
        return [Shard(0)]
    if kind == "fsdp x tp":  # columns, rows, and what is not parallel, as torch's own styles place them
        if tensor.shape == (2, 7):
            return [_StridedShard(0, split_factor=2), Shard(0)]
        return [Shard(0), Shard(1)] if is_matrix else [Shard(0), Replicate()]
    if kind == "hsdp":
        return [Replicate(), Shard(0)]
    return [Shard(1)] if is_matrix else [Replicate()]


def placed(tensor, kind, mesh):
    return tensor if mesh is None else distribute_tensor(tensor, mesh, placements_of(kind, tensor), src_data_rank=None)


def dtype_of(name):
    return torch.bfloat16 if "split" in name else torch.float64 if "units" in name else torch.float32


def run(name, kind=None, mesh=None):
    """Four steps, of which the third has a gradient that is not finite if the rule's clip skips it."""
    optimizer_class, arguments = RULES[name]
    dtype = dtype_of(name)
    params = [nn.Parameter(placed(value, kind, mesh)) for value in values(0, dtype)]
    optimizer = optimizer_class(params, **{"lr": 0.1, **arguments})
    for step in range(4):
        grads = values(1 + step, dtype, scale=3.0 if step == 1 else 0.2)
        if step == 2 and "clip" in arguments:
            grads[1][4] = float("nan")
        for param, grad in zip(params, grads, strict=True):
            param.grad = placed(grad, kind, mesh)
        if step == 3:
            params[3].grad = None
        if step == 1 and name == "another clip":
            optimizer.clip = ANOTHER_CLIP
        optimizer.step()
    return held(optimizer, params)


def called(kind=None, mesh=None):
    """What the functions on parameters and gradients leave, for use with any other optimizer."""
    found = {}
    for name, function in FUNCTIONS.items():
        params = [nn.Parameter(placed(value, kind, mesh)) for value in values(0, torch.float64)]
        for param, grad in zip(params, values(1, torch.float64), strict=True):
            param.grad = placed(grad, kind, mesh)
        with torch.no_grad():
            result = function(params, [param.grad for param in params])
        left = [*params, *(param.grad for param in params), *(result or ())]
        found[name] = [whole(t.detach()) for t in left]
    return found


def whole(t):
    if not isinstance(t, DTensor):
        return t.detach().clone()
    return t.to(torch.int32).full_tensor().to(t.dtype) if t.dtype == torch.int16 else t.full_tensor()


def held(optimizer, params):
    return dict(
        params=[whole(p.detach()) for p in params],
        state=[{name: whole(value) for name, value in optimizer.state[p].items()} for p in params],
        counts=(optimizer.num_steps, optimizer.num_clipped, optimizer.num_skipped),
        norms=(optimizer.grad_norm, optimizer.grad_norm_clipped),
        statistics=[each and astuple(each) for each in optimizer.statistics()] if optimizer.record_statistics else [],
    )


def paths(name, kind, mesh):
    optimizer_class, arguments = RULES[name]
    optimizer = optimizer_class([nn.Parameter(placed(torch.ones(4, 4), kind, mesh))], **arguments)
    return optimizer.explain().groups[0].path


def partial_gradients(mesh):
    """A replicated parameter whose gradient is a sum of parts, as sequence parallelism leaves it."""
    param = nn.Parameter(distribute_tensor(torch.ones(3), mesh, [Replicate()], src_data_rank=None))
    found = []
    for fused in (None, False):
        param.grad = DTensor.from_local(torch.full((3,), float(dist.get_rank())), mesh, [Partial()])
        SGD([param], lr=1.0, fused=fused).step()
        found.append(whole(param.detach()).clone())
    return found


def refused(mesh):
    """What is said of a parameter that is a sum of parts, when the optimizer is built."""
    param = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    try:
        SGD([param], lr=1.0)
    except ValueError as error:
        return str(error)


def process(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    meshes = {"fsdp": line, "fsdp x tp": square, "hsdp": square, "tp": square["tp"]}
    results = {(name, kind): run(name, kind, meshes[kind]) for name, kind in CASES}
    results["called"] = {kind: called(kind, meshes[kind]) for kind in PLACED}
    results["partial"], results["refused"] = partial_gradients(line), refused(line)
    results["paths"] = {(name, kind): paths(name, kind, meshes[kind]) for name in RULES for kind in ("fsdp", "tp")}
    if rank in (0, 3):
        torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    os._exit(0)  # an ordinary exit sometimes aborts, since gloo's threads still run


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        a_port = free.getsockname()[1]
    torch.multiprocessing.start_processes(process, (a_port, sys.argv[1]), PROCESSES, start_method="fork")
