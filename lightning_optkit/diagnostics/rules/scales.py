# SPDX-License-Identifier: Apache-2.0
"""The scale of inputs, targets and initial weights in the first steps; said only of a run that learns badly."""

import math
import statistics

from lightning_optkit.diagnostics._observations import Check, RunSeen
from lightning_optkit.diagnostics._signals import LayerSeen
from lightning_optkit.diagnostics.rules.outcome import holds_below, outcome_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["bad_init_scale", "exploding_gradient", "unnormalized_input", "unscaled_target", "vanishing_gradient"]

_LEARNS = 0.5  # calibrated: see `outcome`
_LEARNS_WELL, _LEARNS_ALL = 0.9, 0.95  # calibrated: for what slows learning down without stopping it
_SPREAD, _RMS = 30.0, 10.0  # theory: the condition of the curvature is their square; 10: calibrated
_OFFSET = 0.5  # judgement: half of the features; images have constant borders
_TARGET = 10.0  # calibrated: an initialized network gives about 1
_PLACE, _VARIES = 2.0, 0.1  # judgement: of the loss of a constant; of the targets, what a last layer soon makes up for
_FADES = 1e-3  # theory: a factor of 1/2 per layer over ten layers
_LARGE, _SMALL = 2.0, 0.15  # theory: 1 to 1.7 keep the scale over a layer, torch's own initialization has 0.58
_HIGH = 2.0  # theory: independent logits of variance 1 begin at the loss of a constant prediction plus 1/2


def unnormalized_input(run: RunSeen) -> Verdict | None:
    """Features whose scales or means are far apart or far from 1, in front of a layer without a norm."""
    seen = [check.first_input for check in run.checks[:3] if check.first_input is not None]
    if len(seen) < 2 or not outcome_of(run).is_below(_LEARNS_WELL):
        return None
    found = seen[0]
    if found.is_constant:
        return None
    wide = all(each.spread > _SPREAD for each in seen)
    if not (wide or all(each.offset > _OFFSET for each in seen) or all(each.rms > _RMS for each in seen)):
        return None
    cause = "the inputs are not normalized, so some directions of the weights learn far slower than others, or diverge"
    evidence = (
        f"the input of {found.layer} has a root mean square of {found.rms:.3g}; the deviation of its features "
        f"varies {found.spread:.3g} times; {found.offset:.0%} of them lie over ten deviations from 0"
    )
    which = "" if found.feature_dim == -1 else f"feature_dim={found.feature_dim}"
    remedy = f"ok.Preprocess(ok.data.Standardize({which})), or a BatchNorm in front"
    return Verdict("unnormalized_input", found.layer, cause, evidence, remedy, 0, 0.9)


def unscaled_target(run: RunSeen) -> Verdict | None:
    """Targets of a regression far from the scale that an initialized network gives."""
    seen = [check.losses[0] for check in run.checks[:3] if len(check.losses) == 1]
    if len(seen) < 2 or not outcome_of(run).is_below(_LEARNS):
        return None
    if _begins_in_place(run):
        return None
    if not all(max(abs(each.target_mean), each.target_std) > _TARGET for each in seen):  # NaN: no regression
        return None
    first = seen[0]
    cause = "the targets are not scaled, so that the bias of the last layer alone needs most of the run"
    evidence = (
        f"targets have mean {first.target_mean:.3g} and deviation {first.target_std:.3g}; the network began with "
        f"outputs of {first.output_rms:.2g}"
    )
    scaled = "y = (y - y_train.mean()) / y_train.std()"
    where = "where y_train are all training targets; back for predictions"
    remedy = f"{scaled} in training_step and validation_step, {where}"
    return Verdict("unscaled_target", None, cause, evidence, remedy, 0, 0.9)


def _begins_in_place(run: RunSeen) -> bool:
    """Whether the first outputs are where the targets are, and vary with them: the network scales them by itself."""
    first = run.checks[0].losses[0]
    near = first.value < _PLACE * first.constant and first.output_std > _VARIES * first.target_std
    return run.checks[0].step == 0 and near


def bad_init_scale(run: RunSeen) -> Verdict | None:
    """Initial weights whose gain over most layers makes the signal grow or fade."""
    layers = _first_layers(run)
    if len(layers) < 2:
        return None
    gain = statistics.median(layer.gain for layer in layers)
    first = run.checks[0].losses[0] if run.checks[0].losses else None
    begins_high = first is not None and first.value > _HIGH * first.constant  # NaN: not known
    slows = begins_high and holds_below(run, _LEARNS_WELL)
    is_large = gain > _LARGE and (slows or outcome_of(run).is_below(_LEARNS))
    hurts = outcome_of(run).is_below(_LEARNS) or _over_depth(run, "vanishing_gradient") is not None
    if not is_large and not (gain < _SMALL and hurts):
        return None
    what = "grows" if is_large else "fades"
    size = "large" if is_large else "small"
    cause = f"the initial weights are too {size}, so that the signal {what} from layer to layer"
    evidence = f"the median gain of {len(layers)} layers is {gain:.2g}, where 1 to 1.7 keeps the scale"
    remedy = "ok.Initialize(ok.init.he), or torch's own initialization"
    return Verdict("bad_init_scale", layers[0].name, cause, evidence, remedy, 0, 0.8)


def vanishing_gradient(run: RunSeen) -> Verdict | None:
    """Gradients that fade on their way back, in the first step."""
    return _over_depth(run, "vanishing_gradient")


def exploding_gradient(run: RunSeen) -> Verdict | None:
    """Gradients that grow on their way back, in the first step."""
    return _over_depth(run, "exploding_gradient")


def _over_depth(run: RunSeen, symptom: str) -> Verdict | None:
    layers = [layer for layer in _first_layers(run) if layer.grad_rms > 0]
    if len(layers) < 3 or not outcome_of(run).is_below(_LEARNS_ALL):
        return None
    first, last = layers[0], layers[-1]
    ratio = first.grad_rms / last.grad_rms
    fades = symptom == "vanishing_gradient"
    if not (ratio < _FADES if fades else ratio > 1 / _FADES):
        return None
    what, less, then = ("fades", "smaller", "hardly learn") if fades else ("grows", "larger", "jump")
    cause = f"the gradient {what} on its way back through the layers, so the first ones {then}"
    times = 1 / ratio if fades else ratio
    evidence = f"in the first step the gradient at {first.name} was {times:.3g} times {less} than at {last.name}"
    remedy = "ok.Initialize(ok.init.he), a norm in each layer, or residual connections"
    sigmoids = sum(each.function == "sigmoid" for each in run.checks[0].activations)
    if fades and sigmoids >= len(layers) / 2:  # theory: the slope of a sigmoid is at most 1/4
        cause = (
            f"each of {sigmoids} sigmoid layers passes on a quarter of the gradient at most, so the first hardly learn"
        )
        remedy = "nn.ReLU() in place of nn.Sigmoid(), with ok.Initialize(ok.init.he)"
    return Verdict(symptom, first.name, cause, evidence, remedy, 0, 0.85)


def _first_layers(run: RunSeen) -> list[LayerSeen]:
    first: Check | None = run.checks[0] if run.checks else None
    if first is None or first.step != 0:
        return []
    return [layer for layer in first.layers if math.isfinite(layer.gain)]
