# SPDX-License-Identifier: Apache-2.0
"""Layer-sequential unit variance: orthogonal weights, scaled until each layer's output has variance 1 on real data.

Source: Mishkin and Matas 2016, "All you need is a good init", arXiv:1511.06422.
Unlike the paper, it needs a single forward pass, since each layer is scaled during its own forward. For a sharded model
(FSDP2) the output is scaled during the pass, which is equivalent up to rounding, and the weights afterwards.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_callable, check_generator, check_in, check_int
from lightning_optkit.init._layout import is_weighted
from lightning_optkit.init._probe import probing, run_forward
from lightning_optkit.init._write import check_writable_model, current, is_sharded, scale, why_not_writable
from lightning_optkit.init.initialize import Scheme, check_scheme, initialize
from lightning_optkit.init.orthogonal import orthogonal
from lightning_optkit.init.report import InitRow, row

__all__ = ["lsuv"]


def lsuv(
    model: nn.Module,
    batch: Any,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    start: Scheme | None = orthogonal,
    tolerance: float = 0.01,
    max_iterations: int = 10,
    generator: torch.Generator | None = None,
) -> list[InitRow]:
    """Scales the layers of `model` in place to output variance 1 on `batch`; returns one row per parameter.

    Linear, Bilinear and convolutional layers are scaled in execution order; layers that the forward never calls (and
    the projections inside MultiheadAttention, which torch does not call as modules) are not. Modes, BatchNorm
    statistics, all other buffers and the random state are restored; dropout is off, BatchNorm uses the batch.

    Args:
        model: Any module tree, on the device of the batch. Under DDP call it before wrapping.
        batch: Real data, standardized like the training data; a few hundred examples suffice. All ranks of a sharded
            model must get the same.
        forward: How to run the model; None: `model(batch)`. For a LightningModule e.g.
            `lambda model, batch: model.training_step(batch, 0)`.
        start: Scheme for `initialize`; None scales the existing weights.
        tolerance: Allowed deviation of the variance from 1, in (0, inf).
        max_iterations: Scalings per layer, in [1, inf). One suffices without a bias.
        generator: Random generator for `start`; None: torch's global one.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if it is on the meta device, no layer ran, or the output of a layer is constant or not finite.

    Cost: one forward pass and one more call of each layer.

    Source: Mishkin and Matas 2016, arXiv:1511.06422.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
        >>> rows = lsuv(model, x)
        >>> bool(abs(model(x).var() - 1) < 0.01)
        True
    """
    check_in("lsuv", "tolerance", tolerance, "(0, inf)")
    check_int("lsuv", "max_iterations", max_iterations, minimum=1)
    check_writable_model("lsuv", model)
    check_generator("lsuv", generator)
    if forward is not None:
        check_callable("lsuv", "forward", forward, "forward(model, batch)")
    if start is not None:
        check_scheme("lsuv", "start", start)
    rows = [] if start is None else initialize(model, start, generator=generator)

    done: dict[str, InitRow] = {}
    hooks: list[_Rescale] = []
    handles = []
    with probing(model):
        try:
            for name, module in model.named_modules():
                if is_weighted(module) and hasattr(module, "weight") and why_not_writable(module, "weight") is None:
                    hook = _Rescale(name, module, done, tolerance, max_iterations)
                    hooks.append(hook)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))
            run_forward(model, batch, forward)
        finally:
            for handle in handles:
                handle.remove()
    for hook in hooks:
        hook.scale_shards()
    if not done:
        raise ValueError("lsuv(forward): forward must run at least one Linear, Bilinear or convolutional layer.")
    return [done.pop(r.module) if r.parameter == "weight" and r.module in done else r for r in rows] + list(
        done.values()
    )


class _Rescale:
    """Forward hook: scales the weight of its module and returns the output of the scaled layer."""

    def __init__(
        self, name: str, module: nn.Module, done: dict[str, InitRow], tolerance: float, max_iterations: int
    ) -> None:
        self.name = name
        self.module = module
        self.done = done
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.is_sharded = is_sharded(current(module, "weight"))  # not a DTensor during the forward
        self.later = 1.0  # factor of a sharded weight

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if self.name in self.done:  # used more than once: the first use counts
            return self._scaled(output, self.later)
        variance = self._variance(output)
        unscaled, iterations = output, 0
        while abs(variance - 1) > self.tolerance and iterations < self.max_iterations:
            if self.is_sharded:
                self.later *= variance**-0.5
                output = self._scaled(unscaled, self.later)
            else:
                scale(module, "weight", variance**-0.5)
                output = module.forward(*args, **kwargs)
            variance = self._variance(output)
            iterations += 1
        did = f"lsuv, times scaled: {iterations}, output variance: {variance:.3g}"
        self.done[self.name] = row(self.name, "weight", did, current(module, "weight"))
        return output

    def scale_shards(self) -> None:
        """Applies the scale of the output to the sharded weight."""
        if self.later != 1.0:
            scale(self.module, "weight", self.later)
            did = self.done[self.name].scheme
            self.done[self.name] = row(self.name, "weight", did, current(self.module, "weight"))

    def _scaled(self, output: Tensor, factor: float) -> Tensor:
        """The output of the layer with its weight scaled by `factor`: the bias is not scaled."""
        if factor == 1.0:
            return output
        bias: Any = self.module.bias
        if bias is None:
            return output * factor
        whole: Tensor = bias.full_tensor() if is_sharded(bias) else bias
        kernel = getattr(self.module, "kernel_size", ())
        shift: Tensor = whole.view(-1, *[1] * len(kernel)) if kernel else whole
        return (output - shift) * factor + shift

    def _variance(self, output: Tensor) -> float:
        variance = float(output.float().var(correction=0))
        if not math.isfinite(variance) or variance == 0:
            raise ValueError(
                f"lsuv(batch): the output of layer {self.name!r} must vary and be finite, its variance is {variance:g}."
            )
        return variance
