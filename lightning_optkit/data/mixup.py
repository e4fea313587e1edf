# SPDX-License-Identifier: Apache-2.0
"""Mixup: convex combinations of pairs of examples and of their targets.

Source: Zhang et al. 2018, arXiv:1710.09412; one coefficient per batch, as in the authors' code.
"""

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_in, check_int, check_tensor
from lightning_optkit.data._draws import Draws
from lightning_optkit.data._targets import check_pairs, mixed_targets

__all__ = ["Mixup"]


class Mixup(nn.Module):
    r"""Mixes every example of a batch with another one of the batch.

    .. math:: \tilde x = \lambda x_i + (1 - \lambda) x_j, \quad \tilde y = \lambda y_i + (1 - \lambda) y_j, \quad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    In evaluation mode inputs and targets are returned unchanged.

    Args:
        alpha: Strength, in (0, inf): 0.1 to 0.4 for ImageNet, 1 for a uniform coefficient.
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
        self, alpha: float = 0.2, *, num_classes: int | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "(0, inf)")
        self.num_classes = (
            None if num_classes is None else check_int(type(self).__name__, "num_classes", num_classes, minimum=1)
        )
        self.draws = Draws(type(self).__name__, generator)

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed inputs (dtype, shape and memory format kept) and mixed targets.

        Args:
            inputs: Examples, shape (N, ...), floating.
            targets: Class indices (N,), which become soft targets (N, num_classes) in the default dtype; or soft
                targets (N, C) or numbers (N,), mixed in their dtype.
        """
        if not self.training:
            return inputs, targets
        check_pairs(type(self).__name__, inputs, targets, self.num_classes)
        mixed, partners, share = self.mix(inputs)
        return mixed, mixed_targets(targets, partners, share, self.num_classes)

    def mix(self, inputs: Tensor) -> tuple[Tensor, Tensor, float]:
        """Mixed inputs, the partner of every example (N,), and the weight of the example, in every mode."""
        check_tensor(type(self).__name__, "inputs", inputs, "floating", min_ndim=1)
        share = self.draws.beta(self.alpha)  # lambda
        partners = self.draws.partners(inputs)
        return share * inputs + (1 - share) * inputs[partners], partners, share

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"alpha={self.alpha}, num_classes={self.num_classes}"
