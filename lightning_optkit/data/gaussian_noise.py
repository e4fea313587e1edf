# SPDX-License-Identifier: Apache-2.0
"""Normal noise added to every input.

Source: Bishop 1995, Neural Computation 7(1); names as `torchvision.transforms.v2.GaussianNoise`.
Unlike torchvision, `clip` is False by default, since standardized inputs are not in [0, 1].
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, check_in, check_tensor
from lightning_optkit.data._draws import Draws

__all__ = ["GaussianNoise"]


class GaussianNoise(nn.Module):
    """Adds independent normal noise to every number of a batch. In evaluation mode inputs are returned unchanged.

    Args:
        mean: Mean of the noise, in (-inf, inf).
        sigma: Standard deviation of the noise, in [0, inf).
        clip: Whether to clamp the result to [0, 1].
        generator: CPU generator that seeds the draws. Default: a new one seeded with 0; give each process its own.

    Raises:
        TypeError: if inputs are not floating.
        ValueError: if an argument is outside its range.

    Cost: two new batches. The noise is drawn on the device of the batch, so CPU and CUDA get different noise.

    Example:
        >>> x = torch.zeros(1000, 100)
        >>> round(float(GaussianNoise(sigma=0.5)(x).std()), 1)
        0.5
    """

    def __init__(
        self, mean: float = 0.0, sigma: float = 0.1, clip: bool = False, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.mean = check_in(type(self).__name__, "mean", mean, "(-inf, inf)")
        self.sigma = check_in(type(self).__name__, "sigma", sigma, "[0, inf)")
        check_bools(type(self).__name__, clip=clip)
        self.clip = clip
        self.draws = Draws(type(self).__name__, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Noisy `x`, any shape, floating; dtype and memory format kept."""
        if not self.training:
            return x
        check_tensor(type(self).__name__, "x", x, "floating")
        noisy = x + (self.draws.normal_like(x) * self.sigma + self.mean)
        return noisy.clamp(0, 1) if self.clip else noisy

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"mean={self.mean}, sigma={self.sigma}, clip={self.clip}"
