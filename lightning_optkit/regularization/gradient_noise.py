# SPDX-License-Identifier: Apache-2.0
"""Gaussian noise on the gradients, annealed over the run.

Source: Neelakantan et al. 2015, "Adding Gradient Noise Improves Learning for Very Deep Networks", arXiv:1511.06807,
Section 3.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit._checks import check_generator, check_in, check_int, check_tensors
from lightning_optkit.step.gathering import scatter_
from lightning_optkit.step.shards import local

__all__ = ["gradient_noise_", "gradient_noise_std"]


def gradient_noise_std(step: int, eta: float = 0.01, gamma: float = 0.55) -> float:
    r"""Standard deviation of the noise: :math:`\sigma_t^2 = \eta / (1 + t)^\gamma`.

    Args:
        step: t, number of completed optimizer steps, from 0.
        eta: Initial variance, in [0, inf); 0.01, 0.3 and 1 in the paper.
        gamma: Speed of the annealing, in [0, inf).

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> gradient_noise_std(0, eta=0.01), round(gradient_noise_std(99, eta=0.01), 4)
        (0.1, 0.0282)
    """
    check_int("gradient_noise_std", "step", step, minimum=0)
    check_in("gradient_noise_std", "eta", eta, "[0, inf)")
    check_in("gradient_noise_std", "gamma", gamma, "[0, inf)")
    try:
        return float((eta / (1.0 + step) ** gamma) ** 0.5)
    except OverflowError:  # of the power: the noise is negligible
        return 0.0


@torch.no_grad()
def gradient_noise_(grads: Iterable[Tensor], std: float, generator: torch.Generator | None = None) -> None:
    """Adds normal noise to every gradient, in place; drawn in fp32, rounded once.

    Args:
        grads: Dense gradients, all on the generator's device; for sharded ones (DTensor) every process must draw alike.
        std: Standard deviation, in [0, inf).
        generator: Random generator. Default: torch's own of the device.

    Raises:
        ValueError: if `std` is out of range, or a gradient is sparse.

    Example:
        >>> gradient = torch.zeros(1000)
        >>> gradient_noise_([gradient], 0.1, torch.Generator().manual_seed(0))
        >>> round(gradient.std().item(), 2)
        0.1
    """
    std = check_in("gradient_noise_", "std", std, "[0, inf)")
    if std > torch.finfo(torch.float32).max:
        raise ValueError(f"gradient_noise_(std={std!r}): std must be a number that fp32 can hold.")
    check_generator("gradient_noise_", generator)
    for grad in check_tensors("gradient_noise_", "grads", grads, "inexact"):
        if generator is not None and generator.device.type != grad.device.type:
            raise ValueError(
                f"gradient_noise_(generator={generator.device}): generator must live on the device of the gradients, "
                f"{grad.device}."
            )
        dtype = torch.promote_types(grad.dtype, torch.float32)
        noise = torch.randn(grad.shape, generator=generator, device=grad.device, dtype=dtype)
        if isinstance(grad, DTensor):  # every process draws the noise of the whole gradient, and adds its part
            part = torch.empty_like(local(grad), dtype=dtype)
            scatter_(part, noise, grad)
            noise = part
        local(grad).add_(noise, alpha=std)
