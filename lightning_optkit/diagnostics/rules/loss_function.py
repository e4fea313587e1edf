# SPDX-License-Identifier: Apache-2.0
"""An output that its loss function does not expect: exact, from the functions that were called."""

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics._signals import LossSeen
from lightning_optkit.diagnostics.verdict import ONCE, Verdict

__all__ = ["loss_does_not_match_output"]

_CHECKS = 3
_ROUNDING = 1e-3  # of a loss in 16 bits
_FALLS = 2.0  # judgement: the noise of batches does not double a loss
_BOUNDED = ("softmax", "sigmoid", "tanh")  # theory: of such logits no class is certain
_OUTSIDE = 0.05  # judgement: so many targets cannot be reached


def loss_does_not_match_output(run: RunSeen) -> Verdict | None:
    """The same mismatch in every measured step, be it the first; what depends on the batch, in three at least."""
    negated = _negated(run)
    if negated is not None:
        return negated
    steps = [check.losses for check in run.checks]
    if not steps or not all(steps):
        return None
    for place in range(min(map(len, steps))):
        is_sure = len(steps) >= _CHECKS
        found = [_mismatch(losses[place]) or (_unreached(losses[place]) if is_sure else None) for losses in steps]
        if all(found) and found[0] is not None:
            cause, evidence, remedy = found[0]
            confidence = 1.0 if is_sure else ONCE
            return Verdict("loss_does_not_match_output", None, cause, evidence, remedy, 0, confidence)
    return None


def _negated(run: RunSeen) -> Verdict | None:
    """The loss is that of torch times -1, and doubles, so that it is no optimizer that maximizes."""
    first = run.losses.first
    early = [check for check in run.checks if check.step < len(first)]
    if len(early) < _CHECKS or any(len(check.losses) != 1 for check in early):
        return None
    seen = [(check.returned, check.losses[0]) for check in early]  # that of the step is a mean over several batches
    if not all(each.value > 0 and abs(loss + each.value) <= _ROUNDING * each.value for loss, each in seen):
        return None
    begin, end = sum(first[:_CHECKS]) / _CHECKS, sum(run.losses.last(_CHECKS)) / _CHECKS
    if end >= _FALLS * begin:
        return None
    call = f"F.{seen[0][1].function}"
    cause = f"the loss is {call} times -1, which has no lower bound, so training makes the predictions worse"
    evidence = f"{call} gave {seen[0][1].value:.3g} where the loss was {seen[0][0]:.3g}, and it fell to {end:.3g}"
    return Verdict(
        "loss_does_not_match_output", None, cause, evidence, f"return {call}(...), without the minus", 0, 1.0
    )


def _mismatch(loss: LossSeen) -> tuple[str, str, str] | None:
    call = f"F.{loss.function}"
    if loss.is_one:
        cause = "the softmax of a single output is always 1, so nothing can be learned"
        remedy = "F.binary_cross_entropy_with_logits on the output, without softmax"
        return cause, f"all that {call} was given is 1, the result of softmax", remedy
    if loss.function in ("cross_entropy", "binary_cross_entropy_with_logits") and loss.behind:
        cause = f"{call} takes logits of any size, but is given the result of {loss.behind}, so it cannot come near 0"
        contains = loss.behind in ("softmax", "sigmoid")
        why = "the loss contains it" if contains else "logits are of any sign and size"
        return cause, f"{loss.behind} gave what {call} was given", f"leave {loss.behind} out: {why}"
    if loss.function == "nll_loss" and not loss.is_log:
        cause = "F.nll_loss takes logarithms of probabilities, but is given something else"
        evidence = "the exponentials of a row do not add up to 1"
        return cause, evidence, "F.cross_entropy on the logits, or F.log_softmax(logits, dim=1) in front"
    if loss.function == "nll_loss" and loss.behind in _BOUNDED:
        cause = f"log_softmax takes logits of any size, but is given the result of {loss.behind}, so {call} cannot "
        evidence = f"{loss.behind} gave what log_softmax was given, and that what {call} was given"
        why = "log_softmax contains it" if loss.behind == "softmax" else "logits are of any size"
        return cause + "come near 0", evidence, f"leave {loss.behind} out: {why}"
    if loss.function == "cross_entropy" and loss.classes == 1:
        cause = "the softmax of a single output is always 1, so the loss is always 0"
        return cause, f"output and target have shapes {loss.shapes}", "F.binary_cross_entropy_with_logits"
    if loss.is_broadcast:
        cause = "output and target have different shapes, so every output is compared with every target"
        return cause, f"{call} was given shapes {loss.shapes}", "output.squeeze(-1), or target.unsqueeze(-1)"
    return None


def _unreached(loss: LossSeen) -> tuple[str, str, str] | None:
    if loss.behind and loss.outside > _OUTSIDE:
        cause = f"the result of {loss.behind} cannot reach the targets"
        evidence = f"{loss.outside:.0%} of the targets lie outside of what {loss.behind} gives"
        return cause, evidence, f"leave {loss.behind} out of the last layer"
    return None
