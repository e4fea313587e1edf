# SPDX-License-Identifier: Apache-2.0
"""What an update rule, a clip and an average must say of themselves for the one-pass step to use them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_optkit.step.statistics import TensorStatistics

__all__ = [
    "Average",
    "Clip",
    "ClipBounds",
    "Estimate",
    "Group",
    "KeptInState",
    "LearningClip",
    "Rule",
    "Scalar",
    "State",
    "Update",
]

Group = dict[str, Any]
"""One entry of `optimizer.param_groups`."""

State = dict[str, Tensor]
"""One entry of `optimizer.state`."""

Update = Callable[[Tensor, Tensor, State, Group, float], Tensor]
"""(param, grad, state, group, step) -> what is subtracted from the parameter; writes `state` in place."""


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
            the last of the hypers.
        rate: (group, step) -> the factor of the group's rate, for the stages too.
        observe: (param, grad, state, group, step) -> one parameter's part of the two sums, given what `update` was
            given, after it.
    """

    value: Callable[[Group], Tensor]
    rate: Callable[[Group, float], float]
    observe: Callable[[Tensor, Tensor, State, Group, float], tuple[float, float]]


@dataclass(frozen=True)
class Rule:
    """An update rule: its name among the compiled rules, and the same arithmetic in plain PyTorch.

    Args:
        name: Name in csrc/rules/all.h.
        states: Names in `optimizer.state[p]`, in the order of the compiled rule.
        hypers: Reads the rule's own numbers from a parameter group, in the order of the compiled rule.
        update: The reference. `step` counts this update, from 1.
        scalars: Kept by a group that keeps state, in the order of the compiled rule.
        counts_steps: Whether torch's class keeps a step count, and so whether a loaded one is to be believed.
        fresh: What a state tensor starts from, given its name and the group; None: zero.
        needs_whole: What the rule does that a part of the tensor is not enough for, in words that follow "cannot"; such
            a parameter is not sharded over processes.
        trust: Factor of the rate, given the group and the sums that `lightning_optkit.step.reference` describes; for a
            rule that sets its rate by norms of the whole tensor.
        shape: Of a state tensor, given its name and the shape of the parameter; None from it: such a parameter does not
            keep that state. For a rule without one, every state has the shape of its parameter. A compiled rule walks
            such states only if it has factors (csrc/core/tables.h).
        resolve: What a group means beside one parameter, as stored; None: what it says. A compiled rule knows it by
            itself.
        num_rereads: How often the rule reads a gradient or a parameter again, after the one walk.
        wide: States that are points, not averages, and so in full precision whatever `state_dtype` is.
        fixed: States that only the first update of a parameter writes.
        estimate: For a rule that sets its rate by what it learns of all parameters together.
        trusts_update: Whether a trust goes by the norm of the update, for which the state is read once more.
    """

    name: str
    states: tuple[str, ...]
    hypers: Callable[[Group], tuple[float, ...]]
    update: Update
    scalars: tuple[Scalar, ...] = ()
    counts_steps: bool = True
    fresh: Callable[[str, Group], float] | None = None
    needs_whole: str | None = None
    trust: Callable[[Group, TensorStatistics], float] | None = None
    shape: Callable[[str, torch.Size], torch.Size | None] | None = None
    resolve: Callable[[Group, Tensor], Group] | None = None
    num_rereads: int = 0
    wide: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    estimate: "Estimate | None" = None
    trusts_update: bool = True

    def shape_of(self, name: str, param: Tensor) -> torch.Size | None:
        """Shape of the state `name` of `param`, be it the rule's or of a stage; None: it keeps no such state."""
        if self.shape is None or name not in self.states:
            return param.shape
        return self.shape(name, param.shape)

    def held_by(self, param: Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
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
class LearningClip(Protocol):
    """What a clip has besides that goes by the gradients it has seen."""

    def state_dict(self) -> dict[str, Any]:
        """What it has learned, in tensors and plain types."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        ...


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
    def kind(self) -> int:
        """AverageKind of csrc/core/tables.h: 1 exponential, 2 uniform."""

    @property
    @abstractmethod
    def decay(self) -> float:
        """Share of the old average kept by an update of the exponential kind, in [0, 1)."""
