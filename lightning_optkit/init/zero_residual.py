# SPDX-License-Identifier: Apache-2.0
"""Zero-initialized residual branches: every block starts as the identity.

Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", arXiv:1706.02677 (last norm weight to zero);
He et al. 2018, arXiv:1812.01187.
"""

from typing import overload

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_text
from lightning_optkit.init._layout import parameter_names
from lightning_optkit.init._residual import LAST_NORMS, LAST_PROJECTIONS, branch_ends
from lightning_optkit.init._tensor import check_tensor
from lightning_optkit.init._write import check_writable_model, current, scale, why_not_writable
from lightning_optkit.init.report import InitRow, row

__all__ = ["zero_residual"]

_LAST = f"(?:{LAST_NORMS})|(?:{LAST_PROJECTIONS})"


@overload
def zero_residual(target: Tensor, *, pattern: str = _LAST) -> Tensor: ...
@overload
def zero_residual(target: nn.Module, *, pattern: str = _LAST) -> list[InitRow]: ...


def zero_residual(target: Tensor | nn.Module, *, pattern: str = _LAST) -> Tensor | list[InitRow]:
    """Zeroes the weight and bias of the last norm, or else the last layer, of each residual branch, in place.

    Draw the rest of the model before, with `initialize`.

    Args:
        target: A model, or one weight.
        pattern: Regular expression searched in module names. Default, in a numbered block: bn3 or else bn2 (ResNets of
            torchvision and timm), and the last projections of `depth_scaled`. Only names count: a block without a
            shortcut whose norm is named bn2 would output zero forever, so check the rows.

    Returns:
        The tensor, or for a model one row per matching parameter.

    Raises:
        TypeError: if `target` is neither.
        ValueError: if nothing matches.

    Source: Goyal et al. 2017, arXiv:1706.02677.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), num_layers=1)
        >>> [f"{row.module}.{row.parameter}" for row in zero_residual(model)][2:]
        ['layers.0.linear2.weight', 'layers.0.linear2.bias']
    """
    check_text("zero_residual", "pattern", pattern, "a regular expression", expression=True)
    if isinstance(target, Tensor):
        check_tensor("zero_residual", target, None, min_ndim=0, name="target")
        with torch.no_grad():
            return target.zero_()
    check_writable_model("zero_residual", target, "target")
    rows = []
    for name, module in branch_ends("zero_residual", target, pattern).items():
        for parameter_name in parameter_names(module):
            if parameter_name not in ("weight", "bias"):
                continue
            reason = why_not_writable(module, parameter_name)
            if reason is None:
                scale(module, parameter_name, 0.0)
            did = "zero_residual" if reason is None else f"left as it was: {reason}"
            rows.append(row(name, parameter_name, did, current(module, parameter_name)))
    return rows
