# SPDX-License-Identifier: Apache-2.0
"""Parameter groups: weight decay by kind of parameter, learning rate by layer, and any entry by name.

Source: no decay on norms and biases: He et al. 2019 (Bag of Tricks), arXiv:1812.01187, section 3.1; rates that fall
from the head to the input, by one factor per layer: Howard & Ruder 2018 (ULMFiT), arXiv:1801.06146, section 3.2
(discriminative fine-tuning), in the form of Clark et al. 2020 (ELECTRA), arXiv:2003.10555, fine-tuning details.
Unlike ELECTRA's code, and as its authors recommend, the last block is one factor below the head, not two.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optkit._checks import check_in, check_module
from lightning_optkit._terminal import fitted, width
from lightning_optkit.optimizers._group_rules import GroupRules, NoDecay, gathered, named_apart

__all__ = ["NO_DECAY", "GroupTable", "parameter_groups"]

NO_DECAY: NoDecay = ("norm", "bias", "vector", "model")
_SHOWN = {"params", "param_names", "name", "lr", "initial_lr", "decay_lr", "weight_decay"}


class GroupTable(list[dict[str, Any]]):
    """Parameter groups for any optimizer, as `parameter_groups` returns them; prints as a table.

    Args:
        groups: The groups.
        names: Names of all parameters.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], names: Mapping[Tensor, str]) -> None:
        super().__init__(groups)
        self.names = [[names.get(param, "?") for param in group["params"]] for group in self]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("group", "tensors", "parameters", "lr", "weight decay", "other", "names")]
        common = set.intersection(*(set(map(repr, group.items())) for group in map(_others, self))) if self else set()
        for group, names in zip(self, self.names, strict=True):
            other = ", ".join(f"{k}={v}" for k, v in _others(group).items() if repr((k, v)) not in common)
            numbers = [f"{float(group[key]):.3g}" if key in group else "-" for key in ("lr", "weight_decay")]
            size = sum(param.numel() for param in group["params"] if not is_lazy(param))
            more = f", +{len(names) - 2}" if len(names) > 2 else ""
            shown = ", ".join(names[:2]) + more
            rows.append((str(group.get("name", "")), str(len(names)), f"{size:,}", *numbers, other, shown))
        if not any(row[5] for row in rows[1:]):  # no group has an entry of its own
            rows = [(*row[:5], row[6]) for row in rows]
        lines = _aligned(rows)
        if max(map(len, lines)) > width():  # long names stand below their group
            below = [fitted(f"  {row[-1]}", width()) for row in rows[1:]]
            header, *numbers_of = _aligned([row[:-1] for row in rows])
            lines = [header, *chain.from_iterable(zip(numbers_of, below, strict=True))]
        return "\n".join(lines)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of columns: numbers at the right, text at the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if 0 < place < 5 else "<" for place in range(len(widths))]
    return [
        "  ".join(f"{cell:{side}{wide}}" for cell, side, wide in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def _others(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in _SHOWN}


def parameter_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    no_decay: NoDecay = NO_DECAY,
    layer_decay: float | None = None,
    layers: Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> GroupTable:
    """Groups of the parameters of `model` for any optimizer; each parameter in one group, a shared one once.

    Args:
        model: The module tree; frozen parameters are grouped too.
        lr: Learning rate of the last layer, in [0, inf). Default: the optimizer's; required with `layer_decay`.
        weight_decay: Weight decay of the groups that decay, in [0, inf). Default: the optimizer's.
        no_decay: Parameters without weight decay: module classes, and any of "norm" (norm layers of torch, and classes
            named ...Norm), "bias", "embedding", "vector" (anything else with fewer than two dimensions: layer scales,
            temperatures), "model" (what a module lists by a method `no_weight_decay()`, as models of timm do, or
            `no_weight_decay_keywords()`). A shared parameter does not decay if this holds for any of its uses.
        layer_decay: Ratio of the rates of a layer and the next one toward the output, in (0, 1]. The layers: children
            of the Sequential, ModuleList or ModuleDict with the blocks; modules registered before it form the first
            layer, those after it the last (see `_depth.py` for the full rule).
        layers: fnmatch patterns of names, from input to output, to replace that rule.
        overrides: Group entries by pattern of the parameter's name (fnmatch, or a regular expression after "re:"), e.g.
            `{"head.*": {"lr": 1e-3}}`; later patterns override earlier ones, and all override the other arguments. The
            entry "name" names the group.

    Raises:
        ValueError: for an argument out of range, a pattern that matches nothing, a parameter outside `layers`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> groups = parameter_groups(model, weight_decay=0.1)
        >>> [(group["name"], group["weight_decay"], len(group["params"])) for group in groups]
        [('decay', 0.1, 2), ('no_decay', 0.0, 4)]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    check_module("parameter_groups", "model", model)
    rules = GroupRules("parameter_groups", weight_decay, no_decay, layer_decay, layers, overrides)
    if lr is not None:
        check_in("parameter_groups", "lr", lr, "[0, inf)")
    elif layer_decay is not None:
        raise ValueError(f"parameter_groups(layer_decay={layer_decay!r}): layer_decay needs lr.")
    memberships, names, digits = rules.memberships(model)
    groups = []
    for membership, params in gathered(memberships, memberships):
        group: dict[str, Any] = {"name": membership.name(digits), "params": params}
        if lr is not None:
            group["lr"] = lr * membership.scale
        if weight_decay is not None or not membership.decays:
            group["weight_decay"] = weight_decay if membership.decays else 0.0
        groups.append(group | dict(membership.entries))
    return GroupTable(named_apart(groups), names)
