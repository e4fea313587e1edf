# SPDX-License-Identifier: Apache-2.0
"""Which road a normalization takes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._native import warn_once_if_missing

__all__ = ["run_add_norm", "run_norm"]


def run_norm(
    centered: bool,
    input: Tensor,
    sizes: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> Tensor:
    """LayerNorm if `centered`, else RMSNorm."""
    warn_once_if_missing()
    if centered:
        return torch.layer_norm(input, sizes, weight, bias, eps)
    return torch.rms_norm(input, sizes, weight, eps)


def run_add_norm(
    centered: bool,
    input: Tensor,
    residual: Tensor,
    sizes: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """(normalized sum, sum)."""
    if input.shape != residual.shape:
        raise RuntimeError("shapes differ")
    total = torch.dropout(input, dropout, True) + residual
    return run_norm(centered, total, sizes, weight, bias, eps), total
