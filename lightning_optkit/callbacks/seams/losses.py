# SPDX-License-Identifier: Apache-2.0
"""The one seam through which callbacks change the loss of an unchanged module.

    def transform(call: LossCall, loss: Loss) -> Tensor:
        return loss(call.changed(label_smoothing=0.1))

    intercept(pl_module, "MyCallback", transform, SMOOTHING)         # in setup("fit")
    release(pl_module, transform)                                    # in teardown and on_exception

`training_step` is wrapped; while it runs, a TorchFunctionMode catches the module's calls of `F.cross_entropy`,
`F.nll_loss`, `F.binary_cross_entropy_with_logits` and `F.binary_cross_entropy`, also those inside `nn.CrossEntropyLoss`
and its like, whichever way their arguments were passed. A transform gets the call and `loss`, which computes the
rest of the chain: hand `loss` a changed call, or several, and return what the module shall get.

- Order: `TARGETS` (which examples a prediction is held against: Mixup) stands outside of `SMOOTHING` (how sharp those
  targets are), and that outside of `WATCHING` (who only looks at the final call). Within one order: first come, first
  called. A mixture of two examples is best the mixture of two losses, which is right for class weights,
  `ignore_index`, any reduction that sums or averages, and targets of any shape:
  `share * loss(call) + (1 - share) * loss(call.changed(target=call.target[partners]))`.
- Reached or not: the first `training_step` that returns a loss, or goes back through one itself (manual optimization),
  without having reached one of the four functions raises, naming the owners. A transform that cannot handle a call
  raises by itself.
- Only training: validation, test and prediction run without the seam.
- Cost: about 1.7 us per torch call inside `training_step`.
- Autocast, DDP and compiled modules: the functions run where the module called them, in the same context. Inside a
  compiled part a number that changes from step to step must be a tensor, or each step compiles anew.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, TypeAlias

import lightning.pytorch as pl
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_optkit._torch_private import legacy_reduction
from lightning_optkit.callbacks.seams.overrides import override, restore

__all__ = ["SMOOTHING", "TARGETS", "WATCHING", "Loss", "LossCall", "Transform", "intercept", "release"]

TARGETS, SMOOTHING, WATCHING = 0, 1, 2


@dataclass(frozen=True)
class LossCall:
    """One call of a loss function, with every argument by name; those that the function lacks keep their defaults.

    Args:
        name: Of the function: "cross_entropy", "nll_loss", "binary_cross_entropy_with_logits", "binary_cross_entropy".
        input: Logits, log-probabilities (nll_loss) or probabilities (binary_cross_entropy).
        target: Class indices or probabilities, as torch takes them; nll_loss may be given probabilities as well.
        weight: Per class, or per element for the binary functions.
        pos_weight: Of binary_cross_entropy_with_logits.
        ignore_index: Of cross_entropy and nll_loss.
        reduction: "mean", "sum" or "none".
        label_smoothing: Of cross_entropy; nll_loss may be given it as well.
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
        """Is every element a question of its own?"""
        return self.name.startswith("binary")

    @property
    def has_soft_target(self) -> bool:
        """Are the targets probabilities, one per element of `input`?"""
        return self.is_binary or (self.target.is_floating_point() and self.target.shape == self.input.shape)

    def changed(self, **arguments: Any) -> "LossCall":
        """The call with other arguments."""
        return replace(self, **arguments)

    def compute(self) -> Tensor:
        """What torch returns for it."""
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
        # The softmax of log-probabilities is the probabilities: nll_loss is cross_entropy, which can do more.
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
    """Lets `transform` handle the loss calls of `pl_module.training_step` until it is released.

    Args:
        pl_module: The module, which is otherwise left as it is.
        owner: Callback to name if the loss cannot be reached.
        transform: Called with every call of a loss function, and with what computes the rest.
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
    """Undoes `intercept`; does nothing for a transform that is not there."""
    seam = _seam_of(pl_module)
    if seam is None:
        return
    # `==`, not `is`: a bound method is a new object each time it is looked up.
    seam.members = [member for member in seam.members if member[2] != transform]
    if not seam.members:
        restore(pl_module, "training_step", seam.training_step)


def _seam_of(pl_module: pl.LightningModule) -> "_Seam | None":
    """The seam in the chain of overrides, if there is one."""
    current = vars(pl_module).get("training_step")
    while current is not None:
        seam = vars(current).get("seam")
        # An override on top of ours may have copied its attributes (functools.wraps).
        if isinstance(seam, _Seam) and seam.training_step is current:
            return seam
        current = vars(current).get("replaced")
    return None


class _Seam:
    """The wrapped `training_step` of one module, and who looks into it."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.members: list[tuple[int, str, Transform]] = []
        self.is_reached = self.has_gone_back = False
        self.regression: str | None = None  # a loss that was called and has no classes

        catch = _Catch(self)  # one for all steps, or torch.compile would compile for each

        @wraps(original)  # Lightning looks at the signature
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
        if func is Tensor.backward:  # of a module that optimizes manually, and may return nothing
            self.seam.has_gone_back = True
        return func(*args, **kwargs)


def _call_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossCall:
    arguments = _SIGNATURES[function].bind(*args, **kwargs).arguments
    # torch's older spelling of `reduction`
    size_average, reduce = arguments.pop("size_average", None), arguments.pop("reduce", None)
    if size_average is not None or reduce is not None:
        arguments["reduction"] = legacy_reduction(size_average, reduce)
    return LossCall(function.__name__, **arguments)
