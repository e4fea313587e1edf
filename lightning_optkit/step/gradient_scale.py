# SPDX-License-Identifier: Apache-2.0
"""The factor of a step's gradients. The order is the same on every path: unscale, take the norm, clip."""

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_optkit.step.clip import Clip, StatefulClip
from lightning_optkit.step.coefficients import clip_coefficient, exact_bound
from lightning_optkit.step.segments import Segment

__all__ = ["DeviceScale", "HostScale", "global_norm", "host_scale"]


class HostScale(NamedTuple):
    """The factor of one step, computed on the host.

    Args:
        unscale: 1 / loss scale.
        coefficient: Coefficient of clipping by the global norm.
        norm: Global norm after unscaling; NaN if an element is not finite; None if the clip does not need it.
        is_skipped: Whether the step is skipped because a gradient is not finite.
    """

    unscale: float
    coefficient: float
    norm: float | None
    is_skipped: bool

    @property
    def factor(self) -> float:
        """The factor of every gradient."""
        return self.unscale * self.coefficient


@cache
def _is_stateful(clip: type[Clip]) -> bool:
    return issubclass(clip, StatefulClip)  # takes 11 us, since it is a Protocol


_AS_THEY_ARE = HostScale(1.0, 1.0, None, is_skipped=False)


def host_scale(
    clip: Clip | None, segments: Sequence[Segment], found_inf: Tensor | None, loss_scale: Tensor | None
) -> HostScale:
    """Computes the norm of the gradients of `segments` and asks the clip for its bound.

    Args:
        clip: The clip folded into the step.
        segments: Segments bound to their gradients.
        found_inf: That of a GradScaler, if there is one.
        loss_scale: That of a GradScaler, if there is one.
    """
    needs_norm = clip is not None and clip.needs_norm
    if found_inf is None and loss_scale is None and not needs_norm:
        return _AS_THEY_ARE
    unscale = 1.0 if loss_scale is None else 1.0 / float(loss_scale)
    if found_inf is not None and float(found_inf) != 0:
        return HostScale(unscale, 1.0, None, is_skipped=True)
    if clip is None or not needs_norm:
        return HostScale(unscale, 1.0, None, is_skipped=False)
    norm = global_norm(segments, unscale)
    if math.isnan(norm):
        return HostScale(unscale, 1.0, norm, is_skipped=True)
    if all(segment.is_left_out for segment in segments):
        return HostScale(unscale, 1.0, norm, is_skipped=False)  # there is no norm to learn from
    bound = getattr(clip, "constant_bound", None)  # the tensor alone takes 4 us
    if bound is None:
        bound = float(clip.norm_bound(torch.tensor(norm, dtype=torch.float64, device="cpu")))
    if math.isnan(bound):
        raise ValueError(f"{type(clip).__name__}.norm_bound: returned nan for a norm of {norm:g}; it must be a number.")
    bound = exact_bound(bound, norm) if _is_stateful(type(clip)) else bound
    return HostScale(unscale, clip_coefficient(bound, norm), norm, is_skipped=False)


def global_norm(segments: Sequence[Segment], unscale: float) -> float:
    """L2 norm of the gradients that are clipped, times `unscale`; NaN if an element of any gradient is not finite."""
    squares = nonfinite = 0.0
    for segment in segments:
        more, others = segment.norm()
        squares, nonfinite = squares + (0.0 if segment.is_left_out else more), nonfinite + others
    return float("nan") if nonfinite > 0 else float(unscale * squares**0.5)


class DeviceScale:
    """The same on the device: the kernels compute it (csrc/cuda/step.cuh), and the host never waits for it.

    Args:
        device: The CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.report = torch.zeros(5, dtype=torch.float64, device=device)
        """Norm after unscaling, the same after clipping, steps, clipped steps, skipped steps."""
        self.clipped = torch.zeros(2, dtype=torch.float64, device=device)
        """Result of clipping by tensor or by unit in this step: `Clipped` of csrc/core/tables.h."""
        self.norm: Tensor | None = None
        self.loss_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.max_norm: Tensor | None = None
        self.max_norm_value = math.inf
        """Bound of the norm where `max_norm` is None."""

    def begin(self, found_inf: Tensor | None, loss_scale: Tensor | None) -> None:
        """Starts a step; both arguments are those of a GradScaler, if there is one."""
        self.found_inf, self.loss_scale = found_inf, loss_scale
        self.norm = self.max_norm = None

    def bound_norm_by(self, clip: Clip, *, is_clipped: bool) -> None:
        """Asks the clip for this step's bound of the norm, unless it leaves every gradient out."""
        assert self.norm is not None
        if not is_clipped:
            bound: Tensor | float = math.inf
        elif _is_stateful(type(clip)):
            norm = self._unscaled_norm()
            bound = exact_bound(clip.norm_bound(norm), norm)
        else:
            bound = clip.norm_bound(self.norm[0])
        if isinstance(bound, Tensor):
            self.max_norm, self.max_norm_value = bound.to(torch.float64), math.inf
        else:
            self.max_norm, self.max_norm_value = None, bound
        if clip.bounds.limits_parts:
            self.clipped.zero_()

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
