# SPDX-License-Identifier: Apache-2.0
"""Clips the global norm if it is far outside its recent distribution: only spikes.

Source: Kumar et al. 2025, "ZClip: adaptive spike mitigation for LLM pre-training", arXiv:2504.02507.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_optkit._checks import check_bools, check_in, check_int
from lightning_optkit.clipping._gradients import scale_to_bound_
from lightning_optkit.step import Clip, ClipBounds
from lightning_optkit.step.clip import NO_BOUNDS
from lightning_optkit.step.coefficients import exact_bound
from lightning_optkit.step.saved import saved_dict, saved_floats

__all__ = ["ZClip"]


class ZClip(Clip):
    """Scales all gradients by one factor if the z-score of their global L2 norm exceeds `z_threshold`.

    Mean and variance of the norm are exponential averages. With z = (norm - mean) / std above the threshold, the norm
    is scaled to mean + z_threshold^2 / z * std: the larger the spike, the closer to the mean. The averages are updated
    with the norm after clipping. Non-finite norms do not enter them.

    Each optimizer needs its own instance, since it is stateful. Its state is saved in the state dict of a one-pass
    optimizer, under "clip".

    The `max_norm` and `skip_update_on_spike` are those of the authors' code, github.com/bluorion-com/ZClip.

    Args:
        z_threshold: Largest unclipped z-score, in (0, inf).
        alpha: Decay rate of the mean and variance, in [0, 1).
        warmup_steps: Number of norms from which the initial mean and variance are computed, without clipping; at least
            2.
        max_norm: Outer bound of the norm, in (0, inf), also during the warm-up. Mean and variance learn from the norm
            without this bound. None: no such bound.
        skip_update_on_spike: Whether mean and variance leave out the norms that were clipped as spikes, instead of
            learning from their bound. A lasting rise of the norms is then clipped for good.

    Raises:
        ValueError: for an argument out of range.

    Cost: as part of a step, one read of the gradients and no write.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> clip = ZClip(z_threshold=2.0, warmup_steps=2)
        >>> for size in (1.0, 3.0, 10.0):  # mean 2, standard deviation 1; then z = 8
        ...     weight.grad = torch.full((1,), size)
        ...     norm = clip([weight])
        >>> weight.grad  # 2 + 2^2 / 8 * 1
        tensor([2.5000])
    """

    def __init__(
        self,
        z_threshold: float = 2.5,
        alpha: float = 0.97,
        warmup_steps: int = 25,
        max_norm: float | None = None,
        skip_update_on_spike: bool = False,
    ) -> None:
        self.z_threshold = check_in(type(self).__name__, "z_threshold", z_threshold, "(0, inf)")
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "[0, 1)")
        self.warmup_steps = check_int(type(self).__name__, "warmup_steps", warmup_steps, minimum=2)
        self.max_norm = None if max_norm is None else check_in(type(self).__name__, "max_norm", max_norm, "(0, inf)")
        check_bools(type(self).__name__, skip_update_on_spike=skip_update_on_spike)
        self.skip_update_on_spike = skip_update_on_spike
        self._learned = torch.zeros(3, dtype=torch.float64)  # mean, variance, number of norms

    def __repr__(self) -> str:
        # Part of the key of a callback's state in a checkpoint, so that it must not change with every new argument.
        shown = f"z_threshold={self.z_threshold:g}, alpha={self.alpha:g}, warmup_steps={self.warmup_steps}"
        shown += "" if self.max_norm is None else f", max_norm={self.max_norm:g}"
        shown += ", skip_update_on_spike=True" if self.skip_update_on_spike else ""
        return f"{type(self).__name__}({shown})"

    @property
    def needs_norm(self) -> bool:
        """True: the bound depends on the global norm."""
        return True

    @property
    def bounds(self) -> ClipBounds:
        """None besides the global norm."""
        return NO_BOUNDS

    def norm_bound(self, norm: Tensor) -> Tensor:
        """The bound of this step, 0-d, on the device of `norm`; inf for no clipping."""
        self._learned = self._learned.to(norm.device)
        mean, variance, seen = self._learned.unbind()
        norm = norm.to(torch.float64)
        std = variance.sqrt()
        z = (norm - mean) / std  # infinite where all norms were equal: the bound is their mean
        is_spike = (seen >= self.warmup_steps) & (z > self.z_threshold)
        bound = torch.where(is_spike, mean + self.z_threshold**2 / z * std, torch.inf)
        learned = self._learn(torch.minimum(norm, bound), mean, variance, seen)
        learns = norm.isfinite() & ~is_spike if self.skip_update_on_spike else norm.isfinite()
        self._learned = torch.where(learns, learned, self._learned)
        return bound if self.max_norm is None else bound.clamp(max=self.max_norm)

    def _learn(self, norm: Tensor, mean: Tensor, variance: Tensor, seen: Tensor) -> Tensor:
        kept = torch.where(seen < self.warmup_steps, seen / (seen + 1), self.alpha)
        new_mean = kept * mean + (1 - kept) * norm
        # Welford's update during warmup, so that the initial variance is exact.
        deviation = torch.where(seen < self.warmup_steps, (norm - mean) * (norm - new_mean), (norm - new_mean).square())
        return torch.stack([new_mean, kept * variance + (1 - kept) * deviation, seen + 1])

    def __call__(self, parameters: Iterable[Tensor]) -> Tensor:
        """Clips the gradients of `parameters` in place, for use with any other optimizer.

        Returns:
            Their norm before clipping, 0-d.
        """
        return scale_to_bound_(type(self).__name__, parameters, lambda norm: exact_bound(self.norm_bound(norm), norm))

    def state_dict(self) -> dict[str, Any]:
        """`learned`, of shape (3,): mean, variance, and number of norms."""
        return {"learned": self._learned.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state.

        Raises:
            TypeError: if it is not a dict of tensors; nothing is changed then.
            ValueError: if it is not from a ZClip; nothing is changed then.
        """
        what = f"{type(self).__name__}.load_state_dict(state_dict=...):"
        saved = saved_dict(what, state_dict, ("learned",))
        self._learned = saved_floats(f"{what} 'learned'", saved["learned"], (3,), torch.float64)
