# SPDX-License-Identifier: Apache-2.0
"""CutMix: a rectangle of another image pasted into every image, targets mixed by area.

Source: Yun et al. 2019, arXiv:1905.04899; one rectangle per batch, as there.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in, check_int
from lightning_optkit.data._draws import Draws
from lightning_optkit.data._images import check_image_batch
from lightning_optkit.data._targets import check_pairs, mixed_targets

__all__ = ["CutMix"]


class CutMix(nn.Module):
    r"""Pastes a rectangle of another image of the batch into every image.

    .. math:: \tilde x = M \odot x_i + (1 - M) \odot x_j, \quad \tilde y = \lambda y_i + (1 - \lambda) y_j

    The rectangle has sides W sqrt(1 - lambda') and H sqrt(1 - lambda') with lambda' from Beta(alpha, alpha), a uniform
    center, and is cut at the border; lambda is the exact fraction of pixels that are kept. In evaluation mode inputs
    and targets are returned unchanged.

    Args:
        alpha: Parameter of the Beta distribution, in (0, inf); 1, as in the paper, draws areas uniformly.
        num_classes: Number of classes, needed if targets are class indices, in [1, inf).
        generator: CPU generator of the draws. Default: a new one seeded with 0; give each process its own.

    Raises:
        TypeError: if inputs are not a real tensor.
        ValueError: if an argument is outside its range, or targets do not fit the inputs.

    Cost: one new batch.

    Example:
        >>> images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
        >>> inputs, targets = CutMix(num_classes=2)(images, torch.tensor([0, 1]))
        >>> torch.equal(inputs.mean(dim=(1, 2, 3)), targets[:, 1])
        True
    """

    def __init__(
        self, alpha: float = 1.0, *, num_classes: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "(0, inf)")
        self.num_classes = (
            None if num_classes is None else check_int(type(self).__name__, "num_classes", num_classes, minimum=1)
        )
        self.draws = Draws(type(self).__name__, generator)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Images with a pasted rectangle (dtype, shape and memory format kept) and mixed targets.

        Args:
            inputs: Images, shape (N, C, H, W), any real dtype.
            targets: Class indices (N,), which become soft targets (N, num_classes) in the default dtype; or soft
                targets (N, C) or numbers (N,), mixed in their dtype.
        """
        if not self.training:
            return inputs, targets
        check_image_batch(type(self).__name__, inputs, "inputs")
        check_pairs(type(self).__name__, inputs, targets, self.num_classes)
        mixed, partners, share = self.mix(inputs)
        return mixed, mixed_targets(targets, partners, share, self.num_classes)

    def mix(self, inputs: Tensor) -> tuple[Tensor, Tensor, float]:
        """Images with a rectangle of their partners, the partners (N,), and the kept fraction, in every mode."""
        check_image_batch(type(self).__name__, inputs, "inputs")
        height, width = inputs.shape[2:]
        rows, columns = self._rectangle(height, width)
        share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)  # lambda
        partners = self.draws.partners(inputs)
        mixed = inputs.clone()
        mixed[:, :, rows, columns] = inputs[:, :, rows, columns][partners]
        return mixed, partners, share

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"alpha={self.alpha}, num_classes={self.num_classes}"

    def _rectangle(self, height: int, width: int) -> tuple[slice, slice]:
        side = (1 - self.draws.beta(self.alpha)) ** 0.5
        place: list[float] = self.draws.uniform(2).tolist()
        spans = []
        for size, center in zip((height, width), place, strict=True):
            half, middle = int(size * side) // 2, int(size * center)
            spans.append(slice(max(middle - half, 0), min(middle + half, size)))
        return spans[0], spans[1]
