# SPDX-License-Identifier: Apache-2.0
"""Mixup: convex combinations of pairs of examples and of their targets.

Source: Zhang et al. 2018, arXiv:1710.09412; one coefficient per batch, as in the authors' code, or as in `_mixing.py`.
"""

import torch
from torch import Tensor

from lightning_optkit._checks import check_in
from lightning_optkit.data._mixing import Mixing, Per

__all__ = ["Mixup"]


class Mixup(Mixing):
    r"""Mixes every example of a batch with another one of the batch.

    .. math:: \tilde x = \lambda x_i + (1 - \lambda) x_j, \quad \tilde y = \lambda y_i + (1 - \lambda) y_j, \quad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    In evaluation mode inputs and targets are returned unchanged.

    Args:
        alpha: Strength, in (0, inf): 0.1 to 0.4 for ImageNet, 1 for a uniform coefficient.
        p: Probability of a mixture, in [0, 1], for what `per` names.
        per: What has a coefficient of its own: "batch"; "element", every example; "pair", so that both examples of a
            pair are mixed with each other by the same coefficient.
        label_smoothing: Part of each mixed target that is spread evenly over all classes, in [0, 1).
        multi_label: Whether targets are (N, C) with any number of labels each; smoothing moves these toward 1/2.
        num_classes: Number of classes, needed if targets are class indices, in [1, inf).
        generator: CPU generator of the draws. Default: a new one seeded with 0; give each process its own.

    Raises:
        TypeError: if inputs are not floating.
        ValueError: if an argument is outside its range, or targets do not fit the inputs.

    Cost: one shuffled copy and one new batch.

    Example:
        >>> mixup = Mixup(1.0, num_classes=2)
        >>> inputs, targets = mixup(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]))
        >>> torch.equal(inputs[:, 0], targets[:, 1])
        True
    """

    def __init__(
        self,
        alpha: float = 0.2,
        *,
        p: float = 1.0,
        per: Per = "batch",
        label_smoothing: float = 0.0,
        multi_label: bool = False,
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(p, per, label_smoothing, multi_label, num_classes, generator)
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "(0, inf)")

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"alpha={self.alpha}, {super().extra_repr()}"

    def _draw(self, count: int, inputs: Tensor) -> tuple[Tensor, None]:
        return self.draws.betas(self.alpha, count), None
