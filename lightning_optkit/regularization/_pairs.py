# SPDX-License-Identifier: Apache-2.0
"""Two gradients of the same parameters."""

from typing import Any

from torch import Tensor

from lightning_optkit._checks import check_tensors

__all__ = ["check_pairs"]


def check_pairs(owner: str, grads: Any, name: str, others: Any) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Both arguments as lists, `grads` and the one called `name`, if their tensors fit each other one by one."""
    first = check_tensors(owner, "grads", grads, "inexact", optional=True)
    second = check_tensors(owner, name, others, "inexact", optional=True)
    if len(first) != len(second):
        raise ValueError(f"{owner}({name}=<{len(second)}>): there must be one for each of the {len(first)} grads.")
    for number, (grad, other) in enumerate(zip(first, second, strict=True)):
        if grad is None or other is None:
            continue
        if grad.shape != other.shape or grad.is_complex() != other.is_complex():
            raise ValueError(
                f"{owner}(grads=[...], {name}=[...]): number {number} has shape {list(other.shape)} and dtype "
                f"{other.dtype}, its gradient {list(grad.shape)} and {grad.dtype}."
            )
    return first, second
