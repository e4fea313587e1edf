# SPDX-License-Identifier: Apache-2.0
"""Errors that are there before the first step: equal units, the wrong mode, an average that is longer than the run."""

from lightning_optkit.diagnostics._observations import ModuleSeen, RowsSeen, RunSeen
from lightning_optkit.diagnostics.verdict import ONCE, Verdict

__all__ = ["average_not_ready", "symmetric_init", "wrong_mode"]

_ROUNDING = 1e-3  # theory: equal updates differ by rounding alone, 1e-7 per product, far below this share of the move
_STEPS = 4  # the gradients of a layer behind one that starts at zero arrive from step 1 on
_CHECKS = 3


def symmetric_init(run: RunSeen) -> Verdict | None:
    """All units of a layer had equal weights before the first step and got equal updates since."""
    if not run.checks or run.checks[-1].step < _STEPS:
        return None
    check = run.checks[-1]
    for rows in check.rows:
        if not _stayed_equal(rows):
            continue
        if rows.moved:
            evidence = f"{rows.num_units} rows of {rows.name} moved by {rows.moved:.2g} and differ by {rows.spread:.2g}"
        else:
            evidence = f"the {rows.num_units} rows of {rows.name} are equal, and no step has changed them"
        cause = (
            f"its {rows.num_units} units started with equal weights and get equal updates: together they are one unit"
        )
        remedy = f'ok.Initialize(ok.init.he), or torch.nn.init.kaiming_normal_(self.get_parameter("{rows.name}"))'
        return Verdict("symmetric_init", rows.layer, cause, evidence, remedy, 0, 1.0)
    return None


def _stayed_equal(rows: RowsSeen) -> bool:
    if rows.moved == 0:
        return rows.spread == 0 and rows.has_gradient
    return rows.spread <= _ROUNDING * rows.moved


def wrong_mode(run: RunSeen) -> Verdict | None:
    """Layers that act differently in training were in eval mode in the last three measured steps, or the first ones."""
    last = run.checks[-_CHECKS:]
    if not last:
        return None
    for kind, says in (
        ("dropout", "drops nothing"),
        ("batch norm", "uses running statistics that were never collected"),
    ):
        found = [[m for m in check.modules if m.kind == kind and m.acts and m.is_trained] for check in last]
        if not all(each and all(map(_is_off, each)) for each in found):
            continue
        first, count = found[-1][0], len(found[-1])
        many = f"all {count} {kind} layers" if count > 1 else f"the {kind} layer {first.name}"
        cause = f"training_step runs it in eval mode, so {kind} {says}"
        evidence = f"{many} that training_step called had training=False in steps {[check.step for check in last]}"
        onset = next(c.step for c in run.checks if any(m.name == first.name and _is_off(m) for m in c.modules))
        remedy = "self.train() in on_train_start; a model of from_pretrained() comes in eval mode"
        confidence = 1.0 if len(last) == _CHECKS else ONCE
        return Verdict("wrong_mode", first.name, cause, evidence, remedy, onset, confidence)
    return None


def _is_off(module: ModuleSeen) -> bool:
    return not module.is_training and (module.kind == "dropout" or module.is_fresh)


def average_not_ready(run: RunSeen) -> Verdict | None:
    """An exponential average that reaches back over more steps than it will see."""
    for average in run.averages:
        cause = "the average still holds the first weights when the run ends, and that is what is evaluated"
        evidence = (
            f"{average.text} reaches back over {average.reach:,.0f} steps and sees {average.steps:,}: "
            f"{average.share_of_first:.0%} of it are the first weights"
        )
        return Verdict("average_not_ready", None, cause, evidence, f"ok.WeightAveraging(ok.{average.fitting})", 0, 1.0)
    return None
