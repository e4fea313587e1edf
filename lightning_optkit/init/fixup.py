# SPDX-License-Identifier: Apache-2.0
"""Fixup: trains deep residual networks without normalization layers.

Source: Zhang, Dauphin and Ma 2019, "Fixup Initialization", arXiv:1901.09321.
Rule 3 of the paper (a scalar multiplier per branch, a scalar bias before each layer and activation) changes the
architecture, so it is left to the user; initialize the multipliers with 1 and the biases with 0.
"""

import torch
from torch import nn

from lightning_optkit._checks import check_generator, check_text, shown
from lightning_optkit.init._layout import is_norm, is_weighted, parameter_names, role
from lightning_optkit.init._residual import branch_layers
from lightning_optkit.init._write import check_writable_model, current, scale, why_not_writable
from lightning_optkit.init.gain import Activation, check_activation
from lightning_optkit.init.he import he
from lightning_optkit.init.initialize import initialize
from lightning_optkit.init.report import InitRow, row

__all__ = ["fixup"]


def fixup(
    model: nn.Module,
    *,
    branches: str | None = None,
    head: str | None = None,
    activation: Activation | None = None,
    generator: torch.Generator | None = None,
) -> list[InitRow]:
    r"""Draws `model` in place by `he`, then applies rules 1 and 2 of Fixup; returns one row per parameter.

    1. The classification layer and the last layer of each residual branch are zero.
    2. The other layers of a branch use He's scheme times :math:`L^{-1/(2m-2)}`, with L branches in total and m layers
       in this one. Layers outside the branches, including shortcuts (names with downsample, shortcut or skip), use He's
       scheme.

    Args:
        model: A residual network without normalization layers.
        branches: Regular expression searched in module names; each match is one branch. None: the innermost numbered
            custom modules with at least two layers, e.g. the blocks of a ResNet. A transformer block has two branches,
            which need a pattern, e.g. r"\.(attn|mlp)$".
        head: Name of the classification layer. None: the last layer after the last branch, if any.
        activation: See `initialize`.
        generator: Random generator; None: torch's global one.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if it has a normalization layer, no branch, or no layer named `head`.

    Source: Zhang et al. 2019, arXiv:1901.09321.

    Example:
        >>> from lightning_optkit.init.fixup import fixup
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        >>> model = nn.Sequential(*(Block() for _ in range(4)), nn.Linear(8, 2))
        >>> [row.scheme for row in fixup(model) if row.parameter == "weight"][-3:]
        ['he x 4^(-1/2)', 'zero (end of branch)', 'zero (head)']
    """
    check_writable_model("fixup", model)
    check_activation("fixup", activation)
    check_generator("fixup", generator)
    if branches is not None:
        check_text("fixup", "branches", branches, "a regular expression", expression=True)
    if head is not None:
        check_text("fixup", "head", head, 'the name of a layer, such as "head"')
    for name, module in model.named_modules():
        if is_norm(module):
            raise ValueError(
                f"fixup(model with the norm {name!r}): model must have no normalization layers; remove them."
            )
    found = branch_layers("fixup", model, branches)
    factors: dict[str, tuple[float, str]] = {}
    for layers in found.values():
        exponent = 2 * len(layers) - 2
        for name, _ in layers[:-1]:
            factors[name] = (len(found) ** (-1 / exponent), f"he x {len(found)}^(-1/{exponent})")
        factors[layers[-1][0]] = (0.0, "zero (end of branch)")
    head = _head(model, list(found)) if head is None else head
    if head is not None:
        if not is_weighted(dict(model.named_modules()).get(head, nn.Identity())):
            raise ValueError(f"fixup(head={shown(head)}): head must be the name of a layer of the model.")
        factors[head] = (0.0, "zero (head)")

    rows = initialize(model, he, activation=activation, generator=generator)
    done: dict[tuple[str, str], InitRow] = {}
    for name, (factor, did) in factors.items():
        module = model.get_submodule(name)
        for parameter_name in parameter_names(module):
            if role(module, parameter_name) in ("weight", "recurrent") and not why_not_writable(module, parameter_name):
                scale(module, parameter_name, factor)
                done[name, parameter_name] = row(name, parameter_name, did, current(module, parameter_name))
    return [done.get((r.module, r.parameter), r) for r in rows]


def _head(model: nn.Module, branches: list[str]) -> str | None:
    """The last weighted layer, unless it belongs to a branch or its shortcut."""
    last = [name for name, module in model.named_modules() if is_weighted(module)][-1]
    return None if any(f"{last}.".startswith(f"{branch}.") for branch in branches) else last
