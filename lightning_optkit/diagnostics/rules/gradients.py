# SPDX-License-Identifier: Apache-2.0
"""Gradients that do not arrive, are not used, are not cleared, or are lost in rounding."""

import math

from lightning_optkit.diagnostics._observations import Check, IdleSeen, ParameterSeen, RunSeen
from lightning_optkit.diagnostics.rules.outcome import is_under_way, outcome_of
from lightning_optkit.diagnostics.verdict import ONCE, Verdict

__all__ = ["ATTACHED", "gradient_not_zeroed", "lost_updates", "no_gradient", "not_optimized"]

_STEPS_WITHOUT = 20  # calibrated: a branch taken with probability 1/2 is silent so long once in a million runs
_STEPS_UNDER_NO_GRAD = 4  # exact: no gradient can arrive then; before, it is said as long as it is seen
ATTACHED = (
    "return the loss as it is computed from the output: without detach(), item(), numpy(), argmax(), "
    "torch.tensor(...), torch.no_grad() and requires_grad_()"
)
_LOST = 0.5  # theory: most of the update is gone; anchors of the literature give no other
_NEARLY_ALL = 0.9  # judgement: a network of which a tenth moves may still learn, and often does
_LEARNS = 0.5  # calibrated: see `outcome`
_LEFT_OUT = "it requires and gets a gradient, but is in no group of any optimizer, so it never changes"
_ALL = "torch.optim.AdamW(self.parameters(), ...), with all parameters, in configure_optimizers"
_REPLACED = (
    "the optimizer holds parameters that are not the module's: it was given those of another one, or a layer was "
    "replaced after configure_optimizers"
)
_BEFORE = (
    "torch.optim.AdamW(self.parameters(), ...) in configure_optimizers; layers are built and replaced before it, in "
    "__init__ or configure_model"
)


def no_gradient(run: RunSeen) -> Verdict | None:
    """No parameter at all has one; or those of an optimizer have had none, although `training_step` calls their module.

    It is as it is so far: a gradient that arrives later withdraws it.
    """
    if run.idle is not None and _is_cut(run.idle):
        cause = "the loss does not depend on any parameter: what it is computed from was detached, or made anew"
        evidence = f"after {run.idle.batches} batches in a row with a backward pass, none of {run.idle.own} parameters "
        evidence += "had a gradient"
        return Verdict("no_gradient", None, cause, evidence, ATTACHED, run.idle.step, 1.0)
    if run.vain >= _STEPS_WITHOUT:
        cause = "the optimizer steps without a backward pass before it, so it has no gradient, and changes nothing"
        evidence = f"no gradient (None), and no weight changed, in {run.vain} steps so far"
        remedy = "self.manual_backward(loss) between zero_grad() and step()"
        return Verdict("no_gradient", None, cause, evidence, remedy, 0, 1.0)
    silent = run.silent if is_under_way(run) else [each for each in run.silent if not each.is_whole]
    found = [each for each in silent if each.is_called and (each.runs_without_grad or each.steps >= _STEPS_WITHOUT)]
    if not found:
        return None
    first = found[-1]  # the nearest to where the gradient ends
    names = _listed([each.name for each in found])
    if first.runs_without_grad:
        cause = "its forward pass runs under torch.no_grad(), so it is not trained"
        remedy = f"call {first.layer or 'it'} outside of torch.no_grad(), or freeze it: .requires_grad_(False)"
    elif first.is_whole:
        cause = (
            "no parameter of its optimizer has a gradient, though others' have: the loss of that optimizer does not "
            "depend on its result (a detach() or torch.no_grad() that is right in the step of another one)"
        )
        what = f"the output of {first.layer}" if first.layer else f"what is computed from {first.name}"
        remedy = f"compute {what} anew in the step of its own optimizer, without detach() and torch.no_grad()"
    else:
        cause = "the loss does not depend on its result (a detach(), .data or an output that is not used)"
        what = f"the output of {first.layer}" if first.layer else f"what is computed from {first.name}"
        remedy = f"pass {what} on without detach(), or freeze it: .requires_grad_(False)"
    evidence = f"no gradient (None) for {names} in {first.steps} steps of their optimizer so far"
    is_sure = max(each.steps for each in found) >= _STEPS_UNDER_NO_GRAD
    return Verdict("no_gradient", first.layer or first.name, cause, evidence, remedy, 0, 1.0 if is_sure else ONCE)


def not_optimized(run: RunSeen) -> Verdict | None:
    """No step at all; or parameters with a gradient that are in no optimizer, in two measured steps or the first."""
    if run.idle is not None and not _is_cut(run.idle):
        return _without_steps(run.idle)
    if not run.checks:
        return None
    before, last = run.checks[-2:][0], run.checks[-1]
    hidden = [name for name in last.hidden if name in before.hidden]
    if hidden:
        return _hidden(hidden, run.checks)
    left_out = {each.name for each in before.parameters if each.has_gradient and not each.is_optimized}
    found = [p for p in last.parameters if p.has_gradient and not p.is_optimized and p.name in left_out]
    if not found or not (last.strays or any(p.is_optimized for p in last.parameters)):
        return None
    names = _listed([each.name for each in found])
    evidence = f"{len(found)} of {len(last.parameters)} parameters ({names}) have gradients and are in no optimizer"
    onset = next(
        c.step for c in run.checks if any(p.name == found[0].name and not p.is_optimized for p in c.parameters)
    )
    cause, remedy = _LEFT_OUT, _ALL
    if last.strays:
        cause, remedy = _REPLACED, _BEFORE
        evidence += f"; {last.strays} tensors in the optimizers are no parameters of the module"
    confidence = 1.0 if len(run.checks) > 1 else ONCE
    return Verdict("not_optimized", found[0].layer or found[0].name, cause, evidence, remedy, onset, confidence)


def _hidden(names: list[str], checks: list[Check]) -> Verdict:
    layer = names[0].rpartition("]")[0] + "]"
    holder = layer.rpartition("[")[0]
    cause = (
        "it is held in a list, tuple or dict, where torch does not find it: no optimizer, device or checkpoint has it"
    )
    evidence = f"{_listed(names)} have gradients, and are neither in parameters() nor in an optimizer"
    remedy = f"self.{holder} = torch.nn.ModuleList(...), or ModuleDict, instead of what it is"
    onset = next(check.step for check in checks if names[0] in check.hidden)
    return Verdict("not_optimized", layer, cause, evidence, remedy, onset, 1.0 if len(checks) > 1 else ONCE)


def _is_cut(idle: IdleSeen) -> bool:
    return not idle.arrived and not idle.with_grad and idle.frozen < idle.params and idle.strays < idle.params


def _without_steps(idle: IdleSeen) -> Verdict:
    """Backward passes that no step follows."""
    batches = "a batch" if idle.batches == 1 else f"{idle.batches} batches in a row"
    evidence = f"{batches} had a backward pass, and no weight changed"
    if idle.frozen == idle.params:
        cause, remedy = "none of its parameters requires a gradient, so a step has nothing to do", (
            "self.requires_grad_(True) for what is to be trained, before configure_optimizers"
        )  # fmt: skip
        evidence += f"; requires_grad is False for all {idle.params} parameters"
    elif idle.strays == idle.params:
        cause, remedy = _REPLACED, _BEFORE
        evidence += f"; none of {idle.params} tensors in the optimizers is a parameter of the module"
    elif idle.outside and idle.arrived == len(idle.outside):
        cause, remedy = _LEFT_OUT, _ALL
    elif idle.with_grad:
        cause = "gradients are computed, but no optimizer takes a step with them"
        evidence += f", although {idle.with_grad} of {idle.params} parameters have a gradient"
        remedy = "self.optimizers().step() after manual_backward" if idle.is_manual else (
            "optimizer.step(closure=optimizer_closure) in optimizer_step, or leave out that method"
        )  # fmt: skip
    else:
        cause = "nothing is left of the gradients when the step is taken"
        evidence += f"; none of {idle.params} parameters has a gradient after them"
        remedy = "zero_grad() before manual_backward(), and step() right behind it" if idle.is_manual else (
            "leave out what clears gradients between the backward pass and the step, such as zero_grad() in a hook"
        )  # fmt: skip
    layer = None
    if idle.outside:
        layer = idle.outside[0].rpartition(".")[0] or idle.outside[0]
        evidence += f"; {_listed([*idle.outside])} have gradients and are in no optimizer"
    return Verdict("not_optimized", layer, cause, evidence, remedy, idle.step, 1.0)


def gradient_not_zeroed(run: RunSeen) -> Verdict | None:
    """Gradients that a step used were still there in its next one."""
    for optimizer, step in run.not_zeroed.items():
        cause = "gradients are added to those of former steps, since nothing clears them"
        evidence = f"a gradient of step {step - 1} was neither None nor 0 before the backward pass of step {step}"
        remedy = "optimizer.zero_grad() after every optimizer.step()"
        return Verdict("gradient_not_zeroed", optimizer, cause, evidence, remedy, step, 1.0)
    return None


def lost_updates(run: RunSeen) -> Verdict | None:
    """The weights are put back after two steps in a row; or elements of the 16-bit weights do not change, in the first
    two measured steps at the highest rate: nearly all, or most of them in a run that learns badly.

    Later ones say nothing: at the end of a decay, or of training, updates are small anyway, and a warm-up still rises.
    That most are lost is no error by itself: the others can make up for them. The outcome tells if they do; before it
    is known, the first step does, whose updates are the largest of a rate, since no noise has averaged out in them.
    """
    undone = [place for place, check in enumerate(run.checks[1:]) if check.is_undone and run.checks[place].is_undone]
    if undone:
        return _put_back(run.checks, undone[0])
    highest = max((check.rate for check in run.checks), default=0.0)
    place = next((i for i, check in enumerate(run.checks) if check.rate >= 0.99 * highest), len(run.checks))
    judged = run.checks[place : place + 2]
    if len(judged) < 2 or judged[1].rate < 0.5 * highest:
        return None
    least, outcome = min(map(_lost_share, judged)), outcome_of(run)
    if not outcome.is_late and highest < 0.99 * judged[1].rate_to_come:
        return None  # a warm-up by epochs
    is_harmed = outcome.is_below(_LEARNS) or (
        judged[0].step == 0 and not (outcome.is_late and outcome.progress >= _LEARNS)
    )
    if least <= _LOST or not (least > _NEARLY_ALL or is_harmed):
        return None
    last = judged[1]  # ONCE: a rate that rises later, or what is learned all the same, withdraws it
    worst = max((p for p in last.parameters if _is_counted(p)), key=lambda p: p.lost * p.numel)
    cause = "updates are smaller than half a unit in the last place of the 16-bit weights, and rounded away"
    share = f"{_lost_share(last):.0%} of the weights that are stored in 16 bits"
    evidence = f"{share} did not change in step {last.step}, {worst.lost:.0%} of {worst.name}"
    remedy = (
        'ok.Fuse(rounding="split32") (an optimizer of this package takes it itself; float16 takes "kahan"), or '
        'Trainer(precision="bf16-mixed")'
    )
    return Verdict("lost_updates", worst.layer or worst.name, cause, evidence, remedy, judged[0].step, ONCE)


def _put_back(checks: list[Check], place: int) -> Verdict:
    moved = max((p for p in checks[place].parameters if p.update_norm > 0), key=lambda p: p.update_norm)
    steps = [check.step for check in checks[place : place + 2]]
    cause = "something puts the weights back to what they were before the step"
    evidence = f"before steps {steps[0]} and {steps[1]} all weights were bitwise those before the step in front of it, "
    evidence += f"although that had changed {moved.name} by {moved.update_norm:.2g}"
    remedy = "leave out what writes to the weights after optimizer.step(): load_state_dict, copy_, an average's swap"
    return Verdict("lost_updates", None, cause, evidence, remedy, max(steps[0] - 1, 0), 1.0)


def _is_counted(param: ParameterSeen) -> bool:
    return param.is_narrow and param.is_optimized and not math.isnan(param.lost)


def _lost_share(check: Check) -> float:
    narrow = [p for p in check.parameters if _is_counted(p)]
    elements = sum(p.numel for p in narrow)
    return sum(p.lost * p.numel for p in narrow) / elements if elements else 0.0


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
