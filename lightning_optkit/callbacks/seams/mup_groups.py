# SPDX-License-Identifier: Apache-2.0
"""Gives the optimizers of a module muP's learning rates, per parameter."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import ASGD, Optimizer

from lightning_optkit.init import MupRow
from lightning_optkit.init._write import parameter

__all__ = ["split_by_multiplier"]

_MARK = "mup_multiplier"


@contextmanager
def split_by_multiplier(model: nn.Module, rows: Sequence[MupRow]) -> Iterator[None]:
    """Inside, every new optimizer splits its groups so that each has one multiplier, and multiplies its lr.

    This happens when groups are added, before a scheduler counts them. The column "sgd" of muP's table is for SGD and
    ASGD, the column "adam" for all others. No-op without rows.

    Raises:
        ValueError: on exit, if a scheduler has set learning rates independently of the groups (OneCycleLR, CyclicLR);
            for an optimizer without a learning rate.
    """
    if not rows:
        yield
        return
    by_parameter = {id(parameter(model.get_submodule(r.module), r.parameter)): (r.adam, r.sgd) for r in rows}
    original = Optimizer.add_param_group
    given: list[tuple[dict[str, Any], float]] = []

    def add_param_group(self: Optimizer, param_group: dict[str, Any]) -> None:
        if _MARK in param_group:  # of an optimizer that is created from another one (Fuse)
            original(self, param_group)
            return
        column = int(isinstance(self, ASGD) or "SGD" in type(self).__name__)
        for factor, part in _split(param_group, {key: both[column] for key, both in by_parameter.items()}):
            lr = part.get("lr", self.defaults.get("lr"))
            if lr is None:
                raise ValueError(
                    f"Initialize(scheme=mup_width): {type(self).__name__} has no learning rate to be multiplied."
                )
            scaled = {name: part[name] * factor for name in ("decay_lr",) if name in part}
            original(self, {**part, **scaled, "lr": lr * factor, _MARK: factor})
            given.append((self.param_groups[-1], float(lr * factor)))

    Optimizer.add_param_group = add_param_group  # type: ignore[method-assign]
    try:
        yield
    finally:
        Optimizer.add_param_group = original  # type: ignore[method-assign]
    for group, lr in given:
        found = float(group.get("initial_lr", group["lr"]))
        if not math.isclose(found, lr, rel_tol=1e-6):
            raise ValueError(
                f"Initialize(scheme=mup_width): a scheduler has set a group's learning rate to {found:g}, where muP "
                f"needs {lr:g}; use one that multiplies the rates of the groups, such as LambdaLR or CosineAnnealingLR."
            )


def _split(group: dict[str, Any], factors: Mapping[int, float]) -> list[tuple[float, dict[str, Any]]]:
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    parts: dict[float, list[Any]] = {}
    for item in params:
        param = item[1] if isinstance(item, tuple) else item  # from named_parameters()
        parts.setdefault(factors.get(id(param), 1.0), []).append(item)
    return [(factor, {**group, "params": part}) for factor, part in parts.items()] or [(1.0, group)]
