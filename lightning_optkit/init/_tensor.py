# SPDX-License-Identifier: Apache-2.0
"""Checks of a tensor that a scheme fills."""

import torch
from torch import Tensor

from lightning_optkit._checks import check_generator, kind_shown

__all__ = ["check_tensor"]


def check_tensor(
    owner: str, tensor: Tensor, generator: torch.Generator | None, *, min_ndim: int, name: str = "tensor"
) -> None:
    """Raises unless a scheme can draw into `tensor`.

    Raises:
        TypeError: if it is not a floating-point tensor, or the generator is not one.
        ValueError: if it is sparse, empty, has too few dimensions, is on the meta device, is sharded, or the generator
            is on another device.

    Example:
        >>> check_tensor("he", torch.empty(2, 3), None, min_ndim=2)
    """
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else kind_shown(tensor)
        raise TypeError(f"{owner}({name}={kind}): {name} must be a floating-point tensor.")
    if tensor.layout != torch.strided:
        raise ValueError(f"{owner}({name}=<{tensor.layout}>): {name} must be dense; use {name}.to_dense().")
    check_generator(owner, generator)
    shape = tuple(tensor.shape)
    if tensor.ndim < min_ndim or tensor.numel() == 0:
        needed = f"at least {min_ndim} dimensions and one element" if min_ndim else "at least one element"
        raise ValueError(f"{owner}({name} of shape {shape}): {name} must have {needed}.")
    if tensor.is_meta:
        raise ValueError(
            f"{owner}({name} on meta): {name} must have storage; materialize it with to_empty(device=...)."
        )
    if hasattr(tensor, "device_mesh"):
        raise ValueError(
            f"{owner}({name} sharded over {tensor.device_mesh}): {name} must be whole; use initialize(model, {owner}), "
            "by which every rank draws the same global tensor and keeps its shard."
        )
    if generator is not None and generator.device.type != tensor.device.type:
        raise ValueError(
            f"{owner}(generator on {generator.device.type}): generator must live on the device of the tensor, "
            f"{tensor.device.type}."
        )
