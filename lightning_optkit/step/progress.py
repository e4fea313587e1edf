# SPDX-License-Identifier: Apache-2.0
"""What the steps so far did as a whole."""

from typing import NamedTuple

__all__ = ["Progress"]


class Progress(NamedTuple):
    """Norms of the last step and counts of all.

    Args:
        grad_norm: Global L2 norm of the gradients, unscaled, before clipping; NaN for a skipped step; None without a
            clip that asks for it.
        grad_norm_clipped: The same after clipping.
        num_steps: Steps that updated the parameters.
        num_clipped: Those of them whose gradients were scaled down, in whole or in part.
        num_skipped: Steps left out because a gradient was not finite.
    """

    grad_norm: float | None = None
    grad_norm_clipped: float | None = None
    num_steps: int = 0
    num_clipped: int = 0
    num_skipped: int = 0

    def skipped(self, grad_norm: float | None) -> "Progress":
        """One more step was skipped."""
        return Progress(grad_norm, grad_norm, self.num_steps, self.num_clipped, self.num_skipped + 1)

    def stepped(self, grad_norm: float | None, grad_norm_clipped: float | None, *, clipped: bool) -> "Progress":
        """One more step was done."""
        return Progress(grad_norm, grad_norm_clipped, self.num_steps + 1, self.num_clipped + clipped, self.num_skipped)

    def counts(self) -> "Progress":
        """The counts alone."""
        return Progress(None, None, self.num_steps, self.num_clipped, self.num_skipped)
