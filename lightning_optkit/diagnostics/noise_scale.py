# SPDX-License-Identifier: Apache-2.0
"""The gradient noise scale: how many samples a batch needs before its gradient is more signal than noise."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit._checks import check_int, check_listed, iterate

__all__ = ["GradientNoiseScale", "gradient_noise_scale"]


@dataclass(frozen=True)
class GradientNoiseScale:
    """Unbiased estimates of one measurement, by `gradient_noise_scale`.

    Average many of them before dividing: a single one may be negative.

    Attributes:
        noise: Trace of the covariance of a single sample's gradient.
        gradient_square: Squared norm of the gradient of the whole data.
    """

    noise: float
    gradient_square: float

    @property
    def batch_size(self) -> float:
        """`noise / gradient_square`, in samples; infinite if no gradient stands out of the noise."""
        return max(self.noise, 0.0) / self.gradient_square if self.gradient_square > 0 else math.inf


def gradient_noise_scale(gradients: Iterable[Iterable[Tensor | None]], samples: int) -> GradientNoiseScale:
    r"""Compares the gradients of several parts of a batch with their mean.

    With `m` parts of `b` samples, :math:`\frac{1}{m}\sum |g_i|^2 = |G|^2 + S / b` and :math:`|\bar g|^2 = |G|^2 + S /
    (m b)` in expectation, for the gradient `G` and the noise `S`.

    Args:
        gradients: For each part, of at least 2, the gradients of all parameters, in the same order; None is zero. Each
            is that of the mean loss of its part. A generator needs memory for two parts only.
        samples: Samples in each part, at least 1.

    Raises:
        ValueError: with fewer than two parts, or if parts have different numbers of gradients.

    Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162, Appendix A.1.

    Example:
        >>> gradients = [[torch.tensor([4.0, 3.0])], [torch.tensor([4.0, -3.0])]]
        >>> gradient_noise_scale(gradients, samples=8)
        GradientNoiseScale(noise=144.0, gradient_square=7.0)
    """
    owner = "gradient_noise_scale"
    check_int(owner, "samples", samples, minimum=1)
    total: list[Tensor | None] = []
    squares: list[float] = []
    for part in iterate(owner, "gradients", gradients, "a list of gradients for each part"):
        grads = check_listed(owner, "gradients", part, "a list of gradients for each part", empty=True)
        if squares and len(grads) != len(total):
            raise ValueError(f"{owner}(gradients=...): all parts must have the same gradients; {len(grads)} follow "
                             f"{len(total)}.")  # fmt: skip
        wide = [None if grad is None else _wide(owner, grad) for grad in grads]
        squares.append(_square(wide))
        total = [_sum(*pair) for pair in zip(total or [None] * len(wide), wide, strict=True)]
    parts = len(squares)
    if parts < 2:
        raise ValueError(f"{owner}(gradients=...): at least two parts are needed; {parts} given.")
    small, large = sum(squares) / parts, _square(total) / parts**2
    noise = (small - large) * samples * parts / (parts - 1)
    return GradientNoiseScale(noise, (parts * large - small) / (parts - 1))


def _wide(owner: str, grad: Tensor) -> Tensor:
    if not isinstance(grad, Tensor):
        raise TypeError(f"{owner}(gradients=...): a gradient must be a tensor or None, not {type(grad).__name__}.")
    grad = grad.detach()
    dense = grad.to_dense() if grad.is_sparse else grad
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    return real if real.dtype == torch.float64 else real.float()


def _sum(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    return total if grad is None else grad if total is None else total + grad


def _square(grads: Iterable[Tensor | None]) -> float:
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads if grad is not None]
    return float(torch.stack(norms).square().sum()) if norms else 0.0
