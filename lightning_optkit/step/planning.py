# SPDX-License-Identifier: Apache-2.0
"""Sorts the parameters of an optimizer into segments, and binds them before every step."""

import math
from collections.abc import Container, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from lightning_optkit.step.arguments import check_params, check_rounding
from lightning_optkit.step.clip import NO_BOUNDS
from lightning_optkit.step.coefficients import average_weight
from lightning_optkit.step.compiled import CompiledSegment
from lightning_optkit.step.cuda import CudaSegment
from lightning_optkit.step.early import early_updates
from lightning_optkit.step.gathered import gathering
from lightning_optkit.step.membership import membership
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.plain import why_no_parameter
from lightning_optkit.step.reference_segment import ReferenceSegment
from lightning_optkit.step.rounding import move_average_
from lightning_optkit.step.rule import Group, Rule, State
from lightning_optkit.step.segments import Entry, PlanOutdated, Segment
from lightning_optkit.step.sharded import ShardedCompiledSegment, ShardedReferenceSegment, ShardedUnitsSegment
from lightning_optkit.step.shards import local, sharding_groups, why_gathered
from lightning_optkit.step.split_weights import joined
from lightning_optkit.step.state import Kept, StateLayout, check_state, prepare_state
from lightning_optkit.step.stepped import GroupContext, Stepped, group_contexts

__all__ = ["StepPlan", "kept_entry", "left_out_by", "lists_of", "segment_kind", "signature", "start_late_average"]


def lists_of(optimizer: Stepped) -> list[list[Tensor]]:
    """The current parameters of each group; a `params` that is not a list (set by hand) is replaced by one.

    Raises:
        ValueError: if a group has no `params`.
    """
    groups = optimizer.param_groups
    try:
        lists = [group["params"] for group in groups]
    except (KeyError, TypeError):
        raise ValueError(f"{optimizer._owner}.step: every group must be a dict that has 'params'.") from None
    for place, params in enumerate(lists):
        if type(params) is not list:
            groups[place]["params"] = lists[place] = [params] if isinstance(params, Tensor) else list(params)
    return lists


class StepPlan:
    """The segments of an optimizer: every parameter that has, or ever had, a gradient.

    Args:
        optimizer: The optimizer, whose missing state is created. No reference to it is kept.

    Raises:
        ValueError: for invalid parameters, gradients or state; nothing is changed then.
    """

    def __init__(self, optimizer: Stepped) -> None:
        layout = StateLayout(optimizer.average, optimizer.state_dtype)
        lists = lists_of(optimizer)
        _check_members(optimizer, lists)
        kept, self._dormant = _sort(optimizer, group_contexts(optimizer), lists)
        check_state(optimizer._owner, kept, layout)
        for each in kept:
            optimizer.state[each.entry.param] = each.state
        prepare_state(kept, layout)
        self._average_name = layout.average_name
        self.num_averaged = 0
        if layout.average_name:
            self.num_averaged = _start_late_averages(optimizer, kept, layout.average_name)
        # All averages share one clock: the step count of the parameter with the most updates.
        steps = [each.state["step"] for each in kept] if layout.average_name else []
        self.clock = int(torch.stack(steps).max()) if steps else 0
        self.segments, self._places = _segmented(optimizer, kept, layout.average_name, left_out_by(optimizer))
        self._signature = signature(optimizer, optimizer.param_groups)
        try:
            self._membership = membership(optimizer.state, lists, [each.entry.param for each in kept])
        except ValueError:  # another thread removed the state
            raise PlanOutdated from None

    def bind(self, optimizer: Stepped) -> list[Segment]:
        """The segments that have gradients, bound to them and to the current state until `release`.

        Raises:
            PlanOutdated: if the optimizer changed since the plan was built.
            ValueError: if a gradient does not fit its parameter.
        """
        states = self._membership.states(optimizer.state, lists_of(optimizer))
        if states is None or self._signature != signature(optimizer, optimizer.param_groups):
            raise PlanOutdated
        if any(p.grad is not None for p in self._dormant):
            raise PlanOutdated
        if len(self.segments) == 1:
            return self.segments if self.segments[0].bind(states) else []
        return [
            segment
            for segment, places in zip(self.segments, self._places, strict=True)
            if segment.bind([states[place] for place in places])
        ]

    def release(self) -> None:
        """Drops the references to gradients and state."""
        for segment in self.segments:
            segment.release()

    def average_idle(
        self, optimizer: Stepped, numbers: Sequence[GroupNumbers], updated: Container[Tensor] = ()
    ) -> None:
        """Updates the averages of parameters without an update in this step, so that all averages share one clock.

        Args:
            optimizer: The optimizer.
            numbers: The numbers of each group.
            updated: The parameters that the backward pass has updated.
        """
        name = self._average_name
        waiting = (pair for segment in self.segments for pair in segment.idle()) if name else ()
        idle = [pair for pair in waiting if pair[0].param not in updated]
        if name is None or not idle:
            return
        without_gradient = {entry.param for entry, _ in idle}
        entries = (entry for segment in self.segments for entry in segment.entries)
        stepped = next(entry.param for entry in entries if entry.param not in without_gradient)
        clock = optimizer.state[stepped]["num_averaged"]
        for entry, state in idle:
            group, average, so_far = numbers[entry.group_index], local(state[name]), state["num_averaged"]
            if not group.average_due:
                continue
            # On CUDA only the device knows the number of updates, and reading it would synchronize. An average that
            # starts later than the others starts as a copy.
            seen = so_far.to(torch.float64 if average.real.dtype == torch.float64 else torch.float32)
            weight = average_weight(int(group.average_kind), group.average_decay, seen)
            weight = torch.where(seen > 0, weight, (clock > 0).to(seen.dtype))
            value = joined(local(entry.param.detach()), state)
            key = (int(group.rounding_seed), self.num_averaged, entry.tensor_index)
            move_average_(average, value, weight, key)
            so_far.copy_(torch.where(seen > 0, so_far + 1, clock))


def _start_late_averages(optimizer: Stepped, kept: Sequence[Kept], name: str) -> int:
    """Starts the averages of parameters that get their first gradient after the other averages have started.

    The parameter has not changed so far, so its average is a copy with the number of updates of the others, which is
    returned.
    """
    counts = torch.stack([each.state["num_averaged"] for each in kept]).tolist() if kept else []
    early = early_updates(optimizer)
    clock = max(counts, default=0) if early is None else early.num_averaged(optimizer.state, optimizer.average)
    for each, count in zip(kept, counts, strict=True):
        if count == 0 and clock > 0:
            start_late_average(each, name, clock)
    return int(clock)


def start_late_average(kept: Kept, name: str, count: float) -> None:
    """Starts an average as a copy of its parameter, which has not changed so far, after `count` updates."""
    local(kept.state[name]).copy_(joined(local(kept.entry.param.detach()), kept.state))
    kept.state["num_averaged"].fill_(count)


def _check_members(optimizer: Stepped, lists: list[list[Tensor]]) -> None:
    """Checks groups that may have been changed by hand, without `add_param_group`."""
    owner = f"{optimizer._owner}.step"
    for param in (param for params in lists for param in params):
        if not isinstance(param, Tensor):
            raise TypeError(f"{owner}: a group's 'params' must hold tensors, not a {type(param).__name__}.")
    check_params(owner, [], [param for params in lists for param in params])


def _sort(
    optimizer: Stepped, contexts: Sequence[GroupContext], lists: list[list[Tensor]]
) -> tuple[list[Kept], list[Tensor]]:
    """The parameters that are stepped, and those that have never had a gradient."""
    kept: list[Kept] = []
    dormant: list[Tensor] = []
    for context, params in zip(contexts, lists, strict=True):
        for param in params:
            if param.grad is None and not optimizer.state.get(param):
                dormant.append(param)
            else:
                kept.append(kept_entry(optimizer, context, param, len(kept) + len(dormant)))
    return kept, dormant


def kept_entry(optimizer: Stepped, context: GroupContext, param: Tensor, number: int) -> Kept:
    """The entry of a parameter with its state and its rule; `number` is its index in the optimizer.

    Raises:
        TypeError: if its state is not a dict.
        ValueError: if no step can update it.
    """
    reason = why_no_parameter(param)
    if reason is not None:
        which = "a parameter" if param.is_nested else f"a parameter of shape {list(param.shape)}"
        raise ValueError(f"{optimizer._owner}.step: {which} {reason}.")
    check_rounding(optimizer._owner, context.group["rounding"], param)
    state = optimizer.state.get(param, {})
    if not isinstance(state, dict):
        raise TypeError(f"{optimizer._owner}.step: the state of a parameter must be a dict.")
    entry = Entry(param, context.rule.kept_by(param, context.state_names), context.number, number)
    return Kept(entry, state, context.group, context.rule)


def signature(optimizer: Stepped, groups: Sequence[Group]) -> tuple[object, ...]:
    """Everything that determines the state of these groups and the path of their parameters."""
    clip, average = optimizer.clip, optimizer.average
    bounds = NO_BOUNDS if clip is None else clip.bounds
    parts = math.isfinite(bounds.max_tensor_norm), math.isfinite(bounds.unit_ratio)
    stages = (parts, None if average is None else average.state_name, optimizer.state_dtype, optimizer.leaves_out)
    found = []
    for group in groups:
        rule = optimizer._rule(group)
        path = (
            group["rounding"],
            group["centralize"],
            group["caution"],
            group["fused"] is False,
            group.get("trust_clip", False),
        )
        found.append((rule.name, rule.kept_names(group), path))
    return stages, found


def segment_kind(optimizer: Stepped, param: Tensor, group: Group, rule: Rule) -> type[Segment]:
    """The class of segment that steps a parameter."""
    is_compiled = optimizer._why_reference(param, group) is None
    kind = optimizer._reference_segment(rule)
    if is_compiled:
        kind = CudaSegment if param.is_cuda else CompiledSegment
    if not sharding_groups(param):
        return kind
    if why_gathered(param, group, rule, optimizer.clip, optimizer.state_dtype) is not None:
        return gathering(kind)
    bounds = NO_BOUNDS if optimizer.clip is None else optimizer.clip.bounds
    if rule.trust_ratio is not None or not is_compiled or (bounds.limits_parts and param.is_cuda):
        return ShardedReferenceSegment
    if math.isfinite(bounds.unit_ratio):
        return ShardedUnitsSegment
    return ShardedCompiledSegment if math.isfinite(bounds.max_tensor_norm) else kind


def left_out_by(optimizer: Stepped) -> Set[Tensor]:
    """The parameters that its clip leaves out."""
    return frozenset() if optimizer.clip is None or optimizer.leaves_out is None else optimizer.leaves_out()


def _segmented(
    optimizer: Stepped, kept: Sequence[Kept], average_name: str | None, left_out: Set[Tensor]
) -> tuple[list[Segment], list[list[int]]]:
    """Segments, compiled ones first, and the indices of their parameters in `kept`."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, (entry, _, group, rule) in enumerate(kept):
        kind = segment_kind(optimizer, entry.param, group, rule)
        is_left_out = entry.param in left_out
        # All parameters of a segment sum over the same processes.
        key = (kind, not is_left_out, rule.name, entry.param.dtype == torch.float64, sharding_groups(entry.param))
        alike.setdefault(key, []).append(place)
    # On CUDA the last segment reports the clip, so it must be one that is clipped.
    in_order = sorted(alike.items(), key=lambda item: (issubclass(item[0][0], ReferenceSegment), item[0][1]))
    segments: list[Segment] = []
    for (kind, is_clipped, *_), places in in_order:
        rule, entries = kept[places[0]].rule, [kept[place].entry for place in places]
        states: list[State] = [kept[place].state for place in places]
        segments.append(kind(rule, entries, states, average_name, optimizer._owner))
        segments[-1].is_left_out = not is_clipped
    return segments, [places for _, places in in_order]
