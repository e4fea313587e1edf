# SPDX-License-Identifier: Apache-2.0
"""Shapes of a second moment that is stored by row and by column of the last two dimensions, of vectors by element."""

import torch

__all__ = ["shape_by_column", "shape_by_element", "shape_by_row"]


def shape_by_element(shape: torch.Size) -> torch.Size | None:
    """Of a parameter of fewer than two dimensions; None for a matrix."""
    return shape if len(shape) < 2 else None


def shape_by_row(shape: torch.Size) -> torch.Size | None:
    """[..., rows, 1] of a matrix [..., rows, columns]; None for a vector."""
    return torch.Size((*shape[:-1], 1)) if len(shape) > 1 else None


def shape_by_column(shape: torch.Size) -> torch.Size | None:
    """[..., 1, columns] of a matrix [..., rows, columns]; None for a vector."""
    return torch.Size((*shape[:-2], 1, shape[-1])) if len(shape) > 1 else None
