# SPDX-License-Identifier: Apache-2.0
"""Errors that are there before the first step: equal units, the wrong mode, an average that is longer than the run."""

from lightning_optkit.diagnostics._observations import Check, ModuleSeen, RowsSeen, RunSeen
from lightning_optkit.diagnostics.verdict import ONCE, Verdict

__all__ = ["average_not_ready", "symmetric_init", "wrong_mode"]

_ROUNDING = 1e-3  # theory: equal updates differ by rounding alone, 1e-7 per product, far below this share of the move
_STEPS = 4  # the gradients of a layer behind one that starts at zero arrive from step 1 on
_CHECKS = 3
_SAYS = {
    "dropout": "dropout drops nothing",
    "batch norm": "batch norm uses running statistics that were never collected",
}
_KEEPS = "batch norm leaves its running statistics as they are"  # by itself it is let be: it may be meant


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
        return Verdict("symmetric_init", rows.layer or rows.name, cause, evidence, remedy, 0, 1.0)
    return None


def _stayed_equal(rows: RowsSeen) -> bool:
    if rows.moved == 0:
        return rows.spread == 0 and rows.has_gradient
    return rows.spread <= _ROUNDING * rows.moved


def wrong_mode(run: RunSeen) -> Verdict | None:
    """Layers that act differently in training were in eval mode in the last three measured steps, or the first ones."""
    last = run.checks[-_CHECKS:]
    wrong = [kind for kind in _SAYS if last and all(_all_off(check, kind) for check in last)]
    if not wrong:
        return None
    off = [module for module in last[-1].modules if module.acts and module.is_trained and not module.is_training]
    first = next(module for module in off if module.kind == wrong[0])
    says = [_SAYS[kind] if kind in wrong else _KEEPS for kind in _SAYS if any(m.kind == kind for m in off)]
    cause = f"training_step runs it in eval mode, so {' and '.join(says)}"
    steps = [check.step for check in last]
    evidence = f"{_counted(off, last[-1])} that training_step called had training=False in steps {steps}"
    onset = steps[-1]
    for check in reversed(run.checks):
        if not any(module.name == first.name and _is_off(module) for module in check.modules):
            break
        onset = check.step
    remedy = "self.train() in on_train_start; a model of from_pretrained() comes in eval mode"
    if onset or run.began_in_training:
        remedy = "self.train() in on_train_batch_start; something calls eval() during the fit, and not train() after it"
    confidence = 1.0 if len(last) == _CHECKS else ONCE
    return Verdict("wrong_mode", first.name, cause, evidence, remedy, onset, confidence)


def _all_off(check: Check, kind: str) -> bool:
    found = [module for module in check.modules if module.kind == kind and module.acts and module.is_trained]
    return bool(found) and all(map(_is_off, found))


def _counted(off: list[ModuleSeen], check: Check) -> str:
    parts = []
    for kind in _SAYS:
        names = [module.name for module in off if module.kind == kind]
        num = sum(module.kind == kind and module.acts and module.is_trained for module in check.modules)
        if names:
            many = f"all {num}" if len(names) == num else f"{len(names)} of {num}"
            parts.append(f"{many} {kind} layers" if num > 1 else f"the {kind} layer {names[0]}")
    return " and ".join(parts)


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
