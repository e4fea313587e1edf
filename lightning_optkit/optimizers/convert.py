# SPDX-License-Identifier: Apache-2.0
"""Turns a torch optimizer into ours and back, in place: schedulers and users keep hold of the same object."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from lightning_optkit.optimizers.adam import Adam
from lightning_optkit.optimizers.adamw import AdamW
from lightning_optkit.optimizers.sgd import SGD
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.loading import restore_state
from lightning_optkit.step.state import StateLayout

__all__ = ["from_torch_", "to_torch_", "why_not_convertible"]

_OURS: dict[type[Optimizer], type[OnePassOptimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
}


def why_not_convertible(optimizer: Optimizer) -> str | None:
    """The reason why `from_torch_` would refuse `optimizer`, or None.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> why_not_convertible(torch.optim.Rprop([weight]))
        'no one-pass rule for torch.optim.Rprop'
    """
    cls = type(optimizer)
    if isinstance(optimizer, OnePassOptimizer):
        return f"{cls.__name__} is one-pass already"
    if cls not in _OURS:
        torch_bases = [base for base in _OURS if issubclass(cls, base)]
        where = "torch.optim" if cls.__module__.startswith("torch.optim") else cls.__module__
        if torch_bases:
            return f"{where}.{cls.__name__} changes torch.optim.{torch_bases[0].__name__}"
        return f"no one-pass rule for {where}.{cls.__name__}"
    if any(group["differentiable"] for group in optimizer.param_groups):
        return "differentiable=True: the one-pass step writes in place"
    return None


def from_torch_(
    optimizer: Optimizer,
    *,
    rounding: Literal["nearest", "stochastic", "kahan"] = "nearest",
    state_dtype: torch.dtype = torch.float32,
    statistics: bool = False,
) -> None:
    """Makes a `torch.optim` optimizer a one-pass optimizer of the same rule, groups and state.

    Args:
        optimizer: Of exactly one of the torch classes that have a one-pass rule.
        rounding: As in the optimizers of this package.
        state_dtype: As in the optimizers of this package.
        statistics: As in the optimizers of this package.

    Raises:
        TypeError: if there is no one-pass rule for it; nothing is changed then.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        >>> from_torch_(optimizer)
        >>> optimizer.explain().groups[0].rule
        'adam'
    """
    reason = why_not_convertible(optimizer)
    if reason is not None:
        raise TypeError(f"from_torch_(optimizer=<{type(optimizer).__name__}>): {reason}.")
    cls = _OURS[type(optimizer)]
    # Built the ordinary way first, so that every check is made before anything is touched.
    groups = [{**group, "fused": None, "foreach": None} for group in optimizer.param_groups]
    ours = cls(groups, rounding=rounding, state_dtype=state_dtype, statistics=statistics)  # type: ignore[call-arg]
    saved = optimizer.state_dict()
    for group, new in zip(optimizer.param_groups, ours.param_groups, strict=True):
        group.update({key: value for key, value in new.items() if key not in group})
        group.update(fused=None, foreach=None)
    taken_over = {key: value for key, value in vars(ours).items() if key not in vars(optimizer)}
    _become(optimizer, cls)
    vars(optimizer).update(taken_over)
    optimizer.defaults = {**ours.defaults, **optimizer.defaults, "fused": None, "foreach": None}
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    assert isinstance(optimizer, OnePassOptimizer)
    restore_state(optimizer, saved, StateLayout(None, state_dtype))


def to_torch_(optimizer: OnePassOptimizer) -> None:
    """Makes it the torch optimizer again that it was, with the state that it has now.

    State that torch's class does not know (averages, counters) stays where it is; torch ignores it.
    """
    cls = optimizer.torch_class
    assert cls is not None
    build: Callable[..., Optimizer] = cls
    known = set(build([torch.nn.Parameter(torch.zeros(1))]).param_groups[0])
    for group in optimizer.param_groups:
        for key in set(group) - known - {"initial_lr", "param_names"}:
            del group[key]
    optimizer.defaults = {key: value for key, value in optimizer.defaults.items() if key in known}
    _become(optimizer, cls)


def _become(optimizer: Optimizer, cls: type[Optimizer]) -> None:
    scheduled = hasattr(optimizer.step, "_wrapped_by_lr_sched")
    vars(optimizer).pop("step", None)
    optimizer.__class__ = cls
    optimizer._patch_step_function()
    if scheduled:
        _watch_step(optimizer)


def _watch_step(optimizer: Optimizer) -> None:
    """What a scheduler does to its optimizer's `step`, to warn when it is stepped first."""
    reference = weakref.ref(optimizer)
    step: Callable[..., Any] = type(optimizer).step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        owner = reference()
        owner._opt_called = True  # type: ignore[union-attr]
        return step(owner, *args, **kwargs)

    watched._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = watched  # type: ignore[method-assign]
