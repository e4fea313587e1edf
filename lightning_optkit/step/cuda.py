# SPDX-License-Identifier: Apache-2.0
"""Parameters walked by a compiled plan on CUDA. Values known only to the device stay there."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_optkit.step.compiled import CompiledSegment
from lightning_optkit.step.gradient_scale import DeviceScale
from lightning_optkit.step.numbers import GroupNumbers
from lightning_optkit.step.rule import Group
from lightning_optkit.step.shards import reduce_sum_
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = ["CudaSegment"]

_SUMS, _STATISTICS = 7, 5  # doubles in Sums of csrc/core/tables.h, and how many of them are statistics


class CudaSegment(CompiledSegment):
    """As on CPU, and with `step_on_device`, which reads its scalars from device memory."""

    steps_on_device: ClassVar[bool] = True

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
        scale_: DeviceScale,
        *,
        is_last: bool,
        statistics: bool,
    ) -> None:
        """Updates the bound parameters. Only the last segment of a step advances the counters in the report."""
        self._launch(groups, numbers, scale_, scale=1.0, counts=is_last, statistics=statistics)

    def norm(self) -> tuple[float, float]:
        """The same on the host, which synchronizes. Used only when the step also has a reference segment."""
        squares, nonfinite = reduce_sum_(self.norm_on_device(), self.process_groups).tolist()
        return squares, nonfinite

    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        """The same with a factor known to the host, which synchronizes."""
        scale_ = DeviceScale(self._device)
        self._launch(groups, numbers, scale_, scale=grad_scale, counts=False, statistics=statistics)
        return Clipped(*scale_.clipped.tolist())

    def statistics(self) -> dict[int, TensorStatistics]:
        """By parameter number. Synchronizes."""
        rows = self._sums[:, :_STATISTICS].tolist()
        return {self.entries[i].tensor_index: TensorStatistics(*rows[i]) for i in self._active.places}

    def observed(self) -> Tensor:
        """Without synchronizing; zeros in a skipped step."""
        return self._sums[:, _STATISTICS:].sum(0)

    @property
    def _device(self) -> torch.device:
        return self._params[0].device

    @property
    def _stream(self) -> int:
        stream: int = torch.cuda.current_stream(self._device).cuda_stream
        return stream

    def _rate_on_device(self, lr: object) -> Tensor | None:
        """A learning rate tensor on the device is read there, so that a captured graph sees its changes."""
        lives_there = isinstance(lr, Tensor) and lr.device == self._device
        return lr.detach().to(torch.float64) if lives_there else None  # type: ignore[attr-defined]

    def _launch(
        self,
        groups: Sequence[Group],
        numbers: Sequence[GroupNumbers],
        scale_: DeviceScale,
        *,
        scale: float,
        counts: bool,
        statistics: bool,
    ) -> None:
        # Kept until the next step, so that the allocator does not reuse them before the kernels have read them.
        self._rates = [self._rate_on_device(group["lr"]) for group in groups]
        estimate = self.rule.estimate
        counts_sums = statistics or estimate is not None
        if counts_sums:
            self._sums = torch.zeros(len(self.entries), _SUMS, dtype=torch.float64, device=self._device)
        self._walk(
            self._plan.cuda_step,
            rows=self._rows(groups, numbers),
            rates=self._rates,
            norm=scale_.norm,
            loss_scale=self._number(scale_.loss_scale),
            found_inf=self._number(scale_.found_inf),
            scale=scale,
            max_norm=None if self.is_left_out else scale_.max_norm,
            max_norm_value=math.inf if self.is_left_out else scale_.max_norm_value,
            estimate=None if estimate is None else estimate.value(groups[0]),
            report=scale_.report,
            clipped=scale_.clipped,
            counts_report=counts,
            statistics=self._sums if counts_sums else None,
            stream=self._stream,
        )
        self._mark_written()

    def _number(self, given: Tensor | None) -> Tensor | None:
        """A number of a GradScaler in the form that the plan reads."""
        return None if given is None else given.to(self._device, torch.float32)
