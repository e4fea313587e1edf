# SPDX-License-Identifier: Apache-2.0
"""Functions that any optimizer's step calls right before and right after it updates, and only if it does.

A step hook of torch alone is not enough: in 32 bits the closure runs inside `step`, after the pre-hooks; an optimizer
that unscales by itself is stepped even when the loss scaler found an infinite gradient; and a one-pass optimizer that
clips by norm skips such a step by itself.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, cast

from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit.step import OnePassOptimizer

__all__ = ["after_update", "before_update", "refuse_folded_average"]


def before_update(owner: str, optimizer: Optimizer, function: Callable[[Optimizer], None]) -> RemovableHandle:
    """Calls `function(optimizer)` between the gradients and the update, for the callback `owner`.

    Raises:
        ValueError: for LBFGS, which evaluates its closure many times in a step.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            f"{owner}(...): LBFGS evaluates the loss many times in a step, and nothing can be done right before its "
            "update; use an optimizer with one evaluation a step."
        )

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _found_inf(optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            function(optimizer)
            return None

        @wraps(closure)
        def closure_then_function() -> Any:
            loss = closure()
            function(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_function, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_function}

    return optimizer.register_step_pre_hook(hook)


def after_update(optimizer: Optimizer, function: Callable[[Optimizer], None]) -> RemovableHandle:
    """Calls `function(optimizer)` after the update, before any other hook (an average must see what it did)."""
    done = _num_steps(optimizer)

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal done
        before, done = done, _num_steps(optimizer)
        if not _found_inf(optimizer) and (done is None or done != before):
            function(optimizer)

    handle = optimizer.register_step_post_hook(hook)
    cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks).move_to_end(handle.id, last=False)
    return handle


def refuse_folded_average(owner: str, optimizer: Optimizer, remedy: str) -> None:
    """Raises ValueError if the step averages the weights before `owner` changes them."""
    if isinstance(optimizer, OnePassOptimizer) and optimizer.average is not None:
        raise ValueError(
            f"{owner}(...): changes the weights after the step of {type(optimizer).__name__}, which folds in "
            f"{optimizer.average!r} and would average them unchanged; {remedy}."
        )


def _found_inf(optimizer: Optimizer) -> bool:
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) != 0


def _num_steps(optimizer: Optimizer) -> int | None:
    """Counted where a step may skip by itself; reading it on CUDA waits for the device."""
    skips = isinstance(optimizer, OnePassOptimizer) and optimizer.clip is not None and optimizer.clip.needs_norm
    return optimizer.num_steps if skips else None  # type: ignore[attr-defined]
