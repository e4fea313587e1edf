# SPDX-License-Identifier: Apache-2.0
"""Updates each parameter inside the backward pass, as soon as its gradient is complete, and frees the gradient.

The gradients are never all in memory at once. Source: Lv et al. 2023, "Full parameter fine-tuning for large language
models with limited resources", arXiv:2306.09782.
"""

import math
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_optkit._checks import check_bools, check_instance
from lightning_optkit.step.early import EarlyUpdates
from lightning_optkit.step.engine import group_numbers
from lightning_optkit.step.gradient_scale import host_scale
from lightning_optkit.step.memory import Arena, arena_for
from lightning_optkit.step.numbers import unclipped
from lightning_optkit.step.optimizer import OnePassOptimizer
from lightning_optkit.step.plain import refuse_transforms
from lightning_optkit.step.planning import (
    kept_entry,
    left_out_by,
    lists_of,
    segment_kind,
    signature,
    start_late_average,
)
from lightning_optkit.step.segments import PlanOutdated, Segment
from lightning_optkit.step.shards import local
from lightning_optkit.step.state import Kept, StateLayout, check_state, prepare_state
from lightning_optkit.step.stepped import group_contexts

__all__ = ["StepInBackward", "step_in_backward"]

_IN_PLACE = "_step_in_backward"  # attribute of the optimizer; keeps the handle alive


def step_in_backward(optimizer: OnePassOptimizer, *, once_per_step: bool = False) -> "StepInBackward":
    """Makes `loss.backward()` update the parameters of `optimizer` one by one, and free their gradients.

    `optimizer.step()` may still be called: it counts the step, updates the parameters that still have a gradient (one
    that was frozen when this was put in place, or was added since), and the averages of those without one. State,
    groups, schedulers and checkpoints work as usual. Each backward pass is one step, so gradients cannot be
    accumulated, nor averaged over processes afterwards (DDP). If the clip uses norms, a parameter whose gradient is not
    finite is skipped, while the others are updated. The gradient of a parameter is complete once per backward pass,
    however often the model uses it. Without `optimizer.step()`, an average is updated only when its parameter is.

    Args:
        optimizer: With `ClipPerTensor`, `ClipUnitwise`, `ClipValue` or no clip.
        once_per_step: Raise RuntimeError if a parameter gets a second gradient before `optimizer.step()` is called.

    Returns:
        A handle; `remove()` restores the ordinary step.

    Raises:
        ValueError: for a clip by the global norm or a rule that computes its rate from all gradients, which never exist
            together, or if the optimizer already steps in the backward pass.

    Example:
        >>> from lightning_optkit.optimizers import SGD
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> handle = step_in_backward(SGD([weight], lr=0.1))
        >>> weight.sum().backward()
        >>> weight.data, weight.grad
        (tensor([0.9000, 0.9000]), None)
    """
    return StepInBackward(optimizer, once_per_step=once_per_step)


class StepInBackward:
    """The handle returned by `step_in_backward`.

    Args:
        optimizer: See `step_in_backward`.
        once_per_step: See `step_in_backward`.
        owner: What error messages begin with. Default: the call of `step_in_backward`.

    Raises:
        TypeError: if `optimizer` is not one of this package.
        ValueError: as `step_in_backward`.
    """

    def __init__(self, optimizer: OnePassOptimizer, *, once_per_step: bool = False, owner: str | None = None) -> None:
        such_as = "an optimizer of this package, such as AdamW(model.parameters())"
        check_instance("step_in_backward", "optimizer", optimizer, OnePassOptimizer, such_as)
        self._owner = f"step_in_backward({type(optimizer).__name__})" if owner is None else owner
        check_bools("step_in_backward", once_per_step=once_per_step)
        self.optimizer, self._once_per_step = optimizer, once_per_step
        self._check()
        self._own: dict[Tensor, _Own] = {}
        self._places: dict[Tensor, tuple[int, int]] = {}  # last known group and position in it
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._arena: Arena | None = None  # one for all, since memory for each would lie between freed gradients
        self._has_reserved = False
        self._early = optimizer._engine.early = EarlyUpdates()
        vars(optimizer)[_IN_PLACE] = self
        self.follow()

    def follow(self) -> None:
        """Includes parameters that were added or unfrozen since."""
        this = weakref.ref(self)
        for param in (param for params in lists_of(self.optimizer) for param in params):
            if param.requires_grad and param not in self._handles:
                self._handles[param] = param.register_post_accumulate_grad_hook(self._hook(this))  # type: ignore[no-untyped-call]

    def remove(self) -> None:
        """Restores the ordinary step of the optimizer."""
        for handle in self._handles.values():
            handle.remove()
        vars(self.optimizer).pop(_IN_PLACE, None)
        engine = vars(self.optimizer).get("_engine")  # none, if the optimizer is torch's again
        if engine is not None and engine.early is self._early:
            engine.early = None

    def _check(self) -> None:
        optimizer = self.optimizer
        if _IN_PLACE in vars(optimizer):
            raise ValueError(f"{self._owner}: it is in place already.")
        clip = optimizer.clip
        bounds_parts = clip is not None and min(clip.bounds.max_tensor_norm, clip.bounds.unit_ratio) < math.inf
        if clip is not None and clip.needs_norm and not bounds_parts:
            raise ValueError(
                f"{self._owner}: {clip!r} needs the norm of all gradients, which are never there together; use "
                "ClipPerTensor or ClipUnitwise."
            )

        if any(optimizer._rule(group).estimate is not None for group in optimizer.param_groups):
            raise ValueError(f"{self._owner}: its rate is learned of all gradients, which are never there together.")

    @staticmethod
    def _hook(this: "weakref.ref[StepInBackward]") -> Callable[[Tensor], None]:
        def hook(param: Tensor) -> None:
            self = this()
            place = None if self is None or param.grad is None else self._place_of(param)
            if self is not None and place is not None:
                self._update(param, *place)
                param.grad = None

        return hook

    def _place_of(self, param: Tensor) -> tuple[int, int] | None:
        """The group that currently has the parameter, and its number among all parameters; or None."""
        lists = lists_of(self.optimizer)
        group, place = self._places.get(param, (0, 0))
        if group < len(lists) and place < len(lists[group]) and lists[group][place] is param:
            return group, sum(map(len, lists[:group])) + place
        for group, params in enumerate(lists):
            for place, other in enumerate(params):
                if other is param:
                    self._places[param] = group, place
                    return group, sum(map(len, lists[:group])) + place
        return None

    @torch.no_grad()
    def _update(self, param: Tensor, group_index: int, number: int) -> None:
        optimizer = self.optimizer
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(f"{self._owner}: a loss scaler must see all gradients before any step; train in bf16.")
        refuse_transforms(self._owner)
        optimizer._check_changed((group_index,))
        self._begin(param)
        made_of = group_index, number, signature(optimizer, [optimizer.param_groups[group_index]])
        for _ in range(2):
            own = self._own.get(param)
            if own is None or own.made_of != made_of:
                own = self._own[param] = _Own(self._build(param, group_index, number), made_of)
            try:
                own.segment.bind([optimizer.state.get(param, {})])
                scale = host_scale(optimizer.clip, [own.segment], None, None)
                if not scale.is_skipped:
                    clock, average = self._early.clock(optimizer.state), optimizer.average
                    seen = 0 if average is None else self._early.num_averaged(optimizer.state, average)
                    numbers = group_numbers(optimizer, clock + 1, seen)
                    numbers = unclipped(numbers) if own.segment.is_left_out else numbers
                    statistics = optimizer.record_statistics
                    clipped = own.segment.step(optimizer.param_groups, numbers, scale.factor, statistics)
                    self._early.is_clipped |= clipped.num > 0
                    self._early.current[param] = own.segment
                return
            except PlanOutdated:
                del self._own[param]
            finally:
                own.segment.release()
        raise RuntimeError(f"{self._owner}: a parameter, its state or its gradient was moved while it was updated.")

    def _begin(self, param: Tensor) -> None:
        """A second gradient of a parameter begins another step, unless that was ruled out."""
        self._early.clock(self.optimizer.state)
        if param not in self._early.current:
            return
        if self._once_per_step:
            raise RuntimeError(
                f"{self._owner}: a parameter of shape {list(param.shape)} got a second gradient before "
                "optimizer.step(); every backward pass is a step here, so there must be one for each step."
            )
        self.optimizer._engine.close_early()

    def _build(self, param: Tensor, group_index: int, number: int) -> Segment:
        optimizer = self.optimizer
        kept = kept_entry(optimizer, group_contexts(optimizer)[group_index], param, number)
        layout = StateLayout(optimizer.average, optimizer.state_dtype)
        check_state(optimizer._owner, [kept], layout)
        if not kept.state:
            optimizer._engine.plan = None  # it does not have this parameter yet
        optimizer.state[param] = kept.state
        if not self._has_reserved:
            self._arena, self._has_reserved = self._reserve(layout), True
        prepare_state([kept], layout, self._arena)
        if layout.average_name is not None:
            self._start_late(kept, layout.average_name)
        kind = segment_kind(optimizer, param, kept.group, kept.rule)
        segment = kind(kept.rule, [kept.entry], [kept.state], layout.average_name, optimizer._owner)
        segment.is_left_out = param in left_out_by(optimizer)
        return segment

    def _reserve(self, layout: StateLayout) -> Arena | None:
        """Room for the state of every parameter that may get a gradient."""
        optimizer = self.optimizer
        tensors: list[Tensor] = []
        dtypes: list[torch.dtype] = []
        for context in group_contexts(optimizer):
            for param in context.group["params"]:
                if param.requires_grad and not optimizer.state.get(param):
                    names = layout.tensors(context.rule.kept_by(param, context.state_names), context.group, param)
                    tensors += [local(context.rule.like(name, param)) for name in names]
                    dtypes += [layout.dtype_of(name, param, context.rule) for name in names]
        return arena_for(tensors, dtypes)

    def _start_late(self, kept: Kept, name: str) -> None:
        clock, states = self._early.clock(self.optimizer.state), self.optimizer.state
        if clock > 0 and float(kept.state["num_averaged"]) == 0:
            count = self._early.num_averaged(states, self.optimizer.average)
            if count > 0:
                start_late_average(kept, name, count)


class _Own(NamedTuple):
    """The segment of one parameter, and the facts it was built from."""

    segment: Segment
    made_of: tuple[object, ...]
