# SPDX-License-Identifier: Apache-2.0
"""What Mixup and CutMix share: pairs of examples, one mixture per batch, example or pair, and mixed targets.

Source: one mixture per example or pair, and its probability, as in timm's `timm.data.Mixup` (Wightman 2019); there the
partner of example i is example N - 1 - i, here it is random.
"""

from abc import abstractmethod
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, check_in, check_int, check_numbers, check_one_of, check_tensor
from lightning_optkit.data._draws import Draws
from lightning_optkit.data._targets import check_pairs, mixed_targets, per_example

__all__ = ["Mixing", "Per", "check_min_max", "pasted_parts"]

Per: TypeAlias = Literal["batch", "element", "pair"]


class Mixing(nn.Module):
    """Mixes every example of a batch with another one; a subclass draws the mixtures.

    Args:
        p: Probability of a mixture, in [0, 1].
        per: "batch", "element" or "pair".
        label_smoothing: Part of each target that is spread, in [0, 1).
        multi_label: Whether targets are (N, C) labels of their own each.
        num_classes: Number of classes, in [1, inf).
        generator: CPU generator of the draws.
    """

    def __init__(
        self,
        p: float,
        per: Per,
        label_smoothing: float,
        multi_label: bool,
        num_classes: int | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        owner = type(self).__name__
        self.p = check_in(owner, "p", p, "[0, 1]")
        check_one_of(owner, "per", per, ("batch", "element", "pair"))
        self.per = per
        self.label_smoothing = check_in(owner, "label_smoothing", label_smoothing, "[0, 1)")
        check_bools(owner, multi_label=multi_label)
        self.multi_label = multi_label
        self.num_classes = None if num_classes is None else check_int(owner, "num_classes", num_classes, minimum=1)
        self.draws = Draws(owner, generator)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed inputs (dtype, shape and memory format kept) and mixed targets.

        Args:
            inputs: Examples (N, ...) for Mixup, images (N, C, H, W) otherwise; floating for Mixup.
            targets: Class indices (N,), which become soft targets (N, num_classes) in the default dtype; or soft
                targets (N, C) or numbers (N,), mixed in their dtype.
        """
        if not self.training:
            return inputs, targets
        self._check_inputs(inputs)
        check_pairs(self, inputs, targets)
        mixed, partners, share = self.mix(inputs)
        return mixed, mixed_targets(self, targets, partners, share)

    def mix(self, inputs: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """Mixed inputs, the partner of every example (N,), and the weight of the example, in every mode.

        The weight is one number with `per="batch"`, otherwise (N,), fp64, on the device of `inputs`.
        """
        self._check_inputs(inputs)
        if self.per != "batch":
            return self._mix_each(inputs)
        shares, boxes = self._drawn(1, inputs)
        share = float(shares[0])
        partners = self.draws.partners(inputs)
        if boxes is not None and pasted_parts(boxes, 1, 1)[0] > 0:
            top, bottom, left, right = boxes[0].tolist()
            mixed = inputs.clone()
            mixed[:, :, top:bottom, left:right] = inputs[:, :, top:bottom, left:right][partners]
            return mixed, partners, share
        return (share * inputs + (1 - share) * inputs[partners] if share < 1 else inputs.clone()), partners, share

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"per={self.per!r}, p={self.p}, num_classes={self.num_classes}"

    def _check_inputs(self, inputs: Tensor) -> None:
        check_tensor(type(self).__name__, "inputs", inputs, "floating", min_ndim=1)

    @abstractmethod
    def _draw(self, count: int, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights (count,) and, if rectangles are pasted, (count, 4): top, bottom, left, right; all on the CPU."""

    def _drawn(self, count: int, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `_draw`, without a mixture where the probability says so."""
        shares, boxes = self._draw(count, inputs)
        if self.p < 1:
            is_mixed = self.draws.uniform(count) < self.p
            shares = torch.where(is_mixed, shares, 1.0)
            boxes = boxes * is_mixed[:, None] if boxes is not None else None
        return shares, boxes

    def _mix_each(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        order = self.draws.partners(inputs, device="cpu")
        place = torch.arange(len(inputs))
        if self.per == "pair":
            partners = torch.empty_like(order)
            partners[order] = order.flip(0)  # the first and the last in a random order are a pair
            of = torch.empty_like(order)
            of[order] = torch.minimum(place, place.flip(0))
        else:
            partners, of = order, place
        count = int(of.max()) + 1 if len(of) else 0
        shares, boxes = self._drawn(count, inputs)
        shares, boxes = shares[of], None if boxes is None else boxes[of]
        others = inputs[partners.to(inputs.device)]
        mixed = self._blended(inputs, others, shares, boxes)
        return mixed, partners.to(inputs.device), shares.to(inputs.device)

    def _blended(self, inputs: Tensor, others: Tensor, shares: Tensor, boxes: Tensor | None) -> Tensor:
        mixed = inputs.clone()
        is_pasted = None if boxes is None else pasted_parts(boxes, 1, 1) > 0
        weights = shares if is_pasted is None else shares.masked_fill(is_pasted, 1.0)
        if inputs.is_floating_point() and bool((weights < 1).any()):
            weight = per_example(weights, inputs)
            mixed = (weight * inputs + (1 - weight) * others).to(inputs.dtype)
            mixed = torch.where(weight < 1, mixed, inputs)  # inf and nan of a partner that has no weight stay out
        if boxes is not None:
            rows, columns = (torch.arange(size) for size in inputs.shape[2:])
            in_rows = (rows >= boxes[:, :1]) & (rows < boxes[:, 1:2])
            in_columns = (columns >= boxes[:, 2:3]) & (columns < boxes[:, 3:])
            inside = in_rows[:, None, :, None] & in_columns[:, None, None, :]
            mixed = torch.where(inside.to(inputs.device), others, mixed)
        return mixed


def pasted_parts(boxes: Tensor, height: int, width: int) -> Tensor:
    """The parts (count,) of an image that rectangles (count, 4) cover, fp64."""
    return (boxes[:, 1] - boxes[:, 0]).double() * (boxes[:, 3] - boxes[:, 2]) / (height * width)


def check_min_max(owner: str, min_max: tuple[float, float] | None) -> tuple[float, float] | None:
    """The least and the largest side of a rectangle, relative to the image.

    Raises:
        TypeError: if they are not two numbers.
        ValueError: if they are not 0 <= least < largest <= 1.
    """
    if min_max is None:
        return None
    least, most = check_numbers(owner, "min_max", min_max, 2, "[0, 1]")
    if not least < most:
        raise ValueError(f"{owner}(min_max={(least, most)}): min_max must be least < largest.")
    return least, most
