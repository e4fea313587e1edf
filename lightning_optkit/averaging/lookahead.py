# SPDX-License-Identifier: Apache-2.0
"""Lookahead: the weights are pulled back to slow weights that follow them.

Source: Zhang et al. 2019, "Lookahead Optimizer: k steps forward, 1 step back", arXiv:1907.08610, Algorithm 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_tensors
from lightning_optkit.step.shards import local

__all__ = ["lookahead_"]


@torch.no_grad()
def lookahead_(params: Sequence[Tensor], slow: Sequence[Tensor], alpha: float = 0.5) -> None:
    r"""Moves the slow weights toward the weights, and the weights to the slow ones, in place; every k optimizer steps.

    .. math:: \phi \leftarrow \phi + \alpha (\theta - \phi), \qquad \theta \leftarrow \phi

    Args:
        params: The weights.
        slow: The slow weights, in the same order; at first a copy of the weights, in fp32 if these are narrower. Both
            may be sharded (DTensor), alike.
        alpha: How far the slow weights move, in (0, 1].

    Raises:
        ValueError: if `alpha` is out of range, the numbers or shapes differ, or a tensor is given twice.

    Example:
        >>> weight, slow = torch.tensor([2.0]), torch.tensor([0.0])
        >>> lookahead_([weight], [slow], alpha=0.25)
        >>> weight, slow
        (tensor([0.5000]), tensor([0.5000]))
    """
    alpha = check_in("lookahead_", "alpha", alpha, "(0, 1]")
    params = check_tensors("lookahead_", "params", params, "inexact")
    slow = check_tensors("lookahead_", "slow", slow, "inexact")
    if [param.shape for param in params] != [kept.shape for kept in slow]:
        raise ValueError(f"lookahead_(slow=<{len(slow)}>): there must be one of the shape of each of params.")
    _check_apart(params, slow)
    for param, kept in zip(params, slow, strict=True):
        local(kept).lerp_(local(param).to(kept.dtype), alpha)
        local(param).copy_(local(kept))


def _check_apart(params: Sequence[Tensor], slow: Sequence[Tensor]) -> None:
    """A weight that is its own slow weight stays as it is, and one that is given twice moves twice."""
    seen: set[int] = set()
    for name, tensors in (("params", params), ("slow", slow)):
        for number, tensor in enumerate(tensors):
            place = local(tensor).data_ptr() or id(tensor)  # an empty shard is nowhere
            if place in seen:
                raise ValueError(
                    f"lookahead_({name}=<{len(tensors)}>): number {number} is given before; each tensor must be given "
                    "once, and slow must hold copies, as [param.detach().clone() for param in params]."
                )
            seen.add(place)
