# SPDX-License-Identifier: Apache-2.0
"""Activation regularization (AR) and its temporal variant (TAR): small outputs that change slowly over time.

Source: Merity et al. 2017, "Revisiting Activation Regularization for Language RNNs", arXiv:1708.01009, Section 3;
squares averaged, as in the authors' code; the paper writes the norm.
"""

from torch import Tensor

from lightning_optkit._checks import check_in, check_tensor, check_whole

__all__ = ["activation_regularization", "temporal_activation_regularization"]


def activation_regularization(activations: Tensor, alpha: float = 2.0) -> Tensor:
    r"""Returns :math:`\alpha` times the mean square of the activations.

    Args:
        activations: Outputs of a layer, after its dropout, any shape.
        alpha: Weight, in [0, inf); 2 in the paper's language models.

    Raises:
        TypeError: if `activations` is not a floating tensor.
        ValueError: if `alpha` is out of range.

    Example:
        >>> import torch
        >>> activation_regularization(torch.tensor([1.0, -3.0]), alpha=2.0)
        tensor(10.)
    """
    check_tensor("activation_regularization", "activations", activations, "inexact")
    alpha = check_in("activation_regularization", "alpha", alpha, "[0, inf)")
    return alpha * activations.square().mean()


def temporal_activation_regularization(activations: Tensor, beta: float = 1.0, time_dim: int = 1) -> Tensor:
    r"""Returns :math:`\beta` times the mean square of the change between successive time steps; 0 for a single step.

    Args:
        activations: Outputs of a layer, before its dropout, with time in dimension `time_dim`.
        beta: Weight, in [0, inf); 1 in the paper's language models.
        time_dim: Dimension of time.

    Raises:
        TypeError: if `activations` is not a floating tensor.
        ValueError: if an argument is out of range.

    Example:
        >>> import torch
        >>> temporal_activation_regularization(torch.tensor([[1.0, 3.0, 2.0]]), beta=2.0)
        tensor(5.)
    """
    check_tensor("temporal_activation_regularization", "activations", activations, "inexact")
    beta = check_in("temporal_activation_regularization", "beta", beta, "[0, inf)")
    check_whole("temporal_activation_regularization", "time_dim", time_dim)
    if not -activations.dim() <= time_dim < activations.dim():
        raise ValueError(
            f"temporal_activation_regularization(time_dim={time_dim}): the activations have {activations.dim()} "
            "dimensions."
        )
    steps = activations.shape[time_dim]
    if steps < 2:
        return 0.0 * activations.sum()
    change = activations.narrow(time_dim, 1, steps - 1) - activations.narrow(time_dim, 0, steps - 1)
    return beta * change.square().mean()
