# SPDX-License-Identifier: Apache-2.0
"""Lets callbacks change the loss of an unchanged module; the only mechanism for this.

    def transform(call: LossCall, loss: Loss) -> Tensor:
        return loss(call.changed(label_smoothing=0.1))

    intercept(pl_module, "MyCallback", transform, SMOOTHING)         # in setup("fit")
    release(pl_module, transform)                                    # in teardown and on_exception

`training_step` is wrapped; while it runs, a TorchFunctionMode intercepts the module's calls of `F.cross_entropy`,
`F.nll_loss`, `F.binary_cross_entropy_with_logits` and `F.binary_cross_entropy`, including those inside
`nn.CrossEntropyLoss` etc., however their arguments are passed. A transform gets the call and `loss`, which computes the
rest of the chain: call `loss` with one or more changed calls, and return the module's result.

- Order: `TARGETS` (which examples a prediction is compared with: Mixup) wraps `SMOOTHING` (how sharp those targets
  are), which wraps `WATCHING` (only reads the final call). Within one order, earlier ones wrap later ones. A mixture of
  two examples is best computed as the mixture of two losses, which is correct for class weights, `ignore_index`, any
  reduction that sums or averages, and targets of any shape: `share * loss(call) + (1 - share) *
  loss(call.changed(target=call.target[partners]))`; with a share for every example, from losses without reduction.
- Unreachable losses: the first `training_step` that returns a loss, or calls backward itself (manual optimization),
  without having called one of the four functions raises, naming the owners. A transform that cannot handle a call
  raises itself.
- Only training: validation, test and prediction are not intercepted.
- Cost: about 1.7 us per torch call inside `training_step`.
- Autocast, DDP and compiled modules: the functions run where the module calls them, in the same context. Inside a
  compiled function a number that changes from step to step must be a tensor, or each step recompiles.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_optkit._torch_private import legacy_reduction
from lightning_optkit.callbacks.seams.overrides import override, restore

__all__ = ["SMOOTHING", "TARGETS", "WATCHING", "Loss", "LossCall", "Transform", "intercept", "release"]

TARGETS, SMOOTHING, WATCHING = 0, 1, 2


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function, with every argument by name; arguments that the function lacks have their defaults.

    Args:
        name: Name of the function: "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits",
            "binary_cross_entropy".
        input: Logits, log-probabilities (nll_loss) or probabilities (binary_cross_entropy).
        target: Class indices or probabilities, as in torch; nll_loss also accepts probabilities here.
        weight: Weight per class, or per element for the binary functions.
        pos_weight: For binary_cross_entropy_with_logits.
        ignore_index: For cross_entropy and nll_loss.
        reduction: "mean", "sum" or "none".
        label_smoothing: For cross_entropy; nll_loss also accepts it here.
    """

    name: str
    input: Tensor
    target: Tensor
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0

    @property
    def is_binary(self) -> bool:
        """Whether every element is a binary prediction."""
        return self.name.startswith("binary")

    @property
    def has_soft_target(self) -> bool:
        """Whether the targets are probabilities, one per element of `input`."""
        return self.is_binary or (self.target.is_floating_point() and self.target.shape == self.input.shape)

    def num_averaged(self, each: Tensor) -> int | Tensor:
        """What a mean divides by, given the losses of `reduction="none"`: their number, or the sum of their weights."""
        if self.has_soft_target:
            return each.numel()
        counted = self.target != self.ignore_index
        if self.weight is None:
            return counted.sum()
        return (self.weight[torch.where(counted, self.target, 0)] * counted).sum()

    def changed(self, **arguments: Any) -> "LossCall":
        """The call with changed arguments."""
        return replace(self, **arguments)

    def compute(self) -> Tensor:
        """Computes the loss with torch."""
        if self.name == "binary_cross_entropy":
            return F.binary_cross_entropy(self.input, self.target, self.weight, reduction=self.reduction)
        if self.name == "binary_cross_entropy_with_logits":
            return F.binary_cross_entropy_with_logits(
                self.input, self.target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
            )
        if self.name == "nll_loss" and not self.label_smoothing and not self.has_soft_target:
            return F.nll_loss(
                self.input, self.target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction
            )
        # The softmax of log-probabilities is the probabilities, so nll_loss equals cross_entropy, which has more
        # options.
        return F.cross_entropy(
            self.input, self.target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip


Loss: TypeAlias = Callable[[LossCall], Tensor]
Transform: TypeAlias = Callable[[LossCall, Loss], Tensor]

_REACHABLE = (F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.binary_cross_entropy)
_SIGNATURES = {function: inspect.signature(function) for function in _REACHABLE}
_REGRESSIONS = (
    F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.gaussian_nll_loss, F.poisson_nll_loss,
)  # fmt: skip


def intercept(pl_module: pl.LightningModule, owner: str, transform: Transform, order: int) -> None:
    """Makes `transform` handle the loss calls of `pl_module.training_step` until `release`.

    Args:
        pl_module: The module, which is otherwise unchanged.
        owner: Callback named in the error if the loss cannot be intercepted.
        transform: Called for every call of a loss function, with a function that computes the rest of the chain.
        order: TARGETS, SMOOTHING or WATCHING.
    """
    seam = _seam_of(pl_module)
    if seam is None:
        seam = _Seam(pl_module.training_step)
        override(pl_module, "training_step", seam.training_step)
    seam.members.append((order, owner, transform))
    seam.members.sort(key=lambda member: member[0])  # stable
    seam.is_reached = False


def release(pl_module: pl.LightningModule, transform: Transform) -> None:
    """Undoes `intercept`; no-op for an unknown transform."""
    seam = _seam_of(pl_module)
    if seam is None:
        return
    # `==`, not `is`: a bound method is a new object at each access.
    seam.members = [member for member in seam.members if member[2] != transform]
    if not seam.members:
        restore(pl_module, "training_step", seam.training_step)


def _seam_of(pl_module: pl.LightningModule) -> "_Seam | None":
    """The seam in the chain of overrides, if any."""
    current = vars(pl_module).get("training_step")
    while current is not None:
        seam = vars(current).get("seam")
        # An outer override may have copied our attributes (functools.wraps).
        if isinstance(seam, _Seam) and seam.training_step is current:
            return seam
        current = vars(current).get("replaced")
    return None


class _Seam:
    """The wrapped `training_step` of one module, and its transforms."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.members: list[tuple[int, str, Transform]] = []
        self.is_reached = self.has_gone_back = False
        self.regression: str | None = None  # name of a called loss that has no classes

        catch = _Catch(self)  # one for all steps, or torch.compile would recompile each

        @wraps(original)  # Lightning inspects the signature
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self.has_gone_back = False
            with catch:
                output = original(*args, **kwargs)
            if not self.is_reached and (output is not None or self.has_gone_back):
                raise RuntimeError(self.why_not_reached())
            return output

        vars(training_step)["seam"] = self
        self.training_step = training_step

    def handle(self, call: LossCall, position: int = 0) -> Tensor:
        if position == len(self.members):
            return call.compute()
        return self.members[position][2](call, lambda changed: self.handle(changed, position + 1))

    def why_not_reached(self) -> str:
        owners = ", ".join(f"{owner}()" for _, owner, _ in self.members)
        if self.regression is not None:
            return (
                f"{owners}: needs a classification loss; training_step computed {self.regression}, a regression loss."
            )
        names = ", ".join(function.__name__ for function in _REACHABLE)
        return (
            f"{owners}: training_step returned a loss that cannot be reached; compute it by one of "
            f"torch.nn.functional's {names}, or by the torch.nn modules that call them."
        )


class _Catch(TorchFunctionMode):
    def __init__(self, seam: _Seam) -> None:
        super().__init__()
        self.seam = seam

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SIGNATURES:
            self.seam.is_reached = True
            return self.seam.handle(_call_of(func, args, kwargs))
        if func in _REGRESSIONS:
            self.seam.regression = func.__name__
        if func is Tensor.backward:  # a module with manual optimization may return nothing
            self.seam.has_gone_back = True
        return func(*args, **kwargs)


def _call_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossCall:
    arguments = _SIGNATURES[function].bind(*args, **kwargs).arguments
    # torch's older form of `reduction`
    size_average, reduce = arguments.pop("size_average", None), arguments.pop("reduce", None)
    if size_average is not None or reduce is not None:
        arguments["reduction"] = legacy_reduction(size_average, reduce)
    return LossCall(function.__name__, **arguments)
