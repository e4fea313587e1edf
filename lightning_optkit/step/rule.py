# SPDX-License-Identifier: Apache-2.0
"""The interface of an update rule in the one-pass step: its states, its numbers, and its arithmetic in PyTorch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_optkit.step.statistics import TensorStatistics

__all__ = [
    "Estimate",
    "Group",
    "Hyperparameters",
    "Rule",
    "Scalar",
    "State",
    "StateSpec",
    "Update",
    "decay_per_rate",
]

Group = dict[str, Any]
"""One entry of `optimizer.param_groups`."""

State = dict[str, Tensor]
"""One entry of `optimizer.state`."""

Hyperparameters = dict[str, float]
"""The numbers that a rule reads from its group, with the names and in the order of the compiled rule."""

Update = Callable[[Tensor, Tensor, State, Group, float], Tensor]
"""(param, grad, state, group, step) -> the amount to subtract from the parameter; updates `state` in place."""


def decay_per_rate(group: Group) -> float:
    """The factor that decoupled decay has beside `lr`: with `decouple_lr` it cancels the base rate."""
    decay = float(group["weight_decay"])
    return decay / float(group["decay_lr"]) if group["decouple_lr"] else decay


@dataclass(frozen=True)
class StateSpec:
    """A tensor that a rule keeps for each parameter.

    Args:
        name: Name in `optimizer.state[p]`.
        nonnegative: Whether it is a sum of squares or of magnitudes, so that in 8 bits it needs no sign.
        full_precision: Whether it is a point, not an average, and so must stay at fp32 or wider.
        written_once: Whether only the first update of a parameter writes it.
        kept: Whether a group keeps it under its settings; None: always.
        fresh: Its initial value, given the group; None: zero.
        shape: Its shape, given that of the parameter (default: the same); it returns None for a parameter without this
            state. A compiled rule supports other shapes only if it has factors (csrc/core/tables.h).
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
    """A number per parameter that is carried across steps, a 0-d tensor in the state.

    Args:
        name: Name in `optimizer.state[p]`.
        fresh: Its value before the first step.
        inherited: Its value if a loaded state lacks it.
        signed: Whether it may be negative.

    Example:
        >>> Scalar("mu_product", fresh=1.0, inherited=1.0)  # of NAdam: the product of its momenta so far
        Scalar(name='mu_product', fresh=1.0, inherited=1.0, signed=False)
    """

    name: str
    fresh: float
    inherited: float
    signed: bool = False


@dataclass(frozen=True)
class Estimate:
    """How a rule computes its rate from two sums over all parameters, which its optimizer's `_learn` receives.

    Args:
        value: The estimate in a group: 0-d, fp64, on the device of the parameters. In the compiled rule it is the last
            hyperparameter.
        rate: (group, step) -> the factor of the group's rate, stages included.
        observe: (param, grad, state, group, step) -> one parameter's part of the two sums. The arguments are those of
            `update`, with `state` as `update` left it.
        observes_before: Whether `state` is as it was before `update` instead.
    """

    value: Callable[[Group], Tensor]
    rate: Callable[[Group, float], float]
    observe: Callable[[Tensor, Tensor, State, Group, float], tuple[float, float]]
    observes_before: bool = False


def _never(group: Group) -> bool:
    return False


@dataclass(frozen=True)
class Rule:
    """An update rule: the name of the compiled rule, and the same arithmetic in plain PyTorch.

    Args:
        name: Name in csrc/rules/all.h.
        states: Its states, in the order of the compiled rule.
        hyperparameters: Reads the rule's own numbers from a parameter group, in the order of the compiled rule.
        update: The reference implementation. `step` counts this update, from 1.
        scalars: The scalars of a group that keeps state, in the order of the compiled rule.
        counts_steps: Whether torch's class keeps a step count, so that a loaded one is valid.
        needs_whole: What the rule cannot do on a part of the tensor, worded to follow "to"; a sharded parameter is
            gathered for it.
        trust_ratio: Factor of the rate, given the group and the statistics of the tensor, for a rule that uses norms of
            the whole tensor.
        trust_ratio_of_update: Whether it uses the norm of the update, which requires a second read of the state.
        resolve: The group with the defaults that depend on the parameter filled in; None: the group itself. A compiled
            rule does this internally.
        num_rereads: How often the rule reads a gradient or a parameter again, besides the one walk.
        estimate: For a rule that computes its rate from all parameters together.
        owns_decay: Whether the rule applies weight decay itself in this group, instead of the stage. Such a rule
            applies the cautious mask too, since the mask is not for the decay.

    Example:
        >>> def update(param, grad, state, group, step):
        ...     return group["lr"] * grad.sign()
        >>> rule = Rule("sign", states=(), hyperparameters=lambda group: {}, update=update)
        >>> rule.state_names
        ()
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
        """The names of all states."""
        return tuple(spec.name for spec in self.states)

    @cached_property
    def needed_names(self) -> tuple[str, ...]:
        """The names of the states that exist under any settings."""
        return tuple(spec.name for spec in self.states if spec.kept is None)

    def kept_names(self, group: Group) -> tuple[str, ...]:
        """The names of the states that a group keeps."""
        if len(self.needed_names) == len(self.states):
            return self.state_names
        return tuple([spec.name for spec in self.states if spec.kept is None or spec.kept(group)])

    def spec(self, name: str) -> StateSpec:
        """The specification of state `name`, which may belong to the rule or to a stage."""
        return next((spec for spec in self.states if spec.name == name), StateSpec(name))

    def shape_of(self, name: str, param: Tensor) -> torch.Size | None:
        """Shape of state `name` of `param`; None if the parameter does not keep it."""
        shape = self.spec(name).shape
        return param.shape if shape is None else shape(param.shape)

    def kept_by(self, param: Tensor, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of `names` that `param` keeps."""
        return tuple(name for name in names if self.shape_of(name, param) is not None)

    def like(self, name: str, param: Tensor) -> Tensor:
        """A tensor with the shape, strides and device of state `name`: `param` itself, if they are the same."""
        shape = self.shape_of(name, param)
        assert shape is not None
        # State of another shape is whole in every process, also that of a sharded parameter.
        return param if shape == param.shape else torch.empty(shape, dtype=param.dtype, device=param.device)
