# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of every layer's output on one batch, to find where the signal vanishes, explodes or saturates.

Source: Glorot and Bengio 2010, AISTATS (activations by depth show what an initialization does).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_callable, check_int
from lightning_optkit._torch_private import AnyDropout
from lightning_optkit.init._layout import is_weighted
from lightning_optkit.init._probe import probing, run_forward
from lightning_optkit.init._write import check_writable_model
from lightning_optkit.init.report import check_rows, render_table

__all__ = ["ActivationRow", "activation_statistics", "render_activations"]

# Standard deviations of 1/100 and 100: two orders of magnitude from unit variance, the target of initialization.
DYING_VARIANCE = 1e-4
BLOWN_UP_VARIANCE = 1e4
# Where |tanh| exceeds this, its slope is below 0.06; a sigmoid is equally flat at the same distance from 0 and 1.
SATURATED_TANH = 0.97
SATURATED_SHARE = 0.5
_HANDS_ON = (nn.Identity, AnyDropout)  # the identity without dropout
_SILENT = (nn.Softmax, nn.Softmin, nn.Softmax2d)  # small by definition


@dataclass(frozen=True)
class ActivationRow:
    """The output of one layer on one batch.

    Args:
        layer: Name of the module.
        kind: Its class name.
        call: Index of its call in the forward pass, from 0.
        mean: Mean over all elements.
        variance: Variance over all elements.
        verdict: "", "dies", "blows up" or "saturates".

    Example:
        >>> ActivationRow("net.0", "Linear", 0, 0.0, 1.0, "").verdict
        ''
    """

    layer: str
    kind: str
    call: int
    mean: float
    variance: float
    verdict: str


def activation_statistics(
    model: nn.Module, batch: Any, *, forward: Callable[[nn.Module, Any], object] | None = None
) -> list[ActivationRow]:
    """Runs `model` once on `batch` and returns one row per call of a layer, in execution order.

    Layers are modules without children, except Identity and dropout, and modules with weights. The model is unchanged
    afterwards: hooks are removed, modes, buffers and torch's random state restored, no autograd graph is built. Dropout
    is off, BatchNorm uses the batch.

    Verdicts: "dies" below a variance of 1e-4; "blows up" above 1e4 or if not finite; "saturates" if more than half of
    the outputs of an nn.Tanh or nn.Sigmoid are in the flat part (|tanh| > 0.97). They assume standardized input.

    Args:
        model: Any module tree, on the device of the batch.
        batch: The input batch.
        forward: How to run it; None: `model(batch)`. Functions called in a forward produce no row.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if one of its parameters is on the meta device or lazy.

    Source: Glorot and Bengio 2010, AISTATS.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> _ = nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        >>> [(row.layer, row.verdict) for row in activation_statistics(model, torch.randn(8, 4))]
        [('0', 'dies'), ('1', 'dies')]
    """
    check_writable_model("activation_statistics", model)
    if forward is not None:
        check_callable("activation_statistics", "forward", forward, "forward(model, batch)")
    rows: list[ActivationRow] = []
    calls: dict[str, int] = {}

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel() > 1:
                call = calls[name] = calls.get(name, -1) + 1
                rows.append(_row(name, module, call, tensor))

        return hook

    handles = []
    with probing(model):
        try:
            for name, module in model.named_modules():
                if ".parametrizations." not in f".{name}." and _is_layer(module):
                    handles.append(module.register_forward_hook(record(name)))
            run_forward(model, batch, forward)
        finally:
            for handle in handles:
                handle.remove()
    return rows


def _is_layer(module: nn.Module) -> bool:
    return is_weighted(module) or not (any(module.children()) or isinstance(module, _HANDS_ON))


def _row(name: str, module: nn.Module, call: int, output: Tensor) -> ActivationRow:
    variance_, mean_ = torch.var_mean(output.float(), correction=0)
    variance, mean = float(variance_), float(mean_)
    verdict = ""
    if not math.isfinite(variance) or variance > BLOWN_UP_VARIANCE:
        verdict = "blows up"
    elif isinstance(module, (nn.Tanh, nn.Sigmoid)) and _saturated_share(module, output) > SATURATED_SHARE:
        verdict = "saturates"
    elif variance < DYING_VARIANCE and not isinstance(module, _SILENT):
        verdict = "dies"
    return ActivationRow(name, type(module).__name__, call, mean, variance, verdict)


def _saturated_share(module: nn.Module, output: Tensor) -> float:
    centered = output if isinstance(module, nn.Tanh) else 2 * output - 1
    return float((centered.abs() > SATURATED_TANH).float().mean())


def render_activations(
    before: Sequence[ActivationRow], after: Sequence[ActivationRow] | None = None, *, width: int = 120
) -> str:
    """Returns the rows of one run, or of two side by side, as a table.

    Args:
        before: Rows of `activation_statistics`.
        after: Rows of the same model later; cells of layers that are missing from one of the two are empty.
        width: Characters per line, in [1, inf).

    Raises:
        TypeError: if `before` or `after` holds anything but rows.
        ValueError: if `width` is out of range.

    Example:
        >>> rows = [ActivationRow("0", "Linear", 0, 0.0, 1.0, "")]
        >>> render_activations(rows).splitlines()[0].split()
        ['layer', 'kind', 'mean', 'variance', 'verdict']
    """
    before = check_rows("render_activations", "before", before, ActivationRow)
    after = None if after is None else check_rows("render_activations", "after", after, ActivationRow)
    check_int("render_activations", "width", width, minimum=1)
    runs = {"": before} if after is None else {" before": before, " after": after}
    by_key = [{(r.layer, r.call): r for r in run} for run in runs.values()]
    header = ["layer", "kind", *(f"{what}{when}" for when in runs for what in ("mean", "variance", "verdict"))]
    cells = []
    for key, first in _merged(by_key).items():
        found = [run.get(key) for run in by_key]
        line = [f"{first.layer or '(model)'}{f' #{first.call + 1}' if first.call else ''}", first.kind]
        for r in found:
            line += ["", "", ""] if r is None else [f"{r.mean:.3g}", f"{r.variance:.3g}", r.verdict]
        cells.append(line)
    return render_table(header, cells, width=width)


def _merged(runs: Sequence[dict[tuple[str, int], ActivationRow]]) -> dict[tuple[str, int], ActivationRow]:
    merged: dict[tuple[str, int], ActivationRow] = {}
    for run in runs:
        for key, r in run.items():
            merged.setdefault(key, r)
    return merged
