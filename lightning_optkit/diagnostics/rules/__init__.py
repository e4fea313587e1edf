# SPDX-License-Identifier: Apache-2.0
"""From what was seen to what is wrong: one small pure function per symptom, asked in a fixed order.

Exact findings come first, since they have no threshold; among them, those that explain others come before those they
explain: a weight that is in no optimizer would also look like one that is lost in rounding.
"""

from collections.abc import Callable, Iterable

from lightning_optkit.diagnostics._guard import Guarding, unguarded
from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.classes import class_imbalance
from lightning_optkit.diagnostics.rules.course import overfitting
from lightning_optkit.diagnostics.rules.gradients import gradient_not_zeroed, lost_updates, no_gradient, not_optimized
from lightning_optkit.diagnostics.rules.labels import label_shuffle, shuffled_or_weak
from lightning_optkit.diagnostics.rules.last_resorts import constant_input, input_ignored
from lightning_optkit.diagnostics.rules.loss_function import loss_does_not_match_output
from lightning_optkit.diagnostics.rules.nonfinite import nonfinite
from lightning_optkit.diagnostics.rules.outcome import judged, outcome_of
from lightning_optkit.diagnostics.rules.processes import duplicate_data, ranks_diverge
from lightning_optkit.diagnostics.rules.rates import lr_too_high, lr_too_low
from lightning_optkit.diagnostics.rules.scales import (
    bad_init_scale,
    exploding_gradient,
    unnormalized_input,
    unscaled_target,
    vanishing_gradient,
)
from lightning_optkit.diagnostics.rules.schedules import schedule_fault
from lightning_optkit.diagnostics.rules.setup import average_not_ready, symmetric_init, wrong_mode
from lightning_optkit.diagnostics.rules.spikes import loss_spike
from lightning_optkit.diagnostics.rules.units import dead_units, saturated_units
from lightning_optkit.diagnostics.rules.zero_gradients import zero_gradients
from lightning_optkit.diagnostics.verdict import ONCE, Verdict

__all__ = ["COURSE", "EXACT", "LAST_RESORTS", "OF_LEARNING", "asked", "diagnose", "is_exact", "ranked"]

Rule = Callable[[RunSeen], Verdict | None]

EXACT: tuple[Rule, ...] = (
    ranks_diverge, gradient_not_zeroed, no_gradient, not_optimized, schedule_fault, symmetric_init, wrong_mode,
    lost_updates, loss_does_not_match_output, nonfinite, duplicate_data, average_not_ready,
)  # fmt: skip
# What comes first explains what follows: inputs saturate units, large weights look like a large rate.
OF_LEARNING: tuple[Rule, ...] = (
    unnormalized_input, unscaled_target, bad_init_scale, saturated_units, dead_units, vanishing_gradient,
    exploding_gradient, loss_spike, lr_too_high, lr_too_low, class_imbalance,
)  # fmt: skip
COURSE: tuple[Rule, ...] = (overfitting,)
LAST_RESORTS: tuple[Rule, ...] = (input_ignored, label_shuffle, shuffled_or_weak)

_LEARNS_ALL = 0.95  # above all bounds of progress in the rules
_EXACT = {rule.__name__ for rule in EXACT}
_BEHIND = {"nonfinite", "duplicate_data", "average_not_ready"}  # a cause that diverged comes before what it ended in
_ORDER = [
    *(rule.__name__ for rule in EXACT if rule.__name__ not in _BEHIND), *(rule.__name__ for rule in OF_LEARNING),
    "nonfinite", "duplicate_data", "average_not_ready", *(rule.__name__ for rule in (*COURSE, *LAST_RESORTS)),
]  # fmt: skip


def is_exact(verdict: Verdict) -> bool:
    """Whether it has no threshold on how well the run learns, and was seen often enough to stand once it is said."""
    return verdict.symptom in _EXACT and verdict.confidence > ONCE


def ranked(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """One verdict per symptom, the first of each, in the order in which one explains another."""
    first: dict[str, Verdict] = {}
    for verdict in verdicts:
        first.setdefault(verdict.symptom, verdict)
    return sorted(first.values(), key=lambda verdict: _ORDER.index(verdict.symptom))


def asked(rules: Iterable[Rule], run: RunSeen, guard: Guarding = unguarded) -> list[Verdict]:
    """What each rule says, without those that say nothing; each stands in a guard of its own."""
    said: list[Verdict | None] = []
    for rule in rules:
        with guard(f"the rule {rule.__name__}"):
            said.append(rule(run))
    return [verdict for verdict in said if verdict is not None]


def diagnose(run: RunSeen, guard: Guarding = unguarded) -> list[Verdict]:
    """All findings, the primary one first."""
    is_judged = False
    with guard("the judgement of how much was learned"):
        run, is_judged = judged(run), True
    exact = asked(EXACT, run, guard)
    if not is_judged:
        return ranked(exact)
    outcome = outcome_of(run)
    has_diverged = outcome.has_diverged
    explained = [v for v in exact if v.symptom not in _BEHIND or (v.symptom == "nonfinite" and not has_diverged)]
    if explained:  # an error of the program explains why it learns badly
        return ranked(exact)
    constant = asked([constant_input], run, guard)
    if constant:
        return ranked([*exact, *constant])
    rules = (bad_init_scale,) if outcome.progress > _LEARNS_ALL else OF_LEARNING  # the others are silent then
    of_learning = asked(rules, run, guard)
    if any(
        verdict.symptom == "lr_too_high" for verdict in of_learning
    ):  # what it destroyed is learned again at any rate
        of_learning = [verdict for verdict in of_learning if verdict.symptom != "lr_too_low"]
    if all(verdict.symptom == "lr_too_low" for verdict in of_learning):  # a rule for what makes the loss flat is first
        of_learning = asked([zero_gradients], run, guard) or of_learning
    if not of_learning:
        of_learning = asked(COURSE, run, guard)
    if not of_learning:
        of_learning = asked(LAST_RESORTS, run, guard)
    return ranked([*exact, *of_learning])
