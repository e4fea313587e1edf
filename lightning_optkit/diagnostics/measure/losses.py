# SPDX-License-Identifier: Apache-2.0
"""One call of a loss function of torch: whether its output fits, and what a constant prediction would score."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_optkit.diagnostics._signals import LossSeen
from lightning_optkit.diagnostics.measure.wide import wide

__all__ = ["LOSSES", "arguments_of", "loss_seen"]

_CLASSES: dict[Any, str] = {F.cross_entropy: "cross_entropy", F.nll_loss: "nll_loss"}
_BINARY: dict[Any, str] = {
    F.binary_cross_entropy: "binary_cross_entropy",
    F.binary_cross_entropy_with_logits: "binary_cross_entropy_with_logits",
}
_REGRESSION: dict[Any, str] = {
    F.mse_loss: "mse_loss", F.l1_loss: "l1_loss", F.smooth_l1_loss: "smooth_l1_loss", F.huber_loss: "huber_loss",
}  # fmt: skip
LOSSES = {**_CLASSES, **_BINARY, **_REGRESSION}
_SIGNATURES = {function: inspect.signature(function) for function in LOSSES}
_RANGES = {"relu": (0.0, float("inf")), "sigmoid": (0.0, 1.0), "softmax": (0.0, 1.0), "tanh": (-1.0, 1.0)}
_NAN = float("nan")


def arguments_of(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, those that were left out included."""
    bound = _SIGNATURES[function].bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


@torch.no_grad()
def loss_seen(function: Any, args: Any, kwargs: Any, result: Tensor, behind: str | None) -> LossSeen:
    """What was seen of a call; `behind` is the activation whose result it was given, unchanged."""
    arguments = arguments_of(function, args, kwargs)
    given, target = arguments["input"].detach().float(), arguments["target"].detach()
    is_weighted = any(arguments.get(name) is not None for name in ("weight", "pos_weight"))
    reduction = arguments.get("reduction")
    constant = _NAN if is_weighted or reduction not in ("mean", "sum") else _constant(function, arguments)
    floor = _floor(function, arguments)
    if reduction == "sum":
        terms = _terms(function, arguments)
        constant, floor = constant * terms, floor * terms
    classes = given.shape[1] if function in _CLASSES and given.ndim > 1 else given.shape[-1] if given.ndim else 1
    (common, num_common, missed_common, num_others, missed_others), present = _predictions(function, given, arguments)
    outside, mean, std = 0.0, _NAN, _NAN
    if function in _REGRESSION:
        low, high = _RANGES.get(behind or "", (-float("inf"), float("inf")))
        numbers = wide(target)
        outside = float(((numbers < low) | (numbers > high)).float().mean())
        mean, std = float(numbers.mean()), float(numbers.std(correction=0))
    return LossSeen(
        function=LOSSES[function],
        behind=behind,
        classes=int(classes),
        is_log=function is not F.nll_loss or _is_log(given),
        is_broadcast=function in _REGRESSION and given.shape != target.shape,
        shapes=f"{tuple(given.shape)} and {tuple(target.shape)}",
        outside=outside,
        target_mean=mean,
        target_std=std,
        output_rms=float(wide(given).square().mean().sqrt()),
        value=float(result.detach()) if result.numel() == 1 else _NAN,
        constant=constant,
        is_summed=reduction == "sum",
        common=common,
        num_common=num_common,
        missed_common=missed_common,
        num_others=num_others,
        missed_others=missed_others,
        output_std=float(wide(given).std(correction=0)),
        floor=floor,
        present=present,
        samples=len(target) if target.ndim else 1,
        is_one=behind == "softmax" and bool((given == 1).all()),
    )


def _is_log(given: Tensor) -> bool:
    """Whether the rows are logarithms of probabilities."""
    return given.ndim < 2 or bool((given.logsumexp(1).abs() < 1e-2).all())


def _predictions(function: Any, given: Tensor, arguments: Any) -> tuple[list[int], tuple[int, ...]]:
    """The most frequent class; the number of its samples, and of those that were missed; both of the others. Then all
    classes that are there.
    """
    unknown, target = ([-1, 0, 0, 0, 0], ()), arguments["target"].detach()
    if function in _BINARY:
        if not given.ndim or len(given) != given.numel() or given.numel() != target.numel():
            return unknown  # several answers per sample
        bound = 0.0 if function is F.binary_cross_entropy_with_logits else 0.5
        said, true = given.reshape(-1) > bound, target.reshape(-1) > 0.5
    elif function in _CLASSES and given.ndim > 1 and not target.is_floating_point():
        counted = target.reshape(-1) != arguments["ignore_index"]
        said, true = given.argmax(1).reshape(-1)[counted], target.reshape(-1)[counted]
    else:
        return unknown
    if not len(true):
        return unknown
    common = true.long().mode().values
    is_common, is_missed = true == common, said != true
    counts = [is_common, is_common & is_missed, ~is_common, ~is_common & is_missed]
    numbers = torch.stack([common, *(each.sum() for each in counts)]).tolist()
    present = true.unique().tolist() if len(true) == len(given) else ()  # places of one sample are much alike
    return [int(each) for each in numbers], tuple(int(each) for each in present)


def _terms(function: Any, arguments: Any) -> int:
    """Number of terms of the sum."""
    target = arguments["target"]
    if function not in _CLASSES:
        return int(arguments["input"].numel())
    if target.is_floating_point():
        return int(target.numel() // max(target.shape[1], 1)) if target.ndim > 1 else 1
    return int((target != arguments["ignore_index"]).sum())


def _floor(function: Any, arguments: Any) -> float:
    """The mean entropy of each sample's own targets, which no prediction comes below; 0 for classes."""
    target = arguments["target"].detach()
    if function in _BINARY:
        share = wide(target).clamp(0, 1)
        return float((torch.special.entr(share) + torch.special.entr(1 - share)).mean())
    smoothing, given = arguments.get("label_smoothing", 0.0), arguments["input"]
    if function is not F.cross_entropy or given.ndim < 2 or not target.numel():
        return 0.0
    if target.is_floating_point():
        shares = wide(target) * (1 - smoothing) + smoothing / target.shape[1]
        return float(torch.special.entr(shares).sum(1).mean())
    other = torch.tensor(smoothing / given.shape[1])
    own = 1 - smoothing + other
    return float(torch.special.entr(own) + (given.shape[1] - 1) * torch.special.entr(other))


def _constant(function: Any, arguments: Any) -> float:
    """The loss of the best constant prediction for these targets."""
    target = arguments["target"].detach()
    if function in _CLASSES:
        given = arguments["input"]
        if given.ndim < 2:
            return _NAN
        few = 0.0
        if target.is_floating_point():
            shares = wide(target).movedim(1, -1).reshape(-1, target.shape[1]).mean(0)
        else:
            counted = target.reshape(-1)[target.reshape(-1) != arguments["ignore_index"]]
            shares = wide(torch.bincount(counted, minlength=given.shape[1])) / max(len(counted), 1)
            few = (int((shares > 0).sum()) - 1) / (2 * max(len(counted), 1))  # Miller 1955: the bias of few samples
        smoothing = arguments.get("label_smoothing", 0.0)
        return few + float(torch.special.entr(shares * (1 - smoothing) + smoothing / len(shares)).sum())
    numbers = wide(target).reshape(len(target), -1) if target.ndim else wide(target).reshape(1, 1)
    if function in _BINARY:
        share = numbers.mean(0).clamp(0, 1)
        return float((torch.special.entr(share) + torch.special.entr(1 - share)).mean())
    centered = numbers - numbers.mean(0)
    if function is F.mse_loss:
        # Of a few samples the variance about their own mean is too small.
        return float(centered.square().mean()) * len(numbers) / max(len(numbers) - 1, 1)
    return float((numbers - numbers.median(0).values).abs().mean()) if function is F.l1_loss else _NAN
