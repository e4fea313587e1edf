# SPDX-License-Identifier: Apache-2.0
"""Targets that mix two examples: shared by Mixup and CutMix."""

from typing import Protocol

import torch
from torch import Tensor

from lightning_optkit._checks import check_tensor

__all__ = ["check_pairs", "mixed", "mixed_targets", "per_example", "smoothed"]


class TargetSettings(Protocol):
    """How an augmentation takes its targets."""

    label_smoothing: float
    multi_label: bool
    num_classes: int | None


def check_pairs(settings: TargetSettings, inputs: Tensor, targets: Tensor) -> None:
    """Raises unless `targets` are class indices (N,) with `num_classes`, or numbers (N,) or (N, C) to mix.

    Raises:
        TypeError: if either is not a tensor.
        ValueError: if shapes or dtypes are wrong, or an index on the CPU is out of range.
    """
    owner, num_classes = type(settings).__name__, settings.num_classes
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
    if settings.multi_label and targets.dim() != 2:
        raise ValueError(f"{owner}(multi_label=True): targets must be (N, C), one number for every label, not {shape}.")
    if _are_indices(targets):
        _check_indices(owner, targets, num_classes)


def mixed_targets(settings: TargetSettings, targets: Tensor, partners: Tensor, share: float | Tensor) -> Tensor:
    """Returns share * targets + (1 - share) * targets of the partners; class indices become soft targets first."""
    if _are_indices(targets):
        assert settings.num_classes is not None
        soft = torch.zeros(len(targets), settings.num_classes, device=targets.device)
        targets = soft.scatter_(1, targets.long()[:, None], 1.0)
    elif not targets.is_floating_point():
        targets = targets.to(torch.get_default_dtype())
    return smoothed(settings, mixed(targets, partners, share))


def mixed(x: Tensor, partners: Tensor, share: float | Tensor) -> Tensor:
    """Returns share * x + (1 - share) * x of the partners, in the dtype of `x`."""
    if isinstance(share, Tensor):
        weight = per_example(share, x)
        return (weight * x + (1 - weight) * x[partners]).to(x.dtype)
    return share * x + (1 - share) * x[partners]


def per_example(weights: Tensor, x: Tensor) -> Tensor:
    """Weights (N,) as (N, 1, ..., 1) for `x`, in its dtype but at least fp32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return weights.to(x.device, dtype).view(-1, *[1] * (x.dim() - 1))


def smoothed(settings: TargetSettings, soft: Tensor) -> Tensor:
    """Soft targets (N, C) with `label_smoothing`: spread over the C classes, or toward 1/2 if each is a label.

    Raises:
        ValueError: if they have no classes, and `label_smoothing` is not 0.
    """
    if not settings.label_smoothing:
        return soft
    if soft.dim() < 2:
        raise ValueError(
            f"{type(settings).__name__}(label_smoothing={settings.label_smoothing}): targets must have classes, (N, C)."
        )
    classes = 2 if settings.multi_label else soft.shape[1]
    return soft * (1 - settings.label_smoothing) + settings.label_smoothing / classes


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
