# SPDX-License-Identifier: Apache-2.0
"""Runs the steps of one optimizer: binds its segments to the gradients, scales, walks, and counts."""

import math
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch

from lightning_optkit._torch_private import set_grad_enabled
from lightning_optkit.step.cuda import CudaSegment
from lightning_optkit.step.early import EarlyUpdates
from lightning_optkit.step.gradient_scale import DeviceScale, global_norm, host_scale
from lightning_optkit.step.numbers import GroupNumbers, is_due, read_group, unclipped
from lightning_optkit.step.plain import refuse_transforms
from lightning_optkit.step.planning import StepPlan
from lightning_optkit.step.progress import Progress
from lightning_optkit.step.segments import PlanOutdated, Segment
from lightning_optkit.step.shards import reduce_sum_
from lightning_optkit.step.statistics import Clipped, TensorStatistics
from lightning_optkit.step.stepped import Stepped

__all__ = ["StepEngine", "group_numbers"]

_Segment = TypeVar("_Segment", bound=Segment)
_T = TypeVar("_T")
_MAX_PLANS = 3  # plans per step before it gives up; a second one handles a change made while the first was built


def group_numbers(
    optimizer: Stepped, clock: int, num_averaged: int, device: torch.device | None = None
) -> list[GroupNumbers]:
    """The numbers of each group for optimizer step `clock`, from 1; learning rates on `device` are not read.

    The average had `num_averaged` updates before.
    """
    due = is_due(optimizer.average, clock)
    return [
        read_group(
            group,
            optimizer.clip,
            optimizer.average,
            average_is_due=due,
            num_averaged=num_averaged,
            owns_decay=optimizer._rule(group).owns_decay(group),
            device=device,
        )
        for group in optimizer.param_groups
    ]


class StepEngine:
    """What an optimizer keeps between steps: its plan, and its counts.

    It holds no reference to the optimizer, so that a copy or a conversion may take it over.

    Args:
        counted: Steps so far.
    """

    def __init__(self, counted: Progress | None = None) -> None:
        self.lock = threading.RLock()
        self.plan: StepPlan | None = None
        self.scale: DeviceScale | None = None
        self.early: EarlyUpdates | None = None
        """What the backward pass has updated, while `step_in_backward` is in place."""
        self._stepped: list[Segment] = []
        self._counted = Progress() if counted is None else counted
        self._is_stepping = False
        self._has_stepped = self._counted.num_steps > 0
        self._made_room = False
        """Whether the only step so far was at a rate of 0: torch makes room for a sharded checkpoint by such a step."""

    def step(self, optimizer: Stepped) -> None:
        """Updates every parameter with a gradient, unless the step is skipped.

        Raises:
            RuntimeError: if called inside a step of the same optimizer, or if its tensors keep being moved during the
                step.
        """
        with self.lock:
            if self._is_stepping:
                raise RuntimeError(f"{optimizer._owner}.step: called inside a step of the same optimizer.")
            refuse_transforms(optimizer._owner)
            self._is_stepping, records_gradients = True, torch.is_grad_enabled()
            set_grad_enabled(False)
            try:
                optimizer._check_changed()
                self._take(optimizer)
            except PlanOutdated:
                raise RuntimeError(
                    f"{optimizer._owner}.step: a parameter, its state or its gradient was moved or replaced while the "
                    "step ran; leave them alone until it is done."
                ) from None
            finally:
                set_grad_enabled(records_gradients)
                self._is_stepping = False

    def forget(self) -> None:
        """Discards the plan and the last step, since state or groups were replaced."""
        self.plan, self._stepped = None, []
        if self._made_room:
            self._counted, self.scale, self._has_stepped, self._made_room = Progress(), None, False, False
        if self.early is not None:
            self.early.forget()

    def close_early(self) -> None:
        """Counts the updates of a backward pass as one step."""
        if self.early is not None and self.early.current:
            self._stepped = [*self.early.current.values()]
            self._counted = self._counted.stepped(None, None, clipped=self.early.is_clipped)
            self.early.close()

    def progress(self) -> Progress:
        """Norms of the last step, and counts over all steps. Synchronizes on CUDA."""
        if self.scale is None:
            return self._counted
        norm, norm_clipped, steps, clipped, skipped = self.scale.report.tolist()
        has_norm, before = self.scale.norm is not None, self._counted
        return Progress(
            norm if has_norm else None,
            norm_clipped if has_norm else None,
            before.num_steps + int(steps),
            before.num_clipped + int(clipped),
            before.num_skipped + int(skipped),
        )

    def statistics(self) -> dict[int, TensorStatistics]:
        """The statistics of the last step, by parameter number."""
        counted: dict[int, TensorStatistics] = {}
        for segment in self._stepped:
            counted |= segment.statistics()
        return counted

    # --- one step ---

    def _take(self, optimizer: Stepped) -> None:
        self._stepped = []
        plan, bound = self._bind(optimizer)
        if self.early is not None:
            plan.clock = self.early.clock(optimizer.state)
            if optimizer.average is not None:
                plan.num_averaged = self.early.num_averaged(optimizer.state, optimizer.average)
        try:
            if bound and all(segment.steps_on_device for segment in bound):
                self._step_on_device(optimizer, plan, cast("list[CudaSegment]", bound))
            elif bound:
                self._step_on_host(optimizer, plan, bound)
            elif self.early is not None and self.early.current:
                is_clipped = self.early.is_clipped
                self._finish(optimizer, plan, [], group_numbers(optimizer, plan.clock + 1, plan.num_averaged))
                self._counted = self._counted.stepped(None, None, clipped=is_clipped)
        finally:
            if self.early is not None and self.early.current:  # the rest was skipped
                self.early.close()
            plan.release()
            if self.plan is not plan and self.plan is not None:
                self.plan.release()

    def _step_on_host(self, optimizer: Stepped, plan: StepPlan, bound: list[Segment]) -> None:
        scale = host_scale(optimizer.clip, bound, *_of_scaler(optimizer))
        if scale.is_skipped:
            self._counted = self._counted.skipped(scale.norm)
            return
        numbers = group_numbers(optimizer, plan.clock + 1, plan.num_averaged)

        def measure(rebound: Sequence[Segment]) -> None:
            if scale.norm is not None and global_norm(rebound, scale.unscale) != scale.norm:
                raise PlanOutdated

        def walk(segment: Segment, is_last: bool) -> Clipped:
            groups, statistics = optimizer.param_groups, optimizer.record_statistics
            if segment.is_left_out:
                return segment.step(groups, unclipped(numbers), scale.unscale, statistics)
            return segment.step(groups, numbers, scale.factor, statistics)

        plan, bound, parts = self._walk(optimizer, plan, bound, walk, measure)
        if not bound:
            return
        self._finish(optimizer, plan, bound, numbers)
        norm_clipped = None if scale.norm is None else scale.norm * scale.coefficient
        num_parts = sum(part.num for part in parts)
        if num_parts:
            norm_clipped = scale.factor * math.sqrt(sum(part.grad_sq for part in parts))
        is_clipped = scale.coefficient < 1 or num_parts > 0
        self._counted = self._counted.stepped(scale.norm, norm_clipped, clipped=is_clipped)

    def _step_on_device(self, optimizer: Stepped, plan: StepPlan, bound: list[CudaSegment]) -> None:
        """The same without synchronizing with the device."""
        if self.scale is None:
            self.scale = DeviceScale(bound[0].entries[0].param.device)
        scale, clip = self.scale, optimizer.clip
        scale.begin(*_of_scaler(optimizer))

        def measure(segments: Sequence[CudaSegment]) -> None:
            if clip is not None and clip.needs_norm:
                norms = [reduce_sum_(segment.norm_on_device(), segment.process_groups) for segment in segments]
                for segment, norm in zip(segments, norms, strict=True):
                    if segment.is_left_out:
                        norm[0] = 0.0  # it is read for what is not finite alone
                scale.norm = norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)

        measure(bound)
        if clip is not None and clip.needs_norm:
            scale.bound_norm_by(clip, is_clipped=not all(segment.is_left_out for segment in bound))
        numbers = group_numbers(optimizer, plan.clock + 1, plan.num_averaged, scale.report.device)

        def walk(segment: CudaSegment, is_last: bool) -> None:
            groups, statistics = optimizer.param_groups, optimizer.record_statistics
            rows = unclipped(numbers) if segment.is_left_out else numbers
            segment.step_on_device(groups, rows, scale, is_last=is_last, statistics=statistics)

        plan, bound, _ = self._walk(optimizer, plan, bound, walk, measure)
        if bound:
            self._finish(optimizer, plan, bound, numbers)

    def _walk(
        self,
        optimizer: Stepped,
        plan: StepPlan,
        bound: list[_Segment],
        walk: Callable[[_Segment, bool], _T],
        measure: Callable[[Sequence[_Segment]], None],
    ) -> tuple[StepPlan, list[_Segment], list[_T]]:
        """Walks every segment. Rebuilds the plan if state was moved or replaced, which is detected before a write.

        Args:
            optimizer: The owner of the segments.
            plan: The plan that bound them.
            bound: Segments with gradients.
            walk: Called with a segment and whether it is the last one.
            measure: Called with the segments of a rebuilt plan, before they are walked.

        Returns:
            The plan, the segments that were walked, and the result of each walk.
        """
        for _ in range(_MAX_PLANS):
            try:
                if self.plan is not plan:
                    raise PlanOutdated
                if len(bound) > 1:  # none of several may write unless all can
                    for segment in bound:
                        segment.check()
                results = [walk(segment, len(bound) == 1) for segment in bound[:1]]
            except PlanOutdated:
                plan.release()
                self.plan = None
                plan, rebound = self._bind(optimizer)
                bound = cast("list[_Segment]", rebound)
                measure(bound)
            else:
                return plan, bound, results + [walk(segment, segment is bound[-1]) for segment in bound[1:]]
        raise PlanOutdated

    def _finish(
        self, optimizer: Stepped, plan: StepPlan, stepped: Sequence[Segment], numbers: list[GroupNumbers]
    ) -> None:
        self._stepped = [*stepped, *(self.early.current.values() if self.early is not None else ())]
        self._made_room = not self._has_stepped and all(number.lr == 0 for number in numbers)
        self._has_stepped = True
        if any(segment.rule.estimate is not None for segment in stepped):
            device = stepped[0].entries[0].param.device
            sums = [reduce_sum_(segment.observed().to(device), segment.process_groups) for segment in stepped]
            optimizer._learn(torch.stack(sums).sum(0))
        plan.clock += 1
        if optimizer.average is not None:
            plan.average_idle(optimizer, numbers, () if self.early is None else self.early.current)
            plan.num_averaged += int(is_due(optimizer.average, plan.clock))
        if self.early is not None:
            self.early.close()

    def _bind(self, optimizer: Stepped) -> tuple[StepPlan, list[Segment]]:
        """The plan and its segments that have gradients, bound to them; rebuilds a plan that is missing or outdated."""
        for _ in range(_MAX_PLANS):
            try:
                plan = self.plan
                if plan is None:
                    plan = self.plan = StepPlan(optimizer)
                return plan, plan.bind(optimizer)
            except PlanOutdated:
                if self.plan is not None:
                    self.plan.release()
                self.plan = None
        raise PlanOutdated


def _of_scaler(optimizer: Stepped) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`found_inf` and scale, which a GradScaler sets as attributes during `step`."""
    return getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
