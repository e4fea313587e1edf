# SPDX-License-Identifier: Apache-2.0
"""Targets that mix two examples: shared by Mixup and CutMix."""

import torch
from torch import Tensor

from lightning_optkit._checks import check_tensor

__all__ = ["check_pairs", "mixed_targets"]


def check_pairs(owner: str, inputs: Tensor, targets: Tensor, num_classes: int | None) -> None:
    """Raises unless `targets` are class indices (N,) with `num_classes`, or numbers (N,) or (N, C) to mix.

    Raises:
        TypeError: if either is not a tensor.
        ValueError: if shapes or dtypes are wrong, or an index on the CPU is out of range.
    """
    check_tensor(owner, "inputs", inputs, "real")
    check_tensor(owner, "targets", targets, "real")
    shape = tuple(targets.shape)
    if targets.dim() not in (1, 2):
        raise ValueError(f"{owner}(targets.shape={shape}): targets must be class indices (N,) or soft targets (N, C).")
    if inputs.dim() < 2 or len(inputs) != len(targets):
        raise ValueError(
            f"{owner}(inputs.shape={tuple(inputs.shape)}): inputs must be (N, ...) with one example for each of the "
            f"{len(targets)} targets."
        )
    if targets.dim() == 2 and num_classes is not None and shape[1] != num_classes:
        raise ValueError(f"{owner}(num_classes={num_classes}): the soft targets have {shape[1]} classes.")
    if _are_indices(targets):
        _check_indices(owner, targets, num_classes)


def mixed_targets(targets: Tensor, partners: Tensor, share: float, num_classes: int | None) -> Tensor:
    """Returns share * targets + (1 - share) * targets of the partners; class indices become soft targets first."""
    if _are_indices(targets):
        assert num_classes is not None
        soft = torch.zeros(len(targets), num_classes, device=targets.device)
        targets = soft.scatter_(1, targets.long()[:, None], 1.0)
    elif not targets.is_floating_point():
        targets = targets.to(torch.get_default_dtype())
    return share * targets + (1 - share) * targets[partners]


def _are_indices(targets: Tensor) -> bool:
    return targets.dim() == 1 and not targets.is_floating_point()


def _check_indices(owner: str, targets: Tensor, num_classes: int | None) -> None:
    if num_classes is None:
        raise ValueError(f"{owner}(num_classes=None): class indices need num_classes to become soft targets.")
    if targets.device.type == "cpu" and len(targets):  # on CUDA this would synchronize; scatter_ checks there
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"{owner}(targets={wrong}): class indices must be in [0, {num_classes}).")
