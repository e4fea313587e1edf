# SPDX-License-Identifier: Apache-2.0
"""One step over all segments of an optimizer: unscale, norm, clip, walk."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import torch

from lightning_optkit.step.cuda import CudaSegment, DeviceControl
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.planning import Segment, StepPlan
from lightning_optkit.step.segments import PlanOutdated
from lightning_optkit.step.shards import reduce_sum_
from lightning_optkit.step.statistics import Clipped

if TYPE_CHECKING:
    from lightning_optkit.step.optimizer import OnePassOptimizer

__all__ = ["take_step"]

_Segment = TypeVar("_Segment", bound=Segment)
_T = TypeVar("_T")
_MAX_PLANS = 3  # that a step makes before it gives up: a second one serves what changed while the first was made


def take_step(optimizer: "OnePassOptimizer") -> None:
    """Updates every parameter with a gradient, unless the step is to be skipped.

    Raises:
        PlanOutdated: if parameters, state or gradients keep being moved while the step runs.
    """
    optimizer._stepped = []
    plan, bound = _bind(optimizer)
    try:
        if bound and all(isinstance(segment, CudaSegment) for segment in bound):
            _step_on_device(optimizer, plan, cast("list[CudaSegment]", bound))
        elif bound:
            _step_on_host(optimizer, plan, bound)
    finally:
        plan.release()
        if optimizer._plan is not None:
            optimizer._plan.release()


def _step_on_host(optimizer: "OnePassOptimizer", plan: StepPlan, bound: list[Segment]) -> None:
    found_inf, loss_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and float(found_inf) != 0:
        optimizer._counted = optimizer._counted.skipped(None)
        return
    unscale = scale = 1.0 if loss_scale is None else 1.0 / float(loss_scale)
    norm, coefficient = None, 1.0
    if optimizer.clip is not None and optimizer.clip.needs_norm:
        norm = _global_norm(bound, scale)
        if math.isnan(norm):
            optimizer._counted = optimizer._counted.skipped(norm)
            return
        coefficient = min(
            1.0, float(optimizer.clip.norm_bound(torch.tensor(norm, dtype=torch.float64))) / (norm + 1e-6)
        )
        scale *= coefficient
    numbers = optimizer._numbers(plan.clock + 1)

    def measure(rebound: Sequence[Segment]) -> None:
        if norm is not None and _global_norm(rebound, unscale) != norm:
            raise PlanOutdated

    def walk(segment: Segment, is_last: bool) -> Clipped:
        return segment.step(optimizer.param_groups, numbers, scale, optimizer.record_statistics)

    plan, bound, parts = _walk(optimizer, plan, bound, walk, measure)
    if not bound:
        return
    _finish(optimizer, plan, bound, numbers)
    norm_clipped, num_parts = None if norm is None else norm * coefficient, sum(part.num for part in parts)
    if num_parts:
        norm_clipped = scale * math.sqrt(sum(part.grad_sq for part in parts))
    optimizer._counted = optimizer._counted.stepped(norm, norm_clipped, clipped=coefficient < 1 or num_parts > 0)


def _step_on_device(optimizer: "OnePassOptimizer", plan: StepPlan, bound: "list[CudaSegment]") -> None:
    """The same without asking the device anything."""
    if optimizer._control is None:
        optimizer._control = DeviceControl(bound[0].entries[0].param.device)
    control = optimizer._control
    control.found_inf, control.loss_scale = (
        getattr(optimizer, "found_inf", None),
        getattr(optimizer, "grad_scale", None),
    )
    control.norm = control.max_norm = None

    def measure(segments: "Sequence[CudaSegment]") -> None:
        if optimizer.clip is not None and optimizer.clip.needs_norm:
            norms = [reduce_sum_(segment.norm_on_device(), segment.process_groups) for segment in segments]
            control.norm = norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)

    measure(bound)
    if optimizer.clip is not None and optimizer.clip.needs_norm:
        control.bound_norm_by(optimizer.clip)
        if optimizer.clip.bounds.limits_parts:
            control.clipped.zero_()
    numbers = optimizer._numbers(plan.clock + 1, control.report.device)

    def walk(segment: CudaSegment, is_last: bool) -> None:
        segment.step_on_device(
            optimizer.param_groups, numbers, control, is_last=is_last, statistics=optimizer.record_statistics
        )

    plan, bound, _ = _walk(optimizer, plan, bound, walk, measure)
    if not bound:
        return
    _finish(optimizer, plan, bound, numbers)


def _walk(
    optimizer: "OnePassOptimizer",
    plan: StepPlan,
    bound: list[_Segment],
    walk: Callable[[_Segment, bool], _T],
    measure: Callable[[Sequence[_Segment]], None],
) -> tuple[StepPlan, list[_Segment], list[_T]]:
    """Walks every segment. Plans anew where state was moved or replaced, which a segment sees before it writes.

    Args:
        optimizer: Whose segments they are.
        plan: What they were bound by.
        bound: Segments with gradients.
        walk: Given a segment, and whether it is the last one.
        measure: Called with the segments of a new plan, before they are walked.

    Returns:
        The plan and the segments that were walked, and what each walk returned.
    """
    for _ in range(_MAX_PLANS):
        try:
            if optimizer._plan is not plan:
                raise PlanOutdated
            if len(bound) > 1:  # of several none may write unless all can
                for segment in bound:
                    segment.check()
            results = [walk(segment, len(bound) == 1) for segment in bound[:1]]
        except PlanOutdated:
            plan.release()
            optimizer._plan = None
            plan, rebound = _bind(optimizer)
            bound = cast("list[_Segment]", rebound)
            measure(bound)
        else:
            return plan, bound, results + [walk(segment, segment is bound[-1]) for segment in bound[1:]]
    raise PlanOutdated


def _finish(
    optimizer: "OnePassOptimizer", plan: StepPlan, stepped: Sequence[Segment], numbers: list[GroupNumbers]
) -> None:
    optimizer._stepped = list(stepped)
    if any(segment.rule.estimate is not None for segment in stepped):
        device = stepped[0].entries[0].param.device
        sums = [reduce_sum_(segment.observed().to(device), segment.process_groups) for segment in stepped]
        optimizer._learn(torch.stack(sums).sum(0))
    plan.clock += 1
    if optimizer.average is not None:
        plan.average_idle(numbers)


def _bind(optimizer: "OnePassOptimizer") -> tuple[StepPlan, list[Segment]]:
    """The plan and its segments with gradients, pointed at them; plans anew when the plan is missing or outdated."""
    for _ in range(_MAX_PLANS):
        plan = optimizer._plan
        if plan is None:
            plan = optimizer._plan = StepPlan(optimizer)
        try:
            return plan, plan.bind()
        except PlanOutdated:
            plan.release()
            optimizer._plan = None
    raise PlanOutdated


def _global_norm(bound: Sequence[Segment], scale: float) -> float:
    """L2 norm of all gradients, times `scale`; NaN if an element is not finite."""
    squares = nonfinite = 0.0
    for segment in bound:
        sums: Sequence[float] = segment.norm()
        if segment.process_groups:
            here = torch.tensor(sums, dtype=torch.float64, device=segment.entries[0].param.device)
            sums = reduce_sum_(here, segment.process_groups).tolist()
        squares, nonfinite = squares + sums[0], nonfinite + sums[1]
    return float("nan") if nonfinite > 0 else float(scale * squares**0.5)
