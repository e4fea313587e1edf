# SPDX-License-Identifier: Apache-2.0
"""Parameters walked by a compiled plan on CUDA. What is known only there stays there: nothing waits for the device."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit.step.compiled import CompiledSegment
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.rule import Clip, Group, LearningClip
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = ["CudaSegment", "DeviceControl"]

_SUMS, _STATISTICS = 7, 5  # doubles in Sums of csrc/core/tables.h, and those that are statistics


class DeviceControl:
    """What the segments of one step share on the device.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.report = torch.zeros(5, dtype=torch.float64, device=device)
        """Norm after unscaling, the same after clipping, steps, clipped steps, skipped steps."""
        self.clipped = torch.zeros(2, dtype=torch.float64, device=device)
        """What clipping by tensor or by unit left in this step: `Clipped` of csrc/core/tables.h."""
        self.norm: Tensor | None = None
        self.loss_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.max_norm: Tensor | None = None
        self.max_norm_value = math.inf
        """Bound of the norm where `max_norm` is None."""

    def bound_norm_by(self, clip: Clip) -> None:
        """Asks the clip for this step's bound of the norm."""
        assert self.norm is not None
        bound = clip.norm_bound(self._unscaled_norm() if isinstance(clip, LearningClip) else self.norm[0])
        if isinstance(bound, Tensor):
            self.max_norm, self.max_norm_value = bound.to(torch.float64), math.inf
        else:
            self.max_norm, self.max_norm_value = None, bound

    def _unscaled_norm(self) -> Tensor:
        """NaN in a step that will be skipped."""
        assert self.norm is not None
        norm = self.norm[0].sqrt()
        if self.loss_scale is not None:
            norm = norm / self.loss_scale.reshape(())
        is_skipped = self.norm[1] > 0
        if self.found_inf is not None:
            is_skipped = is_skipped | (self.found_inf.reshape(()) > 0)
        return torch.where(is_skipped, torch.nan, norm)


class CudaSegment(CompiledSegment):
    """As on CPU; `step_on_device` besides, which takes its scalars from device memory."""

    def _device_number(self, param: Tensor) -> int:
        number: int = param.device.index
        return number

    def norm_on_device(self) -> Tensor:
        """Sum of squares and number of non-finite elements of the gradients, shape (2,), fp64, on the device."""
        norm = torch.empty(2, dtype=torch.float64, device=self._device)
        self._walk(self._plan.cuda_norm, norm, self._stream)
        return norm

    def step_on_device(
        self,
        groups: Sequence[Group],
        numbers: Sequence[GroupNumbers],
        control: DeviceControl,
        *,
        is_last: bool,
        statistics: bool,
    ) -> None:
        """Updates the bound parameters; only the last segment of a step advances the counters in the report."""
        self._launch(groups, numbers, control, scale=1.0, counts=is_last, statistics=statistics)

    def norm(self) -> tuple[float, float]:
        """The same on the host: waits for the device. Only for steps shared with a reference segment."""
        squares, nonfinite = self.norm_on_device().tolist()
        return squares, nonfinite

    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        """The same with a factor known to the host: waits for the device."""
        control = DeviceControl(self._device)
        self._launch(groups, numbers, control, scale=grad_scale, counts=False, statistics=statistics)
        return Clipped(*control.clipped.tolist())

    def statistics(self) -> dict[int, TensorStatistics]:
        """By number of the parameter. Waits for the device."""
        rows = self._sums[:, :_STATISTICS].tolist()
        return {self.entries[i].tensor_index: TensorStatistics(*rows[i]) for i in self._active.places}

    def observed(self) -> Tensor:
        """The same without waiting; zeros in a step that is skipped."""
        return self._sums[:, _STATISTICS:].sum(0)

    @property
    def _device(self) -> torch.device:
        return self._params[0].device

    @property
    def _stream(self) -> int:
        stream: int = torch.cuda.current_stream(self._device).cuda_stream
        return stream

    def _rate_on_device(self, lr: object) -> Tensor | None:
        """A learning rate that lives on the device is read there, so that a captured graph sees it change."""
        lives_there = isinstance(lr, Tensor) and lr.device == self._device
        return lr.detach().to(torch.float64) if lives_there else None  # type: ignore[attr-defined]

    def _launch(
        self,
        groups: Sequence[Group],
        numbers: Sequence[GroupNumbers],
        control: DeviceControl,
        *,
        scale: float,
        counts: bool,
        statistics: bool,
    ) -> None:
        # Kept until the next step, so that the allocator does not hand them out before the kernels have read them.
        self._rates = [self._rate_on_device(group["lr"]) for group in groups]
        estimate = self.rule.estimate
        counts_sums = statistics or estimate is not None
        if counts_sums:
            self._sums = torch.zeros(len(self.entries), _SUMS, dtype=torch.float64, device=self._device)
        self._walk(
            self._plan.cuda_step,
            rows=self._rows(groups, numbers),
            rates=self._rates,
            norm=control.norm,
            loss_scale=self._number(control.loss_scale),
            found_inf=self._number(control.found_inf),
            scale=scale,
            max_norm=control.max_norm,
            max_norm_value=control.max_norm_value,
            estimate=None if estimate is None else estimate.value(groups[0]),
            report=control.report,
            clipped=control.clipped,
            counts_report=counts,
            statistics=self._sums if counts_sums else None,
            stream=self._stream,
        )
        self._mark_written()

    def _number(self, given: Tensor | None) -> Tensor | None:
        """A number of a GradScaler as the plan reads it."""
        return None if given is None else given.to(self._device, torch.float32)
