# SPDX-License-Identifier: Apache-2.0
"""One event for every optimizer of a run, with automatic or manual optimization: this optimizer took a step.

    self._watch = watch_steps(trainer, StepListener("MyCallback", after=self._project))    # in on_fit_start
    self._watch.remove()                                                          # in teardown and on_exception

There is no step if nothing has a gradient (`training_step` returned None), if the loss scaler finds an infinite
gradient, or if a one-pass optimizer that clips by norm skips non-finite gradients. A torch step hook cannot tell: in 32
bits the closure runs inside `step`, after the pre-hooks, and an optimizer that unscales itself is stepped whatever the
loss scaler found.

An optimizer that steps in the backward pass (`ReleaseGradients`) has no gradients left when `step` is called, so it is
its own count that tells, and nothing can be done before its update.

The optimizers are those in `trainer.optimizers` when they step: every listener is notified of one that replaces another
during the run, before its first step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary, ref

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit._norms import total_norm
from lightning_optkit._torch_private import step_post_hooks
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.callbacks.seams.parameter_numbers import number_by_module
from lightning_optkit.callbacks.seams.unread_average import warn_of_unread_averages
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.early import early_updates

__all__ = [
    "StepCounts",
    "StepListener",
    "StepWatch",
    "gradients_of",
    "refuse_folded_average",
    "was_updated",
    "watch_steps",
]


@dataclass(frozen=True, eq=False)
class StepListener:
    """The reactions of a callback to a step. Every function gets the optimizer, and its index in `trainer.optimizers`.

    Args:
        owner: Callback named in error messages.
        joins: Called once for each optimizer: at `watch_steps`, or before the first step of a later one.
        before: Called between the gradients and the update. LBFGS, which evaluates the loss many times per step, is
            refused.
        evaluated: Like `before`, but also called for an update that will be skipped, and with LBFGS after every
            evaluation, the first of which uses the old weights.
        after: Called right after the update, to change the weights.
        counts: Called after the `after` of all listeners, to read the result.
    """

    owner: str
    joins: Callable[[Optimizer, int], None] | None = None
    before: Callable[[Optimizer, int], None] | None = None
    evaluated: Callable[[Optimizer, int], None] | None = None
    after: Callable[[Optimizer, int], None] | None = None
    counts: Callable[[Optimizer, int], None] | None = None


class StepWatch:
    """The result of `watch_steps`; `remove()` ends it."""

    def __init__(self, seam: "_Seam", listener: StepListener) -> None:
        self._seam, self._listener = seam, listener

    def remove(self) -> None:
        """Stops listening; no-op the second time."""
        self._seam.remove(self._listener)


def watch_steps(trainer: pl.Trainer, listener: StepListener) -> StepWatch:
    """Notifies `listener` of every step of the optimizers of `trainer`.

    From then on the checkpoints of the run say which state is of which parameter. Warns of averages that nothing reads.

    Raises:
        ValueError: for LBFGS, if the listener has a `before`.
    """
    number_by_module(trainer)
    warn_of_unread_averages(trainer)
    seam = _SEAMS.get(trainer)
    if seam is None:
        seam = _SEAMS[trainer] = _Seam(trainer)
    seam.add(listener)
    return StepWatch(seam, listener)


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The current gradients of its parameters."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def was_updated(optimizer: Optimizer, param: Tensor) -> bool:
    """Whether the step that was just taken has updated the parameter."""
    early = early_updates(optimizer)
    return param.grad is not None or (early is not None and param in early.last)


class StepCounts:
    """The number of steps of each optimizer of a run, by its index in `trainer.optimizers`.

    A run that started without this count, or is fitted again, continues from Lightning's count.
    """

    def __init__(self) -> None:
        self._counts: list[int] = []
        self._is_known = False

    def begin(self, trainer: pl.Trainer) -> None:
        """Must be called when the training starts; loaded counts are kept."""
        places = len(trainer.optimizers)
        if not self._is_known:
            self._counts = [steps_before(trainer)] * places
        self._counts += [self[0]] * (places - len(self._counts))
        self._is_known = True

    def __getitem__(self, place: int) -> int:
        return self._counts[place] if place < len(self._counts) else 0

    def add(self, place: int) -> int:
        """Counts a step, and returns its number, from 1."""
        self._counts += [0] * (place + 1 - len(self._counts))
        self._counts[place] += 1
        return self._counts[place]

    def to_list(self) -> list[int]:
        """The counts, for a checkpoint."""
        return list(self._counts)

    def load(self, counts: Sequence[int]) -> None:
        """Restores counts of a checkpoint."""
        self._counts, self._is_known = list(counts), any(counts)


def steps_before(trainer: pl.Trainer) -> int:
    """Steps so far per optimizer, from Lightning's count, which includes skipped ones and adds all optimizers."""
    return trainer.global_step // max(len(trainer.optimizers), 1)


def refuse_folded_average(owner: str, optimizer: Optimizer, remedy: str) -> None:
    """Raises ValueError if the step averages the weights before `owner` changes them."""
    if isinstance(optimizer, OnePassOptimizer) and optimizer.average is not None:
        raise ValueError(
            f"{owner}(...): changes the weights after the step of {type(optimizer).__name__}, which folds in "
            f"{optimizer.average!r} and would average them unchanged; {remedy}."
        )


_SEAMS: "WeakKeyDictionary[pl.Trainer, _Seam]" = WeakKeyDictionary()


class _Seam:
    """The listeners of one Trainer, and the hooks on its optimizers."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer, self._strategy = ref(trainer), trainer.strategy
        self._listeners: list[StepListener] = []
        self._act_before = False  # whether any of them acts between the gradients and the update
        self._hooks: dict[Optimizer, list[RemovableHandle]] = {}
        self._joined: dict[Optimizer, int] = {}
        self._num_steps: dict[Optimizer, int | None] = {}
        # A later optimizer is detected on both paths to its first step.
        self._overrides = {name: self._noticing(name) for name in ("training_step", "optimizer_step")}
        for name, function in self._overrides.items():
            override(self._strategy, name, function)

    def add(self, listener: StepListener) -> None:
        self._notice()
        self._listeners.append(listener)
        self._act_before |= listener.before is not None or listener.evaluated is not None
        for optimizer, place in list(self._joined.items()):
            self._introduce(listener, optimizer, place)

    def remove(self, listener: StepListener) -> None:
        self._listeners = [other for other in self._listeners if other is not listener]
        self._act_before = any(other.before or other.evaluated for other in self._listeners)
        if not self._listeners:
            for handles in self._hooks.values():
                for handle in handles:
                    handle.remove()
            for name, function in self._overrides.items():
                restore(self._strategy, name, function)
            self._hooks, self._joined, self._num_steps = {}, {}, {}
            trainer = self._trainer()
            if trainer is not None and _SEAMS.get(trainer) is self:
                del _SEAMS[trainer]

    def _noticing(self, name: str) -> Callable[..., Any]:
        original = getattr(self._strategy, name)

        @wraps(original)
        def noticing(*args: Any, **kwargs: Any) -> Any:
            self._notice()
            return original(*args, **kwargs)

        return noticing

    def _notice(self) -> None:
        trainer = self._trainer()
        optimizers = trainer.optimizers if trainer is not None else []
        if [*self._joined] == optimizers:
            return
        for gone in [known for known in self._hooks if known not in optimizers]:
            for handle in self._hooks.pop(gone):
                handle.remove()
        known, self._joined = self._joined, {o: i for i, o in enumerate(optimizers) if isinstance(o, Optimizer)}
        for optimizer, place in self._joined.items():
            for listener in list(self._listeners) if optimizer not in known else ():
                self._introduce(listener, optimizer, place)

    def _introduce(self, listener: StepListener, optimizer: Optimizer, place: int) -> None:
        if listener.before is not None and isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{listener.owner}(...): LBFGS evaluates the loss many times in a step, and nothing can be done right "
                "before its update; use an optimizer with one evaluation a step."
            )
        if listener.joins is not None:
            listener.joins(optimizer, place)
        if early_updates(optimizer) is not None:
            for each in (*self._listeners, listener):
                _refuse_before(each, optimizer)
        if listener.before or listener.evaluated or listener.after or listener.counts:
            self._hook(optimizer)

    def _hook(self, optimizer: Optimizer) -> None:
        if optimizer not in self._hooks:
            post = optimizer.register_step_post_hook(self._after)
            # Before any other hook, since an average must see the changed weights.
            step_post_hooks(optimizer).move_to_end(post.id, last=False)
            self._hooks[optimizer] = [optimizer.register_step_pre_hook(self._before), post]

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if isinstance(optimizer, OnePassOptimizer):
            self._num_steps[optimizer] = _num_steps(optimizer)
        if not self._act_before:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._call_before(optimizer)
            return None

        @wraps(closure)
        def closure_then_before() -> Any:
            loss = closure()
            self._call_before(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_before, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_before}

    def _call_before(self, optimizer: Optimizer) -> None:
        if optimizer not in self._joined or _has_nothing(optimizer):
            return
        place = self._joined[optimizer]
        for listener in self._listeners:
            if listener.evaluated is not None:
                listener.evaluated(optimizer, place)
        if any(listener.before for listener in self._listeners) and not _will_skip(optimizer):
            for listener in self._listeners:  # including one that another listener adds now
                if listener.before is not None:
                    listener.before(optimizer, place)

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        place, has_nothing = self._joined.get(optimizer), _has_nothing(optimizer)
        if isinstance(optimizer, OnePassOptimizer):
            before, now = self._num_steps.pop(optimizer, None), _num_steps(optimizer)
            has_nothing = (has_nothing and early_updates(optimizer) is None) or (now is not None and now == before)
        if place is None or has_nothing or _found_inf(optimizer):
            return
        listeners = tuple(self._listeners)
        for listener in listeners:
            if listener.after is not None:
                listener.after(optimizer, place)
        for listener in listeners:
            if listener.counts is not None:
                listener.counts(optimizer, place)


def _refuse_before(listener: StepListener, optimizer: Optimizer) -> None:
    if listener.before is not None or listener.evaluated is not None:
        raise ValueError(
            f"{listener.owner}(...): acts between the gradients and the update, and {type(optimizer).__name__} updates "
            "each parameter inside the backward pass; leave out ReleaseGradients."
        )


def _has_nothing(optimizer: Optimizer) -> bool:
    for group in optimizer.param_groups:  # in every step: the first one has a gradient, as a rule
        for param in group["params"]:
            if param.grad is not None:
                return False
    return True


def _found_inf(optimizer: Optimizer) -> bool:
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and float(found_inf) != 0


def _num_steps(optimizer: Optimizer) -> int | None:
    """The step count, if a step may skip itself; synchronizes on CUDA."""
    counts = _skips(optimizer) or early_updates(optimizer) is not None
    return optimizer.num_steps if counts else None  # type: ignore[attr-defined]


def _skips(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, OnePassOptimizer) and optimizer.clip is not None and optimizer.clip.needs_norm


def _will_skip(optimizer: Optimizer) -> bool:
    """Whether the next update will be skipped; reads the gradients if the step may decide that."""
    if _found_inf(optimizer) or not _skips(optimizer):
        return _found_inf(optimizer)
    dense = [grad.coalesce().values() if grad.is_sparse else grad for grad in gradients_of(optimizer)]
    return not bool(total_norm(dense).isfinite())
