# SPDX-License-Identifier: Apache-2.0
"""Clips the global norm at a percentile of the past norms.

Source: Seetharaman et al. 2020, "AutoClip: adaptive gradient clipping for source separation networks",
arXiv:2007.14469, Algorithm 1. Unlike the paper, it keeps the last `window` norms instead of all.
"""

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_int
from lightning_optkit.clipping._gradients import scale_to_bound_
from lightning_optkit.step import Clip, ClipBounds
from lightning_optkit.step.clip import NO_BOUNDS
from lightning_optkit.step.coefficients import exact_bound
from lightning_optkit.step.saved import saved_dict, saved_floats, saved_number, saved_tensor

__all__ = ["AutoClip"]


class AutoClip(Clip):
    """Scales all gradients by one factor, so that their global L2 norm is at most a percentile of its history.

    There is no absolute threshold to tune: with `percentile=10`, nine steps out of ten are scaled to the 10th
    percentile of the norms. Non-finite norms do not enter the history.

    Each optimizer needs its own instance, since it is stateful. Its state is saved in the state dict of a one-pass
    optimizer, under "clip".

    Args:
        percentile: Percentile of the norms that is the bound, in [0, 100]. One between 0 and 1 is warned of, since it
            was likely meant as a fraction.
        window: Number of latest norms that count, this one included; at least 1.

    Raises:
        ValueError: for an argument out of range.

    Cost: as part of a step, one read of the gradients and no write.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> clip = AutoClip(percentile=50)
        >>> for size in (1.0, 1.0, 100.0):
        ...     weight.grad = torch.full((1,), size)
        ...     norm = clip([weight])
        >>> weight.grad
        tensor([1.])
    """

    def __init__(self, percentile: float = 10.0, window: int = 1000) -> None:
        self.percentile = check_in(type(self).__name__, "percentile", percentile, "[0, 100]")
        self.window = check_int(type(self).__name__, "window", window, minimum=1)
        if 0 < percentile < 1:
            warnings.warn(
                f"AutoClip(percentile={percentile:g}): percentiles go to 100, so the bound is almost the smallest norm "
                f"of the window; if a fraction was meant, say percentile={100 * percentile:g}.",
                stacklevel=2,
            )
        self._history = torch.full((window,), math.nan, dtype=torch.float64)  # NaN: empty
        self._seen = torch.zeros((), dtype=torch.int64)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(percentile={self.percentile:g}, window={self.window})"

    @property
    def needs_norm(self) -> bool:
        """True: the bound depends on the global norm."""
        return True

    @property
    def bounds(self) -> ClipBounds:
        """None besides the global norm."""
        return NO_BOUNDS

    def norm_bound(self, norm: Tensor) -> Tensor:
        """The percentile of the history, `norm` included; 0-d, on the device of `norm`."""
        self._history, self._seen = self._history.to(norm.device), self._seen.to(norm.device)
        place = (self._seen % self.window).reshape(1)
        is_finite = norm.isfinite()
        value = torch.where(is_finite, norm.to(torch.float64), self._history[place])
        self._history = self._history.index_copy(0, place, value.reshape(1))
        self._seen = self._seen + is_finite
        return torch.nanquantile(self._history, self.percentile / 100.0)

    def __call__(self, parameters: Iterable[Tensor]) -> Tensor:
        """Clips the gradients of `parameters` in place, for use with any other optimizer.

        Returns:
            Their norm before clipping, 0-d.
        """
        return scale_to_bound_(type(self).__name__, parameters, lambda norm: exact_bound(self.norm_bound(norm), norm))

    def state_dict(self) -> dict[str, Any]:
        """`history`, of shape (window,) with NaN for empty entries, and `seen`, the total number of norms."""
        return {"history": self._history.clone(), "seen": self._seen.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state.

        Of a history of another length it keeps the latest norms, as many as there is room for.

        Raises:
            TypeError: if it is not a dict of tensors; nothing is changed then.
            ValueError: if it is not from an AutoClip; nothing is changed then.
        """
        what = f"{type(self).__name__}.load_state_dict(state_dict=...):"
        saved = saved_dict(what, state_dict, ("history", "seen"))
        history = saved_tensor(f"{what} 'history'", saved["history"])
        length = max(len(history), 1) if history.ndim == 1 else self.window
        history = saved_floats(f"{what} 'history'", history, (length,), torch.float64, may_be_nan=True)
        seen = saved_number(f"{what} 'seen'", saved["seen"], torch.int64).to(history.device)
        unseen = torch.arange(length, device=history.device) >= seen
        if not torch.equal(history.isnan(), unseen):
            raise ValueError(
                f"{what} 'history' must hold the latest of the {int(seen)} norms 'seen', and NaN elsewhere."
            )
        self._history, self._seen = (history, seen) if length == self.window else self._fitted(history, seen)

    def _fitted(self, history: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """The latest norms of a history of another length, the oldest of them first, and their number."""
        so_far = int(seen)
        in_order = history.roll(-(so_far % len(history))) if so_far > len(history) else history[:so_far]
        latest = in_order[-self.window :]
        fitted = history.new_full((self.window,), math.nan)
        fitted[: len(latest)] = latest
        return fitted, seen.new_tensor(len(latest))
