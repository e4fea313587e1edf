# SPDX-License-Identifier: Apache-2.0
"""Averages for an optimizer that is not of this package: the same mathematics, in a pass of its own after the step."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit.step import Average

__all__ = ["protect_average", "update_average_"]


@torch.no_grad()
def update_average_(optimizer: Optimizer, average: Average, step: int) -> None:
    """Moves `optimizer.state[p][average.state_name]` toward every parameter, in place.

    Args:
        optimizer: Any optimizer; the average and its counter are added to its state, so that checkpoints carry them.
        average: E.g. `EMA(0.999)`.
        step: Optimizer steps done, this one included.

    Example:
        >>> from lightning_optkit.averaging import EMA
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.Rprop([weight])
        >>> weight.grad = torch.ones(1)
        >>> update_average_(optimizer, EMA(0.9), step=1)
        >>> optimizer.state[weight]["ema"]
        tensor([1.])
    """
    if step < average.start or (step - average.start) % average.every != 0:
        return
    moved: list[tuple[float, Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            weighted = _prepare(optimizer, average, param, group.get("average_decay", average.decay))
            if weighted is not None:
                moved.append(weighted)
    for weight, members in groupby(moved, key=lambda item: item[0]):
        _, averages, params = zip(*members, strict=True)
        if weight == 1:
            torch._foreach_copy_(averages, params)
        else:
            torch._foreach_lerp_(averages, [p.to(a.dtype) for a, p in zip(averages, params, strict=True)], weight)


def _prepare(
    optimizer: Optimizer, average: Average, param: Tensor, decay: float
) -> tuple[float, Tensor, Tensor] | None:
    """Weight of the parameter in its average, the average, the parameter; None for one that was never updated."""
    state = optimizer.state[param]
    if param.grad is None and average.state_name not in state:
        return None
    if average.state_name not in state:
        dtype = torch.promote_types(param.dtype, torch.float32)
        state[average.state_name] = torch.zeros_like(param, dtype=dtype)
        state["num_averaged"] = torch.zeros(())
    num_averaged = float(state["num_averaged"])
    state["num_averaged"] += 1.0
    if num_averaged == 0:
        weight = 1.0
    else:
        weight = 1.0 - decay if average.kind == 1 else 1.0 / (num_averaged + 1.0)
    return weight, state[average.state_name], param.detach()


def protect_average(optimizer: Optimizer, average: Average) -> list[RemovableHandle]:
    """Lets the average of 16-bit parameters go through `load_state_dict` in fp32.

    `Optimizer.load_state_dict` casts all state to the dtype of its parameter; this puts the average back as it was.

    Args:
        optimizer: Any optimizer that `update_average_` is called for.
        average: The same average.

    Returns:
        Two handles; `remove()` them to stop.
    """
    saved: dict[int, Tensor] = {}

    def remember(_: Optimizer, state_dict: dict[str, Any]) -> None:
        ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
        states = [state_dict["state"].get(saved_id, {}) for saved_id in ids]
        saved.update({i: state[average.state_name] for i, state in enumerate(states) if average.state_name in state})

    def put_back(loaded: Optimizer) -> None:
        params = [param for group in loaded.param_groups for param in group["params"]]
        for i, value in saved.items():
            loaded.state[params[i]][average.state_name] = value.to(params[i].device, copy=True)
        saved.clear()

    return [
        optimizer.register_load_state_dict_pre_hook(remember),
        optimizer.register_load_state_dict_post_hook(put_back),
    ]
