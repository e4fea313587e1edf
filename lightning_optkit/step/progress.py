# SPDX-License-Identifier: Apache-2.0
"""Norms and counts of the steps so far."""

from typing import NamedTuple

__all__ = ["Progress"]


class Progress(NamedTuple):
    """Norms of the last step, and counts over all steps.

    Args:
        grad_norm: Global L2 norm of the gradients, unscaled, before clipping; NaN for a skipped step; None if the clip
            does not need it.
        grad_norm_clipped: The same after clipping.
        num_steps: Steps that updated the parameters.
        num_clipped: Those whose gradients were scaled down, at least partly.
        num_skipped: Steps skipped because a gradient was not finite.
    """

    grad_norm: float | None = None
    grad_norm_clipped: float | None = None
    num_steps: int = 0
    num_clipped: int = 0
    num_skipped: int = 0

    def skipped(self, grad_norm: float | None) -> "Progress":
        """After one more skipped step."""
        return Progress(grad_norm, grad_norm, self.num_steps, self.num_clipped, self.num_skipped + 1)

    def stepped(self, grad_norm: float | None, grad_norm_clipped: float | None, *, clipped: bool) -> "Progress":
        """After one more completed step."""
        return Progress(grad_norm, grad_norm_clipped, self.num_steps + 1, self.num_clipped + clipped, self.num_skipped)

    def counts(self) -> "Progress":
        """The counts alone."""
        return Progress(None, None, self.num_steps, self.num_clipped, self.num_skipped)
