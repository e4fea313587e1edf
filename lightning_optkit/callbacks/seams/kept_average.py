# SPDX-License-Identifier: Apache-2.0
"""An average for the length of a fit: folded into a one-pass step, in a pass of its own after any other step.

Both count optimizer steps alike, also those of the run that a checkpoint came from, and neither counts a step that was
skipped: a checkpoint goes on either way.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit._checks import check_instance, check_state
from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.averaging.own_pass import (
    averages_of,
    protect_average,
    read_average,
    update_average_,
    update_tensors_,
)
from lightning_optkit.callbacks.seams.run_free import RunFree
from lightning_optkit.step import OnePassOptimizer

__all__ = ["KeptAverage", "names_of"]


class KeptAverage(RunFree):
    """Keeps `average` in the state of the optimizers between `attach` and `detach`, and can be read ever after.

    Args:
        average: What to keep.
        name: In the state, beside another average of the same optimizers; None: its own.
    """

    def __init__(self, average: EMA | SWA | LAWA, name: str | None = None) -> None:
        self.average, self.name = average, name
        self.explained: list[str] = []
        self._optimizers: list[Optimizer] = []
        self._folding: list[tuple[OnePassOptimizer, Any]] = []  # and what it kept before
        self._hooks: list[RemovableHandle] = []
        self._steps = self._counted = 0  # done; those of them that are not in `num_steps` of a one-pass optimizer
        self._is_training = False
        self._buffers_of: nn.Module | None = None
        self._buffers: dict[str, dict[str, Tensor]] = {}

    # --- its life ---

    def attach(self, optimizers: Sequence[Optimizer], average: EMA | SWA | LAWA, buffers_of: nn.Module | None) -> None:
        """Lets the optimizers keep it.

        Args:
            optimizers: Those of the fit; steps are counted by the first one.
            average: The same average, starting at a step of this run.
            buffers_of: Average the floating point buffers of this module as well.

        Raises:
            ValueError: if one of them keeps another average already.
        """
        self.average, self._optimizers, self._buffers_of = average, list(optimizers), buffers_of
        for place, optimizer in enumerate(self._optimizers):
            reason = self._why_not_folded(optimizer)
            how = "folded into the step" if reason is None else f"a pass of its own ({reason}) after the step"
            kept_as = self.name or average.state_name
            self.explained.append(f"{average!r}: {how} of {type(optimizer).__name__}, as state {kept_as!r}.")
            if reason is None:
                self._fold_into(optimizer)
            else:
                self._hooks += protect_average(optimizer, average, self.name)
            if reason is not None or (place == 0 and buffers_of is not None):
                self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def begin(self) -> None:
        """From here on steps are training; those before only make room for a checkpoint's state."""
        self._is_training = True
        # A run that was begun in another way may have left state without a step count.
        for optimizer, _ in self._folding if self._steps else ():
            optimizer.resume_counting(self._steps)
        first = self._optimizers[0] if self._optimizers else None
        self._counted = self._steps - (first.num_steps if isinstance(first, OnePassOptimizer) else 0)

    def detach(self) -> None:
        """Gives the optimizers back as they were; what they hold can still be read."""
        self._steps = self.num_steps
        self._is_training = False
        for hook in self._hooks:
            hook.remove()
        for optimizer, kept_before in self._folding:
            if isinstance(optimizer, OnePassOptimizer):  # Fuse may have undone it before
                optimizer.keep_average(kept_before)
        self._hooks, self._folding, self._buffers_of = [], [], None

    def _forget(self) -> None:
        self._steps = self.num_steps
        self._optimizers, self._folding, self._hooks, self._buffers_of = [], [], [], None
        self._is_training = False

    def state_dict(self) -> dict[str, Any]:
        """What is not in the state of the optimizers."""
        return {"steps": self.num_steps, "name": self.name, "buffers": self._buffers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it.

        Raises:
            ValueError: if the checkpoint knows this average under another name.
        """
        state_dict = check_state("WeightAveraging", state_dict, steps=int)
        optional: dict[str, Any] = {"name": (str, type(None)), "buffers": dict}
        check_state(
            "WeightAveraging", state_dict, **{key: optional[key] for key in optional.keys() & state_dict.keys()}
        )
        for state in state_dict.get("buffers", {}).values():
            check_instance(
                "WeightAveraging.load_state_dict", "state_dict['buffers']", state, dict, "averages of buffers"
            )
        if state_dict.get("name") != self.name:
            raise ValueError(
                f"WeightAveraging({self.average!r}): in the checkpoint its state is "
                f"{state_dict.get('name') or self.average.state_name!r}, here {self.name or self.average.state_name!r}"
                "; give the averages in the order of the run that saved it."
            )
        self._steps = self._counted = state_dict["steps"]
        self._buffers = state_dict.get("buffers", {})

    # --- what can be read ---

    @property
    def num_steps(self) -> int:
        """Optimizer steps done, those that were skipped left out."""
        first = self._optimizers[0] if self._optimizers else None
        if not self._is_training or not self._is_folded_into(first):
            return self._steps
        if isinstance(first, OnePassOptimizer):
            return self._counted + first.num_steps
        # Fuse has undone its work already, as it does when something fails; the state still counts.
        return max((int(state.get("step", 0)) for state in first.state.values()), default=0)

    def of_parameters(self) -> dict[Tensor, Tensor]:
        """The average of every parameter that has one with at least one update."""
        averages: dict[Tensor, Tensor] = {}
        for optimizer in self._optimizers:
            averages |= averages_of(optimizer, self.average, self.name)
        return averages

    def of_buffers(self, module: nn.Module) -> dict[Tensor, Tensor]:
        """The same of the buffers, where they are averaged."""
        buffers = dict(module.named_buffers())
        read = {
            buffers[name]: read_average(state, self.average, self.name)
            for name, state in self._buffers.items()
            if name in buffers
        }
        return {buffer: value for buffer, value in read.items() if value is not None}

    # --- what it does ---

    def _why_not_folded(self, optimizer: Optimizer) -> str | None:
        if isinstance(self.average, LAWA):
            return "no step keeps snapshots"
        if not isinstance(optimizer, OnePassOptimizer):
            return "not a one-pass optimizer"
        return "the step keeps another average" if self.name else None

    def _fold_into(self, optimizer: Optimizer) -> None:
        assert isinstance(optimizer, OnePassOptimizer)
        if optimizer.average is not None and optimizer.average != self.average:
            raise ValueError(
                f"WeightAveraging({self.average!r}): {type(optimizer).__name__} keeps {optimizer.average!r} already; "
                "leave one of the two out."
            )
        self._folding.append((optimizer, optimizer.average))
        optimizer.keep_average(self.average)  # type: ignore[arg-type]

    def _is_folded_into(self, optimizer: Optimizer | None) -> TypeGuard[Optimizer]:
        return any(folding is optimizer for folding, _ in self._folding)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        is_first, is_own = optimizer is self._optimizers[0], not self._is_folded_into(optimizer)
        if self._is_training and is_first and not self._count(optimizer):
            return  # skipped
        # A sharded checkpoint is read into the state that a first, empty step makes.
        step = self.num_steps if self._is_training else 0
        if is_own:
            update_average_(optimizer, self.average, step, self.name)
        if is_first and self._buffers_of is not None and self._is_training:
            kept = [
                (buffer, self._buffers.setdefault(name, {}))
                for name, buffer in self._buffers_of.named_buffers()
                if buffer.dtype.is_floating_point
            ]
            update_tensors_(kept, self.average, step, self.name)

    def _count(self, optimizer: Optimizer) -> bool:
        """Counts a step, unless it was skipped."""
        before = self._steps
        if isinstance(optimizer, OnePassOptimizer):
            self._steps = self._counted + optimizer.num_steps
        else:
            found_inf = getattr(optimizer, "found_inf", None)
            self._steps += found_inf is None or float(found_inf) == 0
        return self._steps > before


def names_of(averages: Sequence[EMA | SWA | LAWA]) -> list[str | None]:
    """Names in the state: None for the first that a step can keep and for the first LAWA, numbered for the rest."""
    names: list[str | None] = []
    seen: set[bool] = set()
    for number, average in enumerate(averages, start=1):
        folds = not isinstance(average, LAWA)
        names.append(f"{average.state_name}_{number}" if folds in seen else None)
        seen.add(folds)
    return names
