# SPDX-License-Identifier: Apache-2.0
"""Batch normalization by the statistics of small parts of the batch.

Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better: closing the generalization gap in large batch
training of neural networks" (arXiv 1705.08741), algorithm 1. Differs: the running statistics move once per batch, by
`momentum` towards the mean over the ghost batches, as they do in torch; the paper moves them once per ghost batch.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_int
from lightning_optkit.layers._ghost import check_batch, check_batch_norm, ghost_batch_norm

__all__ = ["GhostBatchNorm2d"]


class GhostBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that normalizes every `ghost_batch_size` samples by themselves in training.

    A large batch then keeps the noise of small ones. The last ghost batch holds the rest, of any size; a rest with a
    single value per channel joins the one before it. In evaluation mode it is torch's BatchNorm, and so is its state
    dict.

    Args:
        num_features: As torch's.
        eps: As torch's.
        momentum: As torch's; per batch, however many ghost batches it has.
        affine: As torch's.
        track_running_stats: As torch's.
        device: As torch's.
        dtype: As torch's.
        ghost_batch_size: Samples that are normalized together, >= 1.

    Raises:
        TypeError: if `ghost_batch_size` is not an integer.
        ValueError: if it is smaller than 1; in `forward`, if a ghost batch has one value per channel.

    Example:
        >>> layer = GhostBatchNorm2d(3, ghost_batch_size=4)
        >>> y = layer(torch.randn(8, 3, 5, 5))
        >>> bool(y[:4].mean((0, 2, 3)).abs().max() < 1e-6)
        True
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        ghost_batch_size: int = 128,
    ) -> None:
        check_batch_norm(type(self).__name__, num_features, eps, momentum, affine, track_running_stats, device, dtype)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.ghost_batch_size = check_int(type(self).__name__, "ghost_batch_size", ghost_batch_size, minimum=1)

    def forward(self, input: Tensor) -> Tensor:
        """The normalized input, in its shape."""
        check_batch(type(self).__name__, input, self.num_features, (4,))
        if not self.training:
            return super().forward(input)
        return ghost_batch_norm(self, input, self.ghost_batch_size)

    def extra_repr(self) -> str:
        """As torch prints it, and the size of the ghost batches."""
        return f"{super().extra_repr()}, ghost_batch_size={self.ghost_batch_size}"  # type: ignore[no-untyped-call]
