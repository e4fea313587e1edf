# SPDX-License-Identifier: Apache-2.0
"""Units that are closed from the first step on, so that no gradient passes; said only of a run that learns badly."""

from collections.abc import Sequence

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics._signals import ActivationSeen
from lightning_optkit.diagnostics.rules.outcome import outcome_of
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["closed_later", "dead_units", "saturated_units"]

_LEARNS = 0.5  # calibrated: see `outcome`
_SHARE = 0.5  # theory: half of the units of a layer are lost
_LOW = 0.5  # judgement: the biases are most of what the layer gives
_SAMPLES = 128  # a unit that is open for 5 % of the samples is taken for closed with probability 0.001
_ALL_UNITS, _FEW_SAMPLES = 8, 32  # judgement: where none of so many units was open for any of so many samples


def dead_units(run: RunSeen) -> Verdict | None:
    """ReLUs that were 0 for every sample before the first update, and are since."""
    found = _closed(run, ("relu",))
    if found is None:
        return None
    cause = "its ReLUs are 0 for every sample since initialization, so no gradient passes them"
    evidence = f"{found.closed_since:.0%} of its units gave 0 for all of {found.samples:,} samples"
    remedy = "ok.Initialize(ok.init.he), or LeakyReLU"
    low = [each for each in run.checks[0].layers if each.bias < -_LOW * each.out_rms]
    if low:
        name = low[0].name
        cause = f"the bias of {name} is so low that its ReLUs are 0 for every sample, and no gradient passes them"
        evidence += f"; the biases have mean {low[0].bias:.3g}, the outputs a root mean square of {low[0].out_rms:.3g}"
        one = f'torch.nn.init.zeros_(self.get_parameter("{name}.bias")), or ok.Initialize(ok.init.he)'
        several = f"ok.Initialize(ok.init.he), which sets the biases to 0, those of all {len(low)} such layers"
        remedy = one if len(low) == 1 else several
    return Verdict("dead_units", found.layer or None, cause, evidence, remedy, 0, 0.9)


def saturated_units(run: RunSeen) -> Verdict | None:
    """A tanh or sigmoid that was at its bounds before the first update."""
    found = _closed(run, ("tanh", "sigmoid"))
    if found is None:
        return None
    cause = f"its {found.function} units sit at their bounds since initialization, where the slope is almost 0"
    evidence = f"the mean slope of {found.closed:.0%} of its units is below a twentieth of the largest"
    remedy = "ok.Initialize(ok.init.xavier), normalized inputs, or a norm in front of it"
    return Verdict("saturated_units", found.layer or None, cause, evidence, remedy, 0, 0.85)


def closed_later(run: RunSeen) -> ActivationSeen | None:
    """The first activation of which half of the units were open in the first step and over half are closed now."""
    if len(run.checks) < 3 or run.checks[0].step != 0:
        return None
    first, last = run.checks[0].activations, run.checks[-1].activations
    if len(first) != len(last):
        return None
    for before, now in zip(first, last, strict=True):
        if before.closed <= _SHARE < now.closed_since and now.samples >= _SAMPLES:
            return now
    return None


def _closed(run: RunSeen, functions: Sequence[str]) -> ActivationSeen | None:
    """The last check's activation of the first such place that was closed in the first step and is in the last."""
    if len(run.checks) < 3 or run.checks[0].step != 0 or not outcome_of(run).is_below(_LEARNS):
        return None
    first, last = run.checks[0].activations, run.checks[-1].activations
    if len(first) != len(last):
        return None
    for before, now in zip(first, last, strict=True):
        is_closed = now.closed_since if now.function == "relu" else now.closed
        is_all = is_closed == 1.0 and now.units >= _ALL_UNITS and now.samples >= _FEW_SAMPLES
        is_sure = is_all or now.samples >= _SAMPLES
        if before.function in functions and before.closed > _SHARE and is_closed > _SHARE and is_sure:
            return now
    return None
