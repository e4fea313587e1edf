# SPDX-License-Identifier: Apache-2.0
"""Weights whose units start out equal, and how far they stay so."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_optkit.diagnostics._observations import RowsSeen
from lightning_optkit.diagnostics.measure.parameters import layer_of, plain_name
from lightning_optkit.diagnostics.measure.wide import wide

__all__ = ["EqualRows"]


class EqualRows:
    """The trained weights of `module` whose rows are bitwise equal now.

    A row holds the incoming weights of one unit; of a recurrent layer or an attention that stacks several matrices, the
    first of them is taken. Left out: embeddings, whose rows are inputs, and convolutions in groups.
    """

    def __init__(self, module: nn.Module) -> None:
        self._first: dict[str, tuple[Tensor, int]] = {}  # the first row, and the number of rows
        for prefix, child in module.named_modules():
            for name, param in child.named_parameters(prefix, recurse=False):
                units = _units(child, param)
                if units > 1 and _are_equal(rows := param.detach()[:units].reshape(units, -1)):
                    self._first[name] = (rows[0].clone(), units)

    def seen(self, params: Mapping[str, Tensor]) -> tuple[RowsSeen, ...]:
        """How they are now, given the current parameters by name."""
        return tuple(
            _seen(name, params[name], first, units)
            for name, (first, units) in self._first.items()
            if name in params and params[name].shape[0] >= units and params[name][0].numel() == first.numel()
        )


def _units(module: nn.Module, param: Tensor) -> int:
    """Number of rows to compare; 0 if they are not units."""
    if not param.requires_grad or isinstance(param, DTensor) or is_lazy(param):
        return 0
    if param.ndim < 2 or not param.is_floating_point() or isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0
    if getattr(module, "groups", 1) != 1 or getattr(module, "transposed", False):
        return 0
    if isinstance(module, nn.RNNBase):
        return int(module.hidden_size)
    return int(module.embed_dim) if isinstance(module, nn.MultiheadAttention) else int(param.shape[0])


def _are_equal(rows: Tensor) -> bool:
    return torch.equal(rows[0], rows[1]) and bool((rows == rows[:1]).all())


def _seen(name: str, param: Tensor, first: Tensor, units: int) -> RowsSeen:
    rows = wide(param.detach()[:units].reshape(units, -1))
    moved = float((rows[0] - wide(first)).norm())
    spread = float((rows - rows[:1]).norm(dim=1).max())
    return RowsSeen(plain_name(name), layer_of(name), units, moved, spread, param.grad is not None)
