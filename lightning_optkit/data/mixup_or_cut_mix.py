# SPDX-License-Identifier: Apache-2.0
"""Mixup for some batches, examples or pairs, and CutMix for the others.

Source: `timm.data.Mixup` (Wightman 2019) with `switch_prob`; the settings of Touvron et al. 2021 (DeiT),
arXiv:2012.12877, Table 9, are the defaults.
"""

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_tensor
from lightning_optkit.data._images import check_image_batch
from lightning_optkit.data._mixing import Mixing, Per, check_min_max, pasted_parts
from lightning_optkit.data._rectangles import by_area, by_sides

__all__ = ["MixupOrCutMix"]


class MixupOrCutMix(Mixing):
    """Draws between `Mixup` and `CutMix`, for every batch, example or pair anew.

    `Augment([Mixup(), CutMix()])` draws one of its mixtures per batch; this class also draws per example or pair.

    Args:
        mixup_alpha: Strength of Mixup, in (0, inf).
        cutmix_alpha: Parameter of CutMix, in (0, inf).
        switch_p: Probability of CutMix instead of Mixup, in [0, 1].
        min_max: Least and largest side of the rectangle relative to the image, instead of `cutmix_alpha`; see `CutMix`.
        p: Probability of any mixture, in [0, 1], for what `per` names.
        per: What has a mixture of its own: "batch", "element" or "pair".
        label_smoothing: Part of each mixed target that is spread evenly over all classes, in [0, 1).
        multi_label: Whether targets are (N, C) with any number of labels each; smoothing moves these toward 1/2.
        num_classes: Number of classes, needed if targets are class indices, in [1, inf).
        generator: CPU generator of the draws. Default: a new one seeded with 0; give each process its own.

    Raises:
        TypeError: if inputs are not floating images (N, C, H, W).
        ValueError: if an argument is outside its range, or targets do not fit the inputs.

    Cost: one shuffled copy and one new batch.

    Example:
        >>> mix = MixupOrCutMix(per="element", num_classes=2)
        >>> images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
        >>> inputs, targets = mix(images, torch.tensor([0, 1]))
        >>> torch.allclose(inputs.mean(dim=(1, 2, 3)), targets[:, 1])
        True
    """

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        *,
        switch_p: float = 0.5,
        min_max: tuple[float, float] | None = None,
        p: float = 1.0,
        per: Per = "batch",
        label_smoothing: float = 0.0,
        multi_label: bool = False,
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, per, label_smoothing, multi_label, num_classes, generator)
        owner = type(self).__name__
        self.mixup_alpha = check_in(owner, "mixup_alpha", mixup_alpha, "(0, inf)")
        self.cutmix_alpha = check_in(owner, "cutmix_alpha", cutmix_alpha, "(0, inf)")
        self.switch_p = check_in(owner, "switch_p", switch_p, "[0, 1]")
        self.min_max = check_min_max(owner, min_max)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        size = f"cutmix_alpha={self.cutmix_alpha}" if self.min_max is None else f"min_max={self.min_max}"
        return f"mixup_alpha={self.mixup_alpha}, {size}, switch_p={self.switch_p}, {super().extra_repr()}"

    def _check_inputs(self, inputs: Tensor) -> None:
        check_image_batch(type(self).__name__, inputs, "inputs")
        check_tensor(type(self).__name__, "inputs", inputs, "floating")

    def _draw(self, count: int, inputs: Tensor) -> tuple[Tensor, Tensor]:
        height, width = inputs.shape[2:]
        is_cut = self.draws.uniform(count) < self.switch_p
        shares = self.draws.betas(self.mixup_alpha, count)
        if self.min_max is not None:
            boxes = by_sides(self.draws, count, self.min_max, height, width)
        else:
            boxes = by_area(self.draws, 1 - self.draws.betas(self.cutmix_alpha, count), height, width)
        shares = torch.where(is_cut, 1 - pasted_parts(boxes, height, width), shares)
        return shares, boxes * is_cut[:, None]
