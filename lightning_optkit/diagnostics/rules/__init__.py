# SPDX-License-Identifier: Apache-2.0
"""From what was seen to what is wrong: one small pure function per symptom, asked in a fixed order.

Exact findings come first, since they have no threshold; among them, those that explain others come before those they
explain: a weight that is in no optimizer would also look like one that is lost in rounding.
"""

from collections.abc import Callable, Iterable

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.gradients import gradient_not_zeroed, lost_updates, no_gradient, not_optimized
from lightning_optkit.diagnostics.rules.nonfinite import nonfinite
from lightning_optkit.diagnostics.rules.processes import duplicate_data, ranks_diverge
from lightning_optkit.diagnostics.rules.schedules import schedule_fault
from lightning_optkit.diagnostics.rules.setup import average_not_ready, symmetric_init, wrong_mode
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["EXACT", "diagnose", "ranked"]

Rule = Callable[[RunSeen], Verdict | None]

EXACT: tuple[Rule, ...] = (
    ranks_diverge, gradient_not_zeroed, no_gradient, not_optimized, schedule_fault, symmetric_init, wrong_mode,
    nonfinite, lost_updates, duplicate_data, average_not_ready,
)  # fmt: skip


_RANKS = {rule.__name__: place for place, rule in enumerate(EXACT)}


def ranked(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """One verdict per symptom, the first of each, in the order in which one explains another."""
    first: dict[str, Verdict] = {}
    for verdict in verdicts:
        first.setdefault(verdict.symptom, verdict)
    return sorted(first.values(), key=lambda verdict: _RANKS[verdict.symptom])


def diagnose(run: RunSeen) -> list[Verdict]:
    """All findings, the primary one first."""
    return [verdict for rule in EXACT if (verdict := rule(run)) is not None]
