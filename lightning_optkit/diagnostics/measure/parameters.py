# SPDX-License-Identifier: Apache-2.0
"""Norms of weights, gradients and updates of one step, and how much of the updates is lost in rounding.

A one-pass optimizer counts all of it in its own walk. For any other, up to 4,096 elements of each parameter are copied
before the step, evenly spaced, and compared after it; the norm of the update is that of the copy, scaled.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit._norms import each_norm
from lightning_optkit._torch_private import WRAPPERS, foreach_norm
from lightning_optkit.diagnostics._observations import ParameterSeen
from lightning_optkit.diagnostics.measure.wide import wide
from lightning_optkit.step import OnePassOptimizer, TensorStatistics
from lightning_optkit.step.shards import local

__all__ = ["StepMeasure", "layer_of", "parameters_of", "plain_name"]

_SAMPLE = 4_096  # a share of them is known to 1.6 %
_TOGETHER = 64  # parameters of which samples are compared at once
_NAN = float("nan")


@lru_cache(maxsize=65_536)  # all names of a module are asked for in every measured step
def plain_name(name: str) -> str:
    """The name of a parameter or module as it was before torch.compile, FSDP or checkpointing wrapped a module."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


@lru_cache(maxsize=65_536)
def layer_of(name: str) -> str:
    """The module that owns the parameter of this name; "" for the root."""
    return plain_name(name).rpartition(".")[0]


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of all its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


class StepMeasure:
    """Measures one step of each optimizer: created before it; `begin` is called before and `after` right after each.

    Args:
        params: The parameters to measure, by name.
        optimizers: Those that will step; one-pass optimizers count in their own walk until `close`.
    """

    def __init__(self, params: Mapping[str, Tensor], optimizers: Iterable[Optimizer]) -> None:
        self._params = {name: p for name, p in params.items() if p.requires_grad}
        optimizers = list(optimizers)
        self._counting = [o for o in optimizers if isinstance(o, OnePassOptimizer) and not o.record_statistics]
        for optimizer in self._counting:
            optimizer.record_statistics = True
        own = {p for o in optimizers if isinstance(o, OnePassOptimizer) for p in parameters_of(o)}
        self._optimized = {p for o in optimizers for p in parameters_of(o)}
        self._own, self.starts = own, dict[Tensor, Tensor]()
        self._norms: dict[Tensor, tuple[float, float, float]] = {}  # gradient, update, lost

    def begin(self) -> None:
        """Copies some elements of each parameter, before the forward pass; no-op the second time."""
        if not self.starts:
            self.starts = {p: _sample(p).clone() for p in self._params.values() if p in self._optimized}

    def after(self, optimizer: Optimizer, scale: float = 1.0) -> None:
        """Measures the step that the optimizer just took, with gradients that are still multiplied by `scale`."""
        if isinstance(optimizer, OnePassOptimizer):
            roundings = [group["rounding"] for group in optimizer.param_groups for _ in group["params"]]
            counts = zip(parameters_of(optimizer), optimizer.statistics(), roundings, strict=True)
            for param, counted, rounding in counts:
                if counted is not None:
                    grad, update, lost = _counted(counted, param.numel())
                    # Stochastic rounding leaves most elements as they are in each step, and none in the mean.
                    self._norms[param] = (grad, update, _NAN if rounding == "stochastic" else lost)
            return
        stepped = [p for p in parameters_of(optimizer) if p in self.starts and p not in self._own]
        pairs = [(p, p.grad) for p in stepped if p.grad is not None and p.grad.layout == torch.strided]
        norms = _fetched(each_norm([grad for _, grad in pairs]))
        changes = _changes([(p, grad, self.starts[p]) for p, grad in pairs])
        for (param, _), norm, (update, lost) in zip(pairs, norms, changes, strict=True):
            self._norms[param] = (norm / scale, update, lost)

    def seen(self) -> tuple[ParameterSeen, ...]:
        """All parameters; to be asked before gradients are cleared."""
        params = list(self._params.items())
        weights = _fetched(each_norm([p.detach() for _, p in params]))
        others = [(p, p.grad) for _, p in params if p not in self._norms and p.grad is not None]
        there = _fetched([wide((_dense(grad) != 0).any()) for _, grad in others])
        nonzero = {p: bool(flag) for (p, _), flag in zip(others, there, strict=True)}
        return tuple(
            self._one(name, p, weight, nonzero.get(p, False)) for (name, p), weight in zip(params, weights, strict=True)
        )

    def is_undone(self, former: "StepMeasure") -> bool:
        """Whether all weights that the step of `former` changed began this one as they had begun that."""
        moved = [p for p, (_, update, _) in former._norms.items() if update > 0]
        return bool(moved) and all(
            p in self.starts and p in former.starts and torch.equal(self.starts[p], former.starts[p]) for p in moved
        )

    def close(self) -> None:
        """Stops counting in the one-pass optimizers."""
        for optimizer in self._counting:
            optimizer.record_statistics = False
        self._counting = []

    def _one(self, name: str, param: Tensor, weight: float, has_gradient: bool) -> ParameterSeen:
        grad, update, lost = self._norms.get(param, (_NAN, _NAN, _NAN))
        return ParameterSeen(
            name=plain_name(name),
            layer=layer_of(name),
            numel=param.numel(),
            is_narrow=param.element_size() == 2 and param.is_floating_point(),
            is_optimized=param in self._optimized,
            has_gradient=has_gradient if param not in self._norms else grad != 0,
            weight_norm=weight,
            grad_norm=grad,
            update_norm=update,
            lost=lost,
        )


def _counted(statistics: TensorStatistics, numel: int) -> tuple[float, float, float]:
    return statistics.grad_norm, statistics.update_norm, statistics.lost / max(numel, 1)


def _dense(t: Tensor) -> Tensor:
    return t.coalesce().values() if t.is_sparse else local(t)


def _sample(t: Tensor) -> Tensor:
    flat = local(t.detach()).reshape(-1)
    stride = math.ceil(flat.numel() / _SAMPLE)
    return flat[:: stride | 1] if stride > 1 else flat  # odd: an even one would meet few columns of a matrix


def _changes(measured: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Of parameters with their gradients and their samples of before, some at a time: their copies are short-lived."""
    found = []
    for first in range(0, len(measured), _TOGETHER):
        some = measured[first : first + _TOGETHER]
        alike = {(before.device, before.dtype, sampled.dtype) for _, sampled, before in some}
        found += _changed(some) if len(alike) == 1 else [pair for each in some for pair in _changed([each])]
    return found


def _changed(measured: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[tuple[float, float]]:
    """Norm of each update, estimated for the whole, and share of the elements that a gradient did not change."""
    before = [sample for _, _, sample in measured]
    sizes = [sample.numel() for sample in before]
    whole, earlier = torch.cat([_sample(p) for p, _, _ in measured]), torch.cat(before)
    lost = (whole == earlier) & (torch.cat([_sample(grad) for _, grad, _ in measured]) != 0)
    differences = wide(whole) - wide(earlier)
    pairs = 1 + whole.is_complex()
    updates = foreach_norm(torch.split(differences.reshape(-1), [pairs * size for size in sizes]), 2.0)
    counts = foreach_norm(torch.split(wide(lost), sizes), 1.0)
    numbers = _fetched([*updates, *counts])
    return [
        (update * math.sqrt(local(param).numel() / max(size, 1)), count / max(size, 1))
        for (param, _, _), size, update, count in zip(
            measured, sizes, numbers[: len(sizes)], numbers[len(sizes) :], strict=True
        )
    ]


def _fetched(numbers: Sequence[Tensor]) -> list[float]:
    """The numbers of all 0-d tensors, by one transfer."""
    if not numbers:
        return []
    device = numbers[0].device
    values: list[float] = torch.stack([wide(each.to(device)) for each in numbers]).tolist()
    return values
