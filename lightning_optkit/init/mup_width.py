# SPDX-License-Identifier: Apache-2.0
"""Maximal update parametrization: transfers learning rates from a narrow model to a wide one.

Source: Yang et al. 2022, "Tensor Programs V", arXiv:2203.03466, Table 3. It is the form without output multiplier (the
multiplier of an equivalent form would be a change to the model). Table 3 lets all widths grow alike; where they do not,
a hidden weight's rate with SGD is n_out / n_in, as for every kind: the gradient of its output is 1 / n_out per element,
so the output changes by rate * n_in / n_out (Yang, Simon & Bernstein 2023, arXiv:2310.17813: the spectral norm of an
update is to scale as sqrt(n_out / n_in)). The authors' package `mup` has the same factor.
Changes of the forward are left to the user, above all attention scaled by 1/d_head instead of 1/sqrt(d_head). The rules
hold for AdamW too, but its decay is lr * weight_decay, so the decay shrinks with the rate of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, check_generator, check_in, check_module, check_one_of
from lightning_optkit.init._layout import role, weight_blocks
from lightning_optkit.init._write import (
    check_writable_model,
    current,
    parameter,
    parameter_uses,
    scale,
    why_not_writable,
)
from lightning_optkit.init.gain import Activation, check_activation
from lightning_optkit.init.he import he
from lightning_optkit.init.initialize import initialize
from lightning_optkit.init.report import InitRow, check_rows, row

__all__ = ["MupRow", "mup_parameter_groups", "mup_width"]


@dataclass(frozen=True)
class MupRow(InitRow):
    """The initialization of a parameter, and the multipliers of its learning rate.

    Args:
        module: Name of the module that holds it.
        parameter: Its name in that module.
        scheme: How it was drawn.
        shape: Its shape.
        std: Standard deviation of its values after.
        kind: "input" (grows with the width in its outputs only; biases and norms too), "hidden" (in both), "output" (in
            its inputs only) or "fixed" (in neither).
        adam: Factor of the learning rate with Adam-like optimizers.
        sgd: Factor of the learning rate with SGD.

    Example:
        >>> MupRow("head", "weight", "he", (10, 512), 0.01, "output", 0.25, 0.25).adam
        0.25
    """

    kind: Literal["input", "hidden", "output", "fixed"]
    adam: float
    sgd: float


class _Growth(NamedTuple):
    """Growth of a parameter's fans relative to the base model."""

    fan_in: float
    fan_out: float


def mup_width(
    model: nn.Module,
    base: nn.Module,
    *,
    activation: Activation | None = None,
    generator: torch.Generator | None = None,
    draw: bool = True,
) -> list[MupRow]:
    """Draws `model` in place with `he` and muP's variances; returns one row per parameter with its multipliers.

    With r the growth of a fan relative to `base` (so nothing changes at the base width; r_out / r_in is 1 where all
    widths grow alike):

    ===================  =====================  ==============  =====================
    ..                   input weights, biases  hidden weights  output weights
    ===================  =====================  ==============  =====================
    variance             g^2 / fan_in           g^2 / fan_in    g^2 / (fan_in * r_in)
    learning rate, SGD   r_out                  r_out / r_in    1 / r_in
    learning rate, Adam  1                      1 / r_in        1 / r_in
    ===================  =====================  ==============  =====================

    Args:
        model: The wide model.
        base: The same model at the width of the tuned learning rate; only shapes are read, so it may be built under
            `torch.device("meta")`.
        activation: See `initialize`.
        generator: Random generator; None: torch's global one.
        draw: False leaves the weights unchanged and only returns the multipliers, for a model that is already drawn.

    Raises:
        TypeError: if `model` or `base` is not a module.
        ValueError: if their parameters differ in name or dimensions, an embedding that grows is tied to an output layer
            (Table 3 needs them apart), or a parameter of a module without a rule grows in two dimensions.

    Source: Yang et al. 2022, arXiv:2203.03466, Table 3.

    Example:
        >>> def mlp(width):
        ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 2))
        >>> [(row.kind, row.adam, row.sgd) for row in mup_width(mlp(256), mlp(64)) if row.parameter == "weight"]
        [('input', 1.0, 4.0), ('hidden', 0.25, 1.0), ('output', 0.25, 0.25)]
    """
    check_writable_model("mup_width", model)
    check_activation("mup_width", activation)
    check_generator("mup_width", generator)
    check_bools("mup_width", draw=draw)
    growth = _growth(model, base)
    rows: list[MupRow] = []
    drawn = initialize(model, he, activation=activation, generator=generator) if draw else _left_as_they_were(model)
    for r in drawn:
        grown = growth[r.module, r.parameter]
        module = model.get_submodule(r.module)
        kind = _kind(grown)
        if (
            draw
            and kind == "output"
            and why_not_writable(module, r.parameter) is None
            and not r.scheme.startswith("tied")
        ):
            scale(module, r.parameter, grown.fan_in**-0.5)
            r = row(r.module, r.parameter, f"{r.scheme}, x {grown.fan_in:g}^(-1/2)", current(module, r.parameter))
        # A fan that does not grow has a growth of 1, so one formula gives every column of the table.
        adam, sgd = 1 / grown.fan_in, grown.fan_out / grown.fan_in
        rows.append(MupRow(r.module, r.parameter, r.scheme, r.shape, r.std, kind, adam, sgd))
    return rows


def mup_parameter_groups(
    model: nn.Module, rows: Sequence[MupRow], *, lr: float, rule: str = "adam"
) -> list[dict[str, Any]]:
    """Returns the trainable parameters of `model` as optimizer groups, one per multiplier.

    Args:
        model: The model passed to `mup_width`.
        rows: The result of `mup_width`.
        lr: Learning rate tuned at the base width, in (0, inf).
        rule: "adam" (Adam, AdamW and other rules whose update does not depend on the gradient's scale) or "sgd".

    Raises:
        ValueError: if `rule` is neither, or `lr` is out of range.

    Source: Yang et al. 2022, arXiv:2203.03466, Table 3.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 256), nn.Linear(256, 2))
        >>> rows = mup_width(model, nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 2)))
        >>> [(len(group["params"]), group["lr"]) for group in mup_parameter_groups(model, rows, lr=0.1)]
        [(3, 0.1), (1, 0.025)]
    """
    check_in("mup_parameter_groups", "lr", lr, "(0, inf)")
    check_one_of("mup_parameter_groups", "rule", rule, ("adam", "sgd"))
    check_module("mup_parameter_groups", "model", model)
    rows = check_rows("mup_parameter_groups", "rows", rows, MupRow)
    modules = dict(model.named_modules())
    for r in rows:
        if r.module not in modules or not hasattr(modules[r.module], r.parameter):
            raise ValueError(
                f"mup_parameter_groups(rows=[..., {r.module!r}]): rows must be those of this model; it has no "
                f"parameter {r.module}.{r.parameter}."
            )
    groups: dict[float, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for r in rows:
        found = parameter(model.get_submodule(r.module), r.parameter)
        if found.requires_grad and id(found) not in seen:
            seen.add(id(found))
            groups.setdefault(r.adam if rule == "adam" else r.sgd, []).append(found)
    return [{"params": params, "lr": lr * factor} for factor, params in groups.items()]


def _left_as_they_were(model: nn.Module) -> list[InitRow]:
    return [
        row(module_name, name, "left as it was", current(model.get_submodule(module_name), name))
        for uses in parameter_uses(model).values()
        for module_name, name in uses
    ]


def _growth(model: nn.Module, base: nn.Module) -> dict[tuple[str, str], _Growth]:
    """The growth of every parameter; raises if `base` is not the same model."""
    check_module("mup_width", "base", base)
    base_modules = dict(base.named_modules())
    growth: dict[tuple[str, str], _Growth] = {}
    for uses in parameter_uses(model).values():
        for module_name, name in uses:
            module, base_module = model.get_submodule(module_name), base_modules.get(module_name)
            tensor = current(module, name)
            base_tensor = getattr(base_module, name, None)
            full_name = f"{module_name}.{name}".lstrip(".")
            if not isinstance(base_tensor, Tensor) or base_tensor.ndim != tensor.ndim or base_module is None:
                raise ValueError(
                    f"mup_width(base): base must have a parameter {full_name!r} with {tensor.ndim} dimensions."
                )
            growth[module_name, name] = _parameter_growth(full_name, module, base_module, name, tensor, base_tensor)
        kinds = {_kind(growth[use]) for use in uses}
        if len(kinds) > 1:
            names = " and ".join(f"{use[0]}.{use[1]}" for use in uses)
            raise ValueError(
                f"mup_width(model with {names} tied): model must have its input and output weights untied."
            )
    return growth


def _parameter_growth(
    full_name: str, module: nn.Module, base_module: nn.Module, name: str, tensor: Tensor, base_tensor: Tensor
) -> _Growth:
    whole = tensor.numel() / base_tensor.numel()
    kind = role(module, name)
    if kind in ("weight", "recurrent"):
        wide, narrow = (
            weight_blocks(owner, name, torch.empty(shape, device="meta"))[0].tensor.shape
            for owner, shape in ((module, tensor.shape), (base_module, base_tensor.shape))
        )
        grown = _Growth(wide[1:].numel() / narrow[1:].numel(), wide[0] / narrow[0])
        # Depthwise: the number of groups has grown, not their size, so the weight counts as one vector per channel.
        return grown if grown != (1, 1) else _Growth(1, whole)
    if kind == "other" and sum(a != b for a, b in zip(tensor.shape, base_tensor.shape, strict=True)) > 1:
        raise ValueError(
            f"mup_width(model with {full_name!r}): a parameter of {type(module).__name__}, for which there is no rule, "
            "must not grow in two dimensions; keep it in a Linear or convolution."
        )
    return _Growth(1, whole)


def _kind(grown: _Growth) -> Literal["input", "hidden", "output", "fixed"]:
    if grown.fan_in != 1:
        return "hidden" if grown.fan_out != 1 else "output"
    return "input" if grown.fan_out != 1 else "fixed"
