# SPDX-License-Identifier: Apache-2.0
"""CutMix: a rectangle of another image pasted into every image, targets mixed by area.

Source: Yun et al. 2019, arXiv:1905.04899; one rectangle per batch, as there, or as in `_mixing.py`.
"""

import torch
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit.data._images import check_image_batch
from lightning_optkit.data._mixing import Mixing, Per, check_min_max, pasted_parts
from lightning_optkit.data._rectangles import by_area, by_sides

__all__ = ["CutMix"]


class CutMix(Mixing):
    r"""Pastes a rectangle of another image of the batch into every image.

    .. math:: \tilde x = M \odot x_i + (1 - M) \odot x_j, \quad \tilde y = \lambda y_i + (1 - \lambda) y_j

    The rectangle has sides W sqrt(1 - lambda') and H sqrt(1 - lambda') with lambda' from Beta(alpha, alpha), a uniform
    center, and is cut at the border; lambda is the exact fraction of pixels that are kept. In evaluation mode inputs
    and targets are returned unchanged.

    Args:
        alpha: Parameter of the Beta distribution, in (0, inf); 1, as in the paper, draws areas uniformly.
        min_max: Least and largest side of the rectangle relative to the image, e.g. (0.2, 0.8), instead of `alpha`;
            it is then inside the image, with each side drawn uniformly.
        p: Probability of a mixture, in [0, 1], for what `per` names.
        per: What has a rectangle of its own: "batch"; "element", every example; "pair", so that both examples of a
            pair exchange the same rectangle.
        label_smoothing: Part of each mixed target that is spread evenly over all classes, in [0, 1).
        multi_label: Whether targets are (N, C) with any number of labels each; smoothing moves these toward 1/2.
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
        self,
        alpha: float = 1.0,
        *,
        min_max: tuple[float, float] | None = None,
        p: float = 1.0,
        per: Per = "batch",
        label_smoothing: float = 0.0,
        multi_label: bool = False,
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, per, label_smoothing, multi_label, num_classes, generator)
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "(0, inf)")
        self.min_max = check_min_max(type(self).__name__, min_max)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        size = f"alpha={self.alpha}" if self.min_max is None else f"min_max={self.min_max}"
        return f"{size}, {super().extra_repr()}"

    def _check_inputs(self, inputs: Tensor) -> None:
        check_image_batch(type(self).__name__, inputs, "inputs")

    def _draw(self, count: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        height, width = inputs.shape[2:]
        boxes = self._boxes(count, height, width)
        return 1 - pasted_parts(boxes, height, width), boxes

    def _boxes(self, count: int, height: int, width: int) -> Tensor:
        if self.min_max is not None:
            return by_sides(self.draws, count, self.min_max, height, width)
        return by_area(self.draws, 1 - self.draws.betas(self.alpha, count), height, width)
