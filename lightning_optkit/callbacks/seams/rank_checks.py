# SPDX-License-Identifier: Apache-2.0
"""Compares what the processes of a DDP run hold: weights, which must be equal, and batches, which must not."""

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.diagnostics.measure.parameters import plain_name

__all__ = ["differing_parameters", "ranks_with_same_batches", "replicates"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def replicates(trainer: pl.Trainer) -> bool:
    """Whether every process holds all parameters, and gets data of its own."""
    return (
        trainer.world_size > 1 and is_a(trainer.strategy, DDPStrategy) and Run(trainer).replicas == trainer.world_size
    )


def differing_parameters(trainer: pl.Trainer, params: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of the parameters whose bits are not the same on all ranks; every rank must call it."""
    sums = torch.stack([_bits(p).to(trainer.strategy.root_device) for p in params.values()])
    all_sums = _gathered(sums, trainer.world_size)
    differs = (all_sums != all_sums[0]).any(dim=0).tolist()
    return tuple(plain_name(name) for name, is_different in zip(params, differs, strict=True) if is_different)


def ranks_with_same_batches(trainer: pl.Trainer, digests: Sequence[int]) -> tuple[int, ...]:
    """The ranks whose batches have the digests of another rank's; every rank must call it.

    Batches that are all the same, within a rank too, say nothing.
    """
    own = torch.tensor(digests, dtype=torch.int64, device=trainer.strategy.root_device)
    rows = [tuple(row) for row in _gathered(own, trainer.world_size).tolist()]
    return tuple(
        rank for rank, row in enumerate(rows) if rows.count(row) > 1 and len(set(row)) == len(row) and all(row)
    )


def _gathered(t: Tensor, ranks: int) -> Tensor:
    """One row per rank."""
    rows = [torch.empty_like(t) for _ in range(ranks)]
    dist.all_gather(rows, t)
    return torch.stack(rows)


def _bits(param: Tensor) -> Tensor:
    """Sum of the bit patterns of all elements."""
    real = torch.view_as_real(param.detach()) if param.is_complex() else param.detach()
    return real.contiguous().view(_BITS[real.element_size()]).sum(dtype=torch.int64)
