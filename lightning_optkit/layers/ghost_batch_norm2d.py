# SPDX-License-Identifier: Apache-2.0
"""Batch normalization with the statistics of small parts of the batch.

Source: Hoffer, Hubara & Soudry 2017, "Train longer, generalize better: closing the generalization gap in large batch
training of neural networks" (arXiv 1705.08741), algorithm 1. Unlike the paper, which updates the running statistics
once per ghost batch, they are updated once per batch, as in torch: by `momentum` toward the mean over the ghost
batches.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_int
from lightning_optkit.layers._ghost import check_batch, check_batch_norm, ghost_batch_norm

__all__ = ["GhostBatchNorm2d"]


class GhostBatchNorm2d(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` that normalizes every `ghost_batch_size` samples separately in training.

    This keeps the noise of small batches in a large one. The last ghost batch holds the remainder, of any size; a
    remainder with a single value per channel is merged into the previous one. Evaluation mode and state dict are those
    of torch's BatchNorm. `Trainer(sync_batchnorm=True)` replaces it by `SyncBatchNorm`, as every BatchNorm, without a
    word: leave that off.

    Args:
        num_features: See torch.
        eps: See torch.
        momentum: See torch; per batch, whatever the number of ghost batches.
        affine: See torch.
        track_running_stats: See torch.
        device: See torch.
        dtype: See torch.
        ghost_batch_size: Samples normalized together, >= 1.

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
        """Returns the normalized input."""
        check_batch(type(self).__name__, input, self.num_features, (4,))
        if not self.training:
            return super().forward(input)
        return ghost_batch_norm(self, input, self.ghost_batch_size)

    def extra_repr(self) -> str:
        """That of torch, and the size of the ghost batches."""
        return f"{super().extra_repr()}, ghost_batch_size={self.ghost_batch_size}"  # type: ignore[no-untyped-call]
