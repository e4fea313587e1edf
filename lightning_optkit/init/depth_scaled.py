# SPDX-License-Identifier: Apache-2.0
"""Depth-scaled initialization: the last projection of each residual branch is scaled down with the number of branches.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2).
"""

from typing import overload

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_int, check_text
from lightning_optkit.init._residual import LAST_PROJECTIONS, branch_ends
from lightning_optkit.init._tensor import check_tensor
from lightning_optkit.init._write import check_writable_model, current, scale, why_not_writable
from lightning_optkit.init.report import InitRow, row

__all__ = ["depth_scaled"]


@overload
def depth_scaled(target: Tensor, *, num_layers: int | None = None, pattern: str = LAST_PROJECTIONS) -> Tensor: ...
@overload
def depth_scaled(
    target: nn.Module, *, num_layers: int | None = None, pattern: str = LAST_PROJECTIONS
) -> list[InitRow]: ...


def depth_scaled(
    target: Tensor | nn.Module, *, num_layers: int | None = None, pattern: str = LAST_PROJECTIONS
) -> Tensor | list[InitRow]:
    r"""Multiplies the last projection of each residual branch by :math:`1/\sqrt{2 \cdot num\_layers}`, in place.

    The sum over all branches then keeps the variance of one. It scales existing weights: draw the model first
    (`initialize(model, truncated_normal)` as in GPT-2, or any other scheme), and call this once.

    Args:
        target: A model, or the weight of one last projection.
        num_layers: Number of transformer layers with two branches each, in [1, inf). None, for a model only: the number
            of matches of `pattern` is used for 2 * num_layers, for any number of branches per layer.
        pattern: Regular expression searched in module names. Default: the usual names in a numbered block: c_proj,
            out_proj, o_proj, down_proj, wo, w2, fc2, linear2, attn.proj, output.dense. A plain network with such names
            in a numbered block matches too, so check the rows.

    Returns:
        The tensor, or for a model one row per matching layer.

    Raises:
        TypeError: if `target` is neither.
        ValueError: if `num_layers` is missing or below 1, or nothing matches.

    Source: Radford et al. 2019 (GPT-2): "a factor of 1/sqrt(N) where N is the number of residual layers".

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), num_layers=3)
        >>> [row.module for row in depth_scaled(model)][:2]
        ['layers.0.self_attn.out_proj', 'layers.0.linear2']
    """
    if num_layers is not None:
        check_int("depth_scaled", "num_layers", num_layers, minimum=1)
    check_text("depth_scaled", "pattern", pattern, "a regular expression", expression=True)
    if isinstance(target, Tensor):
        check_tensor("depth_scaled", target, None, min_ndim=1, name="target")
        if num_layers is None:
            raise ValueError("depth_scaled(num_layers=None): num_layers must be given with a tensor.")
        with torch.no_grad():
            return target.mul_((2 * num_layers) ** -0.5)
    check_writable_model("depth_scaled", target, "target")
    ends = branch_ends("depth_scaled", target, pattern)
    num_branches = len(ends) if num_layers is None else 2 * num_layers
    rows = []
    for name, module in ends.items():
        reason = why_not_writable(module, "weight")
        if reason is None:
            scale(module, "weight", num_branches**-0.5)
        did = f"depth_scaled, 1/sqrt({num_branches})" if reason is None else f"left as it was: {reason}"
        rows.append(row(name, "weight", did, current(module, "weight")))
    return rows
