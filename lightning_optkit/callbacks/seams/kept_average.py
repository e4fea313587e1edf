# SPDX-License-Identifier: Apache-2.0
"""An average during a fit: part of a one-pass step, or in a separate pass after any other step.

In both cases the steps of each optimizer in this run count, including those before a checkpoint, but not skipped ones:
a checkpoint can be resumed in either form. An optimizer that replaces another during the run takes over its averages
and its count.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit._checks import check_instance, check_state
from lightning_optkit.averaging import EMA, LAWA, SWA, PowerEMA
from lightning_optkit.averaging.standalone import (
    averages_of,
    late_averages,
    protect_average,
    read_average,
    state_names,
    update_average_,
    update_tensors_,
)
from lightning_optkit.callbacks.seams.run_free import RunFree
from lightning_optkit.callbacks.seams.steps import StepCounts, StepListener, StepWatch, watch_steps
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.numbers import starts_at_a_step

__all__ = ["KeptAverage", "names_of"]


class KeptAverage(RunFree):
    """Keeps `average` in the state of the optimizers between `attach` and `detach`; it can be read afterwards too.

    Args:
        average: The average.
        name: Name in the state if the optimizers have another average; None: the default name.
    """

    def __init__(self, average: EMA | PowerEMA | SWA | LAWA, name: str | None = None) -> None:
        self.average, self.name = average, name
        self.explained: list[str] = []
        self._has_other_settings = False  # than the checkpoint that is loaded
        self._optimizers: dict[int, Optimizer] = {}  # by index in `trainer.optimizers`
        self._folding: dict[Optimizer, Any] = {}  # and their previous average
        self._lead: dict[int, int] = {}  # steps of the run that its optimizer did not take, by index
        self._counts = StepCounts()  # of the other indices; of all, at the start and the end of the training
        self._hooks: list[RemovableHandle | StepWatch] = []
        self._handed_over: dict[Tensor, dict[str, Tensor]] = {}  # state of a replaced optimizer, for its successor
        self._late: dict[Optimizer, dict[Tensor, dict[str, Tensor]]] = {}  # started before the current step
        self._trainer: pl.Trainer | None = None
        self._counts_steps = self._is_training = False
        self._buffers_of: nn.Module | None = None
        self._buffers: dict[str, dict[str, Tensor]] = {}

    # --- lifecycle ---

    def attach(self, trainer: pl.Trainer, buffers_of: nn.Module | None) -> None:
        """Adds the average to the optimizers of the run.

        Args:
            trainer: The Trainer of the run.
            buffers_of: Also average the floating-point buffers of this module.

        Raises:
            ValueError: if one of them already has another average.
        """
        self._trainer, self._buffers_of, self._counts_steps = trainer, buffers_of, False
        self._hooks = []
        self._hooks.append(watch_steps(trainer, StepListener("WeightAveraging", joins=self._join)))
        if buffers_of is not None:
            self._count_steps()

    def let_go(self) -> Callable[[], None]:
        """Detaches it, if it is attached, and returns a function that attaches it again; for another name."""
        trainer, buffers_of = self._trainer, self._buffers_of
        if trainer is None:
            return lambda: None
        self.detach()
        return partial(self.attach, trainer, buffers_of)

    def begin(self, average: EMA | PowerEMA | SWA | LAWA) -> None:
        """From now on steps are training; earlier ones only created state for a checkpoint.

        Args:
            average: The same average, with its start as a step of this run.
        """
        assert self._trainer is not None
        self._counts.begin(self._trainer)
        self.average, self._is_training = average, True
        for place, optimizer in self._optimizers.items():
            self._lead[place] = self._counts[place] - _clock_of(optimizer)
            self._explain(optimizer)
            if optimizer in self._folding:
                self._fold_into(optimizer, place)
        self._has_other_settings = False

    def detach(self) -> None:
        """Restores the optimizers; the average can still be read."""
        self._keep_counts()
        for hook in self._hooks:
            hook.remove()
        for optimizer, kept_before in self._folding.items():
            if isinstance(optimizer, OnePassOptimizer):  # Fuse may have been undone already
                optimizer.keep_average(kept_before)
        self._hooks, self._folding, self._buffers_of, self._trainer, self._late = [], {}, None, None, {}

    def _forget(self) -> None:
        counts = StepCounts()
        counts.load(self._all_steps())
        self._counts, self._is_training, self._trainer, self._buffers_of = counts, False, None, None
        self._optimizers, self._folding, self._hooks, self._lead, self._handed_over = {}, {}, [], {}, {}
        self._late = {}

    def state_dict(self) -> dict[str, Any]:
        """The state that is not in the optimizers."""
        several = {"steps_of_each": self._all_steps()} if len(self._optimizers) > 1 else {}
        return {"steps": self.num_steps, "name": self.name, "buffers": self._buffers, **several}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state.

        Raises:
            ValueError: if the checkpoint has this average under another name.
        """
        state_dict = check_state("WeightAveraging", state_dict, steps=int)
        optional: dict[str, Any] = {"name": (str, type(None)), "buffers": dict, "steps_of_each": list}
        check_state(
            "WeightAveraging", state_dict, **{key: optional[key] for key in optional.keys() & state_dict.keys()}
        )
        for state in state_dict.get("buffers", {}).values():
            check_instance(
                "WeightAveraging.load_state_dict", "state_dict['buffers']", state, dict, "averages of buffers"
            )
        if state_dict.get("name") != self.name:
            saved, here = (each or self.average.state_name for each in (state_dict.get("name"), self.name))
            raise ValueError(
                f"WeightAveraging({self.average!r}).load_state_dict: it is of the average that optimizers keep as "
                f"{saved!r}, and here they keep it as {here!r}; load the whole checkpoint by fit(ckpt_path=...)."
            )
        self._counts.load(state_dict.get("steps_of_each", [state_dict["steps"]]))
        self._buffers = state_dict.get("buffers", {})

    def keep_settings(self) -> None:
        """The checkpoint that is being loaded is of other settings, or of none: those given now hold."""
        self._has_other_settings = True
        for optimizer in self._optimizers.values():  # FSDP2 has loaded them already
            self._set_decay(optimizer)

    def _set_decay(self, optimizer: Optimizer) -> None:
        """In place of the decay, and the base of its schedule, that came with the groups of a checkpoint."""
        if not self._has_other_settings or self.name is not None or isinstance(self.average, LAWA):
            return
        for group in optimizer.param_groups:
            if "average_decay" in group:
                group["average_decay"] = self.average.decay
                group.pop("initial_average_decay", None)

    # --- reading ---

    @property
    def num_steps(self) -> int:
        """Number of steps of the first optimizer, without skipped ones."""
        return self._steps_of(0)

    def of_parameters(self) -> dict[Tensor, Tensor]:
        """The average of every parameter that has one with at least one update."""
        averages: dict[Tensor, Tensor] = {}
        for param, state in self._handed_over.items():
            value = read_average(state, self.average, self.name)
            averages |= {} if value is None else {param: value}
        for optimizer in self._optimizers.values():
            averages |= averages_of(optimizer, self.average, self.name)
        return averages

    def of_buffers(self, module: nn.Module) -> dict[Tensor, Tensor]:
        """The same for the buffers, if they are averaged."""
        buffers = dict(module.named_buffers())
        read = {
            buffers[name]: read_average(state, self.average, self.name)
            for name, state in self._buffers.items()
            if name in buffers
        }
        return {buffer: value for buffer, value in read.items() if value is not None}

    def show(self, averages: Mapping[Tensor, Tensor]) -> None:
        """Tells the one-pass optimizers which 16-bit parameters now hold these averages."""
        rounded = {param: average for param, average in averages.items() if param.element_size() == 2}
        for optimizer in self._optimizers.values():
            if isinstance(optimizer, OnePassOptimizer):
                optimizer._shown = rounded

    # --- steps ---

    def _steps_of(self, place: int) -> int:
        optimizer = self._optimizers.get(place)
        if not self._is_training or optimizer not in self._folding:
            return self._counts[place]
        # Read from the state, since Fuse may already have been undone after a failure.
        return self._lead[place] + _clock_of(optimizer)

    def _all_steps(self) -> list[int]:
        return [self._steps_of(place) for place in sorted(self._optimizers)] or self._counts.to_list()

    def _keep_counts(self) -> None:
        """Reads the counts of one-pass optimizers."""
        if self._is_training:
            self._counts.load(self._all_steps())
        self._is_training = False

    # --- implementation ---

    def _join(self, optimizer: Optimizer, place: int) -> None:
        before = self._optimizers.get(place)
        if before is not None and self._is_training:
            steps = self._all_steps()
            self._take_from(before)
            self._counts.load(steps)
            self._lead[place] = steps[place] - _clock_of(optimizer)
        self._optimizers[place] = optimizer
        self._hooks.append(optimizer.register_load_state_dict_post_hook(self._set_decay))
        if self._is_training:
            self._explain(optimizer)
        if self._why_not_folded(optimizer) is None:
            self._fold_into(optimizer, place)
            self._hand_over(optimizer)
        else:
            self._hooks += protect_average(optimizer, self.average, self.name)
            self._count_steps()

    def _take_from(self, optimizer: Optimizer) -> None:
        names = state_names(self.average, self.name)
        for param, state in optimizer.state.items():
            held = {name: state[name] for name in names if name in state}
            if held:
                self._handed_over[param] = held
        if isinstance(optimizer, OnePassOptimizer) and optimizer in self._folding:
            optimizer.keep_average(self._folding.pop(optimizer))

    def _hand_over(self, optimizer: Optimizer) -> None:
        """Averages of a replaced optimizer; torch's optimizers initialize their own state only where there is none."""
        for param in self._waiting(optimizer):
            if isinstance(optimizer, OnePassOptimizer) or param.grad is not None or optimizer.state.get(param):
                optimizer.state[param].update(self._handed_over.pop(param))

    def _waiting(self, optimizer: Optimizer) -> list[Tensor]:
        params = [p for group in optimizer.param_groups for p in group["params"]] if self._handed_over else []
        return [p for p in params if p in self._handed_over]

    def _count_steps(self) -> None:
        if not self._counts_steps:
            assert self._trainer is not None
            self._counts_steps = True
            listener = StepListener("WeightAveraging", evaluated=self._before_step, counts=self._after_step)
            self._hooks.append(watch_steps(self._trainer, listener))

    def _explain(self, optimizer: Optimizer) -> None:
        reason = self._why_not_folded(optimizer)
        how = "folded into the step" if reason is None else f"a pass of its own ({reason}) after the step"
        kept_as = self.name or self.average.state_name
        self.explained.append(f"{self.average!r}: {how} of {type(optimizer).__name__}, as state {kept_as!r}.")

    def _why_not_folded(self, optimizer: Optimizer) -> str | None:
        if isinstance(self.average, LAWA):
            return "no step keeps snapshots"
        if not isinstance(optimizer, OnePassOptimizer):
            return "not a one-pass optimizer"
        return "the step keeps another average" if self.name else None

    def _fold_into(self, optimizer: Optimizer, place: int) -> None:
        assert isinstance(optimizer, OnePassOptimizer)
        if optimizer not in self._folding:
            if optimizer.average is not None and optimizer.average != self.average:
                raise ValueError(
                    f"WeightAveraging({self.average!r}): {type(optimizer).__name__} keeps {optimizer.average!r} "
                    "already; leave one of the two out."
                )
            self._folding[optimizer] = optimizer.average
        average = _counted_by(self.average, self._lead.get(place, 0))
        if optimizer.average != average:
            optimizer.keep_average(average)  # type: ignore[arg-type]

    def _before_step(self, optimizer: Optimizer, place: int) -> None:
        if optimizer not in self._folding:
            known = self._late.setdefault(optimizer, {})
            late = late_averages(optimizer, self.average, self.name, self._handed_over.values())
            self._late[optimizer] = {p: s for p, s in late.items() if p not in self._handed_over} | known

    def _after_step(self, optimizer: Optimizer, place: int) -> None:
        # A sharded checkpoint is loaded into state that a first, empty step creates.
        step = 0
        if self._is_training:
            step = self._steps_of(place) if optimizer in self._folding else self._counts.add(place)
        if optimizer not in self._folding:
            self._hand_over(optimizer)
            for param, state in self._late.pop(optimizer, {}).items():
                if param.grad is not None:
                    optimizer.state[param].update(state)
            average = _counted_by(self.average, 0)
            update_average_(optimizer, average, step, self.name)
            update_tensors_([(p, self._handed_over[p]) for p in self._waiting(optimizer)], average, step, self.name)
        if place == 0 and self._buffers_of is not None and self._is_training:
            kept = [
                (buffer, self._buffers.setdefault(name, {}))
                for name, buffer in self._buffers_of.named_buffers()
                if buffer.dtype.is_floating_point
            ]
            update_tensors_(kept, self.average, step, self.name)


def names_of(averages: Sequence[EMA | PowerEMA | SWA | LAWA]) -> list[str | None]:
    """Names in the state: None for the first one that a step supports and for the first LAWA, else numbers."""
    names: list[str | None] = []
    seen: set[bool] = set()
    for number, average in enumerate(averages, start=1):
        folds = not isinstance(average, LAWA)
        names.append(f"{average.state_name}_{number}" if folds in seen else None)
        seen.add(folds)
    return names


def _clock_of(optimizer: Optimizer) -> int:
    """The largest number of updates of any parameter, which is the clock of a one-pass step."""
    return max((int(state.get("step", 0)) for state in optimizer.state.values()), default=0)


def _counted_by(average: EMA | PowerEMA | SWA | LAWA, lead: int) -> EMA | PowerEMA | SWA | LAWA:
    """The same average for an optimizer whose step 1 is step `lead + 1` of the run.

    A start that is an epoch or a fraction is unknown before the training starts; nothing is averaged until then.
    """
    if not starts_at_a_step(average):
        return replace(average, start=1, start_interval="step")
    start = int(average.start) - lead
    if start < 1:
        start += -((start - 1) // average.every) * average.every
    return average if start == average.start else replace(average, start=start)
