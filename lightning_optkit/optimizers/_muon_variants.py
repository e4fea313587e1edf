# SPDX-License-Identifier: Apache-2.0
"""The second moments of orthogonalized momentum: NorMuon per row, AdaMuon per element.

Source: NorMuon: Li et al. 2025, "NorMuon: Making Muon more efficient and scalable", arXiv:2510.05491, Algorithm 1, in
the form of the authors' code (the norm of the update is kept). AdaMuon: Si et al. 2025, "AdaMuon: Adaptive Muon
Optimizer", arXiv:2507.11005, Algorithm 1.
"""

import math

import torch
from torch import Tensor

from lightning_optkit.step.rule import Group, State

__all__ = ["SECOND_MOMENT", "normalized", "of_rows", "of_rows_in_stacks", "orthogonalized_from"]

SECOND_MOMENT = "second_momentum_buffer"
_EPS = {"normuon": 1e-10, "adamuon": 1e-8}  # those of the authors


def of_rows(shape: torch.Size) -> torch.Size:
    """One number per row of the matrix [first, rest]."""
    return torch.Size(shape[:1])


def of_rows_in_stacks(shape: torch.Size) -> torch.Size:
    """The same, where three dimensions are a stack of matrices."""
    return torch.Size(shape[:2] if len(shape) == 3 else shape[:1])


def orthogonalized_from(momentum: Tensor, group: Group) -> Tensor:
    """What is orthogonalized: AdaMuon takes the signs of the momentum."""
    return momentum.sign() if group["variant"] == "adamuon" else momentum


def normalized(matrices: Tensor, state: State, group: Group) -> Tensor:
    """`matrices` [count, rows, columns] divided by the roots of their second moments, which are updated.

    Each one then has its norm from before (NorMuon), or that of an orthogonal matrix (AdaMuon).
    """
    variant = group["variant"]
    if variant is None or not matrices.numel():
        return matrices
    eps, squares = _EPS[variant], matrices.square()
    if variant == "normuon":
        squares = squares.mean(2, keepdim=True)
    moments = state[SECOND_MOMENT].reshape(squares.shape).lerp(squares, 1 - float(group["beta2"]))
    state[SECOND_MOMENT].copy_(moments.reshape(state[SECOND_MOMENT].shape))
    scaled = matrices / (moments.sqrt() + eps)
    length = _norm(matrices) if variant == "normuon" else math.sqrt(min(matrices.shape[1:]))
    return scaled * (length / (_norm(scaled) + eps))


def _norm(matrices: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrices, keepdim=True)
    return norm
