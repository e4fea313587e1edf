# SPDX-License-Identifier: Apache-2.0
"""Schedulers that are not stepped as they are meant: exact counts, no threshold on the rate."""

from lightning_optkit.diagnostics._observations import RunSeen, ScheduleSeen
from lightning_optkit.diagnostics.verdict import ONCE, Verdict

__all__ = ["schedule_fault"]

_ZERO_STEPS = 8  # a warm-up that starts at zero has one such step, a restart another
_EARLY, _LATE = 0.25, 0.5  # judgement: shares of the run; a schedule that is meant ends low at its end
_FADED_STEPS = 32  # judgement: in a run of a few dozen steps, a few large ones may be meant
_CALLS = 8  # before a difference of two counts is a ratio


def schedule_fault(run: RunSeen) -> Verdict | None:
    """A scheduler that is stepped in the wrong unit, twice, or never, or a rate of zero."""
    for seen in run.schedules:
        for rule in (_in_the_wrong_unit, _stepped_twice, _never_stepped, _zero, _faded):
            found = rule(seen)
            if found is not None:
                cause, evidence, remedy, onset = found
                if rule is _zero:
                    is_early = seen.steps < _ZERO_STEPS
                elif rule is _stepped_twice:
                    is_early = seen.calls < _CALLS
                else:
                    is_early = rule is _never_stepped and not run.is_over  # it may be stepped from some epoch on
                confidence = ONCE if is_early else 1.0
                name = seen.name or seen.optimizer
                return Verdict("schedule_fault", name, cause, evidence, remedy, onset, confidence)
    return None


_Found = tuple[str, str, str, int] | None


def _in_the_wrong_unit(seen: ScheduleSeen) -> _Found:
    """The length is exactly the other unit's count of the run."""
    steps, epochs, length = seen.steps_planned, seen.epochs_planned, seen.length
    if length is None or steps is None or epochs is None or epochs < 1 or steps < 3 * epochs or seen.frequency != 1:
        return None
    counts = f"it lasts {length:,} of its steps; the run has {steps:,} steps in {epochs:,} epochs"
    if seen.interval == "epoch" and abs(length - steps) <= max(1, steps // 100) and length > epochs + 1:
        remedy = '{"scheduler": scheduler, "interval": "step"} in configure_optimizers'
        return (
            "it is as long as the run has steps, but stepped once an epoch, so the rate hardly changes",
            counts,
            remedy,
            0,
        )
    if seen.interval == "step" and abs(length - epochs) <= 1 and length > 1:
        what = "goes up and down again" if seen.returns else "has ended"
        remedy = '{"scheduler": scheduler, "interval": "epoch"}, or its length in steps, in configure_optimizers'
        cause = f"it is as long as the run has epochs, but stepped at every step, so within the run the rate {what}"
        return cause, counts, remedy, 0
    return None


def _stepped_twice(seen: ScheduleSeen) -> _Found:
    if seen.follows_metric or seen.interval == "manual":
        return None
    due = (seen.steps if seen.interval == "step" else seen.epochs + 1) // seen.frequency + 1
    # Lightning steps it once behind a batch, at most; whoever does it too does so in every batch.
    is_exact = seen.interval == "step" and seen.batches > 0 and seen.batches_twice == seen.batches
    if not is_exact and (seen.calls < _CALLS or seen.calls < 1.5 * due):
        return None
    cause = "it is stepped by the module and by Lightning, so it runs ahead of the run"
    evidence = f"{seen.calls} steps of the scheduler in {seen.steps} optimizer steps and {seen.epochs} epochs"
    return cause, evidence, "leave scheduler.step() out of the module: Lightning calls it", 0


def _never_stepped(seen: ScheduleSeen) -> _Found:
    if not seen.name or seen.interval != "manual" or seen.calls or seen.epochs < 2 or seen.steps < _CALLS:
        return None
    cause = "the module optimizes manually, where Lightning does not step schedulers, and neither does it"
    evidence = f"no step of the scheduler in {seen.steps} optimizer steps and {seen.epochs} epochs"
    return cause, evidence, "self.lr_schedulers().step() in training_step or on_train_epoch_end", 0


def _zero(seen: ScheduleSeen) -> _Found:
    in_epoch = (seen.steps_planned or 0) / (seen.epochs_planned or 1)
    lasts = seen.name and seen.interval == "epoch" and not seen.follows_metric and in_epoch >= _ZERO_STEPS
    if seen.zero_first >= (1 if lasts else _ZERO_STEPS) and seen.zero_first == seen.steps:
        evidence = f"the rate of every group was 0 in all {seen.steps} steps"
        if seen.name and seen.interval == "epoch":
            remedy = '{"scheduler": scheduler, "interval": "step"} in configure_optimizers'
            return "it starts at 0 and is stepped once an epoch, so nothing is trained until then", evidence, remedy, 0
        return "the learning rate is 0, so nothing is trained", evidence, "AdamW(self.parameters(), lr=1e-3)", 0
    planned = seen.steps_planned
    left = 0 if planned is None else planned - seen.steps
    if seen.zero_last >= _ZERO_STEPS and planned is not None and left > 0.1 * planned:
        begun = seen.steps - seen.zero_last
        evidence = f"the rate of every group has been 0 for {seen.zero_last} steps; {left:,} of {planned:,} are left"
        return "the schedule ends long before the run", evidence, "give it the length of the run", begun
    return None


def _faded(seen: ScheduleSeen) -> _Found:
    """In the first quarter of the run the rate fell below a thousandth of its highest, and has stayed there since."""
    planned, begun = seen.steps_planned, seen.steps - seen.faded
    epochs = max(seen.epochs_planned or 1, 1)
    if not seen.name or seen.follows_metric or seen.interval == "epoch" or planned is None or planned < 2 * epochs:
        return None
    if seen.interval == "manual" and 2 * seen.calls < seen.steps:  # by hand, but not at every step
        return None
    if seen.faded < _FADED_STEPS or seen.steps < _LATE * planned or begun > _EARLY * planned:
        return None
    cause = "it decays at every step, as if a step were an epoch, so most of the run changes nothing"
    evidence = (
        f"from step {begun:,} of {planned:,} on the rate has been below a thousandth of its highest; the run has "
        f"{epochs:,} epochs"
    )
    remedy = '{"scheduler": scheduler, "interval": "epoch"}, or a slower decay, in configure_optimizers'
    if seen.interval == "manual":
        remedy = "scheduler.step() in on_train_epoch_end, or a slower decay"
    return cause, evidence, remedy, begun
