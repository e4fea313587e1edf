# SPDX-License-Identifier: Apache-2.0
"""What an update rule, a clip and an average must say of themselves for the one-pass step to use them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_optkit.step.statistics import TensorStatistics

__all__ = [
    "Average",
    "AverageKind",
    "Clip",
    "ClipBounds",
    "Estimate",
    "Group",
    "Hyperparameters",
    "KeptInState",
    "Rule",
    "Scalar",
    "State",
    "StateSpec",
    "StatefulClip",
    "Update",
]

Group = dict[str, Any]
"""One entry of `optimizer.param_groups`."""

State = dict[str, Tensor]
"""One entry of `optimizer.state`."""

Hyperparameters = dict[str, float]
"""The numbers that a rule reads from its group, by the names and in the order of the compiled rule."""

Update = Callable[[Tensor, Tensor, State, Group, float], Tensor]
"""(param, grad, state, group, step) -> what is subtracted from the parameter; writes `state` in place."""


@dataclass(frozen=True)
class StateSpec:
    """A tensor that a rule keeps for each parameter.

    Args:
        name: Name in `optimizer.state[p]`.
        nonnegative: Whether it is a sum of squares or of magnitudes: in 8 bits it then needs no sign.
        full_precision: Whether it is a point, not an average, and so never narrower than fp32.
        written_once: Whether only the first update of a parameter writes it.
        kept: Whether a group keeps it under its settings; None: under any.
        fresh: What it starts from, given the group; None: zero.
        shape: Its shape, given that of the parameter; None from it: such a parameter does not keep it. Without one it
            has the shape of the parameter. A compiled rule walks another shape only if it has factors
            (csrc/core/tables.h).
    """

    name: str
    nonnegative: bool = False
    full_precision: bool = False
    written_once: bool = False
    kept: Callable[[Group], bool] | None = None
    fresh: Callable[[Group], float] | None = None
    shape: Callable[[torch.Size], torch.Size | None] | None = None


@dataclass(frozen=True)
class Scalar:
    """A number per parameter that a rule carries from step to step, as a 0-d tensor in the state.

    Args:
        name: Name in `optimizer.state[p]`.
        fresh: Its value before the first step.
        inherited: Its value beside state that was loaded without it.
        signed: Whether it may be negative.
    """

    name: str
    fresh: float
    inherited: float
    signed: bool = False


@dataclass(frozen=True)
class Estimate:
    """How a rule sets its rate by two sums over all parameters, which its optimizer's `_learn` is given.

    Args:
        value: The estimate that a group holds: 0-d, fp64, on the device of the parameters. In the compiled rule it is
            the last of the hyperparameters.
        rate: (group, step) -> the factor of the group's rate, for the stages too.
        observe: (param, grad, state, group, step) -> one parameter's part of the two sums, given what `update` was
            given, after it.
    """

    value: Callable[[Group], Tensor]
    rate: Callable[[Group, float], float]
    observe: Callable[[Tensor, Tensor, State, Group, float], tuple[float, float]]


def _never(group: Group) -> bool:
    return False


@dataclass(frozen=True)
class Rule:
    """An update rule: its name among the compiled rules, and the same arithmetic in plain PyTorch.

    Args:
        name: Name in csrc/rules/all.h.
        states: What it keeps, in the order of the compiled rule.
        hyperparameters: Reads the rule's own numbers from a parameter group, in the order of the compiled rule.
        update: The reference. `step` counts this update, from 1.
        scalars: Kept by a group that keeps state, in the order of the compiled rule.
        counts_steps: Whether torch's class keeps a step count, and so whether a loaded one is to be believed.
        needs_whole: What the rule does that a part of the tensor is not enough for, in words that follow "cannot"; such
            a parameter is not sharded over processes.
        trust_ratio: Factor of the rate, given the group and the statistics of the tensor; for a rule that sets its rate
            by norms of the whole tensor.
        trust_ratio_of_update: Whether that goes by the norm of the update, for which the state is read once more.
        resolve: What a group means beside one parameter, as stored; None: what it says. A compiled rule knows it by
            itself.
        num_rereads: How often the rule reads a gradient or a parameter again, after the one walk.
        estimate: For a rule that sets its rate by what it learns of all parameters together.
        owns_decay: Whether weight decay is part of the rule in this group, and no stage around it.
    """

    name: str
    states: tuple[StateSpec, ...]
    hyperparameters: Callable[[Group], Hyperparameters]
    update: Update
    scalars: tuple[Scalar, ...] = ()
    counts_steps: bool = True
    needs_whole: str | None = None
    trust_ratio: Callable[[Group, TensorStatistics], float] | None = None
    trust_ratio_of_update: bool = True
    resolve: Callable[[Group, Tensor], Group] | None = None
    num_rereads: int = 0
    estimate: Estimate | None = None
    owns_decay: Callable[[Group], bool] = _never

    @cached_property
    def state_names(self) -> tuple[str, ...]:
        """The names of its states."""
        return tuple(spec.name for spec in self.states)

    @cached_property
    def needed_names(self) -> tuple[str, ...]:
        """Of the states that a parameter has under any settings."""
        return tuple(spec.name for spec in self.states if spec.kept is None)

    def kept_names(self, group: Group) -> tuple[str, ...]:
        """Of the states that a group keeps."""
        if len(self.needed_names) == len(self.states):
            return self.state_names
        return tuple([spec.name for spec in self.states if spec.kept is None or spec.kept(group)])

    def spec(self, name: str) -> StateSpec:
        """Of the state `name`, be it the rule's or of a stage."""
        return next((spec for spec in self.states if spec.name == name), StateSpec(name))

    def shape_of(self, name: str, param: Tensor) -> torch.Size | None:
        """Shape of the state `name` of `param`; None: it keeps no such state."""
        shape = self.spec(name).shape
        return param.shape if shape is None else shape(param.shape)

    def kept_by(self, param: Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `names` that `param` keeps."""
        return tuple(name for name in names if self.shape_of(name, param) is not None)

    def like(self, name: str, param: Tensor) -> Tensor:
        """A tensor with the shape, strides and device of the state `name`: `param` itself, where it has them."""
        shape = self.shape_of(name, param)
        assert shape is not None
        return param if shape == param.shape else param.detach().new_empty(shape)


@dataclass(frozen=True)
class ClipBounds:
    """What a clip bounds besides the global norm; inf: not at all.

    Args:
        max_value: Of each element, after scaling.
        max_tensor_norm: Of the L2 norm of one tensor's gradient.
        unit_ratio: Of the L2 norm of one unit's gradient, divided by that of its parameters. A unit is a row of the
            first dimension; a tensor of fewer than two dimensions is one unit.
        unit_eps: Least norm of the parameters in that ratio.
    """

    max_value: float = math.inf
    max_tensor_norm: float = math.inf
    unit_ratio: float = math.inf
    unit_eps: float = 0.0

    @property
    def limits_parts(self) -> bool:
        """Whether tensors or units are scaled down by themselves."""
        return math.isfinite(self.max_tensor_norm) or math.isfinite(self.unit_ratio)


class Clip(ABC):
    """A gradient clip that the step can fold in (see `lightning_optkit.clipping`).

    A class to derive from, as `Average` is: LightningCLI looks a class up that a file names by its bases.
    """

    @property
    @abstractmethod
    def needs_norm(self) -> bool:
        """Whether the gradients are read once before the step: for the global norm, or to find non-finite ones."""

    @property
    @abstractmethod
    def bounds(self) -> ClipBounds:
        """What else is bounded."""

    @abstractmethod
    def norm_bound(self, norm: Tensor) -> Tensor | float:
        """Largest global norm that this step's gradients may have, given the one they have after unscaling.

        Called once per step, so a clip may learn from what it is given. `norm` is 0-d; on CUDA it must not be waited
        for, and it is NaN in a step that will be skipped.
        """


@runtime_checkable
class StatefulClip(Protocol):
    """What a clip has besides that goes by the gradients it has seen."""

    def state_dict(self) -> dict[str, Any]:
        """What it has learned, in tensors and plain types."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        ...


class AverageKind(IntEnum):
    """How an average weighs a new value; as in csrc/core/tables.h."""

    NONE = 0
    EXPONENTIAL = 1
    UNIFORM = 2


class KeptInState(ABC):
    """An average of the parameters that is kept in `optimizer.state[p]`, by the step or in a pass of its own."""

    @property
    @abstractmethod
    def state_name(self) -> str:
        """Its name in `optimizer.state[p]`."""

    @property
    @abstractmethod
    def start(self) -> int | float:
        """First optimizer step, from 1, whose result is averaged; a float: a fraction of a run yet to be looked up."""

    @property
    @abstractmethod
    def every(self) -> int:
        """Optimizer steps between updates of the average."""


class Average(KeptInState):
    """An average of the parameters that the step can keep (see `lightning_optkit.averaging`)."""

    @property
    @abstractmethod
    def kind(self) -> AverageKind:
        """How it weighs a new value."""

    @property
    @abstractmethod
    def decay(self) -> float:
        """Share of the old average kept by an update of the exponential kind, in [0, 1)."""
