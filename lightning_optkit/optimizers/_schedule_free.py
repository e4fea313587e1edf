# SPDX-License-Identifier: Apache-2.0
"""Shared by the schedule-free rules: the weights of the average, and the switch between y and x.

Source: Defazio et al. 2024, arXiv:2405.15682, Equations 2-4 and Algorithm 1.
"""

from collections.abc import Callable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_optkit._checks import check_int, shown
from lightning_optkit.step import Average, OnePassOptimizer
from lightning_optkit.step.arguments import check_flag, check_number
from lightning_optkit.step.full_precision import full_precision
from lightning_optkit.step.numbers import compute_dtype
from lightning_optkit.step.rule import Group, Hyperparameters, Scalar, State
from lightning_optkit.step.shards import local
from lightning_optkit.step.split_weights import joined

__all__ = ["WEIGHT_SUM", "ScheduleFreeOptimizer", "average_hyperparameters", "move", "rate_and_share"]

WEIGHT_SUM = (Scalar("weight_sum", 0.0, 0.0), Scalar("weight_sum_rest", 0.0, 0.0, signed=True))
"""The sum of the weights so far, in two fp32 numbers."""


def average_hyperparameters(group: Group) -> Hyperparameters:
    """The numbers of the average, in the order of csrc/rules/schedule_free.h."""
    numbers = {name: float(group[name]) for name in ("warmup_steps", "r", "weight_lr_power")}
    # An update inside the backward pass comes before `step`, which records the rate.
    return {**numbers, "lr_max": max(float(group["lr_max"]), float(group["lr"]))}


def rate_and_share(state: State, group: Group, step: float, correction: float) -> tuple[float, float]:
    """This step's rate and the weight of z in the new average, as in csrc/rules/schedule_free.h."""
    warmup_steps, r, power, lr_max = average_hyperparameters(group).values()
    ramp = step / warmup_steps if step < warmup_steps else 1.0
    weight = step**r * (lr_max * ramp * correction) ** power
    total = float(state["weight_sum"]) + float(state["weight_sum_rest"]) + weight
    state["weight_sum"].fill_(total)
    state["weight_sum_rest"].fill_(total - float(state["weight_sum"]))
    return float(group["lr"]) * ramp * correction, weight / total if total else 0.0


def move(param: Tensor, direction: Tensor, z: Tensor, beta: float, rate: float, share: float) -> Tensor:
    """Updates z, and returns the amount to subtract from y."""
    update = (param - z) * share + rate * (1 - beta * (1 - share)) * direction
    z.sub_(rate * direction)
    return update


class ScheduleFreeOptimizer(OnePassOptimizer):
    """A rule whose parameters hold y during training and the average x otherwise.

    `train()` and `eval()` switch between the two. A new optimizer is in evaluation mode, and `step` raises until
    `train()` is called, so that nobody evaluates y by mistake. In evaluation mode y is kept in the state, so that
    training continues bitwise. The group entry `train_mode` of a state dict says which point the parameters held.

    The group entry `lr_max` is the largest rate so far, warm-up included, divided by the warm-up of the coming step:
    the rule multiplies it by that.
    """

    _learned = ("lr_max", "train_mode")
    _carried = ("y",)
    _lowered: Mapping[int, tuple[int, float]] = MappingProxyType({})  # by group: at which step, and the result

    def _given_beta(self, group: Group) -> tuple[str, Any]:
        """The argument for the weight of x in y, and its value, not checked yet."""
        raise NotImplementedError

    kept_entries = OnePassOptimizer.kept_entries | {"lr_max", "train_mode", "warmup_steps"}

    def _beta(self, group: Group) -> float:
        """Weight of x in y."""
        return float(self._given_beta(group)[1])

    # --- which point the parameters hold ---

    @property
    def in_training(self) -> bool:
        """Whether every parameter holds y."""
        return all(group["train_mode"] for group in self.param_groups)

    @torch.no_grad()
    def train(self) -> None:
        """Switches the parameters to y, where gradients are taken. No-op in training mode."""
        for group in self.param_groups:
            for param in () if group["train_mode"] else group["params"]:
                y = self._point_of(param, group)
                if y is not None:
                    param.copy_(y)
            group["train_mode"] = True

    def _point_of(self, param: Tensor, group: Group) -> Tensor | None:
        """Y of a parameter that holds x, taken out of its state; None before the first update, where both are equal."""
        state = self.state[param] if param in self.state else {}
        if "y" in state or "z" not in state or float(state["step"]) == 0:
            y: Tensor | None = state.pop("y", None)
            return y
        # Without a callback of this package, a sharded checkpoint restores only what a new optimizer's state has.
        x = param.detach().to(compute_dtype(param), copy=True)
        return x.lerp_(state["z"].to(x.dtype), 1 - self._beta(group))

    @torch.no_grad()
    def eval(self) -> None:
        """Switches the parameters to the average x. No-op in evaluation mode."""
        for param, x in self.averages().items():
            self.state[param]["y"] = param.detach().clone()
            param.copy_(x)
        for group in self.param_groups:
            group["train_mode"] = False

    @torch.no_grad()
    def averages(self) -> dict[Tensor, Tensor]:
        """The average x of every parameter that holds y and was updated."""
        found: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            for param in group["params"] if group["train_mode"] else ():
                state = self.state.get(param, {})
                if "z" in state and float(state["step"]) > 0:
                    y = joined(param.detach(), state).to(compute_dtype(param), copy=True)
                    found[param] = self._average_at(y, state, group).to(param.dtype)
        return found

    def _average_at(self, y: Tensor, state: State, group: Group) -> Tensor:
        """x, given y; overwrites y."""
        return y.lerp_(state["z"].to(y.dtype), 1 - 1 / self._beta(group))

    @override
    def _full_precision_of(self, param: Tensor) -> Tensor:
        state = self.state.get(param, {})
        if "y" not in state:
            return super()._full_precision_of(param)
        group = next(group for group in self.param_groups if any(param is other for other in group["params"]))
        y = full_precision(f"{self._owner}.full_precision_state_dict", state["y"], state).clone()
        return self._average_at(y, {"z": local(state["z"])}, group)

    def as_evaluated(self, state_dict: dict[str, Any], points: Mapping[Tensor, Tensor] | None = None) -> dict[str, Any]:
        """Returns the evaluation-mode version of a state dict taken in training mode; changes neither.

        Args:
            state_dict: The state dict.
            points: y of every parameter that has an average, as it is to be saved. Default: the parameters.
        """
        pairs = zip(chain.from_iterable(g["params"] for g in state_dict["param_groups"]), self._params(), strict=True)
        points = {param: param.detach() for param in self.averages()} if points is None else points
        state = dict(state_dict["state"])
        for saved_id, param in pairs:
            if param in points:
                state[saved_id] = {**state[saved_id], "y": points[param]}
        groups = [{**group, "train_mode": False} for group in state_dict["param_groups"]]
        return {**state_dict, "state": state, "param_groups": groups}

    def _params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; for new parameters, y equals x."""
        if isinstance(param_group, dict) and self.param_groups:
            param_group = {**param_group, "train_mode": self.in_training}
        super().add_param_group(param_group)

    # --- the step ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient.

        Raises:
            RuntimeError: in evaluation mode.
        """
        self._check_changed()
        # A first step at a rate of 0 moves nothing: torch makes room for a sharded checkpoint by it.
        makes_room = not self.state and all(float(group["lr"]) == 0 for group in self.param_groups)
        if not self.in_training and not makes_room:
            raise RuntimeError(
                f"{self._owner}.step: the parameters hold the average; call train() before training and eval() before "
                "anything is evaluated or saved, or add callbacks=[ScheduleFree()] to a Lightning Trainer."
            )
        is_in_backward = self._engine.early is not None  # its updates are done
        if not is_in_backward:
            self._lower_rates_of_warmup()
        for group in self.param_groups:
            group["lr_max"] = max(group["lr_max"], float(group["lr"]))
        result = super().step(closure)
        if is_in_backward:
            self._lower_rates_of_warmup()
        return result

    def _lower_rates_of_warmup(self) -> None:
        """Rewrites each `lr_max` for the warm-up of the coming step, which is greater than that of the last one.

        Counts are read only where a rate has fallen within the warm-up, since on CUDA that synchronizes.
        """
        for number, group in enumerate(self.param_groups):
            is_falling = self._engine.early is not None or float(group["lr"]) < group["lr_max"]  # or not known yet
            if not group["warmup_steps"] or not is_falling:
                continue
            steps = self._num_steps(group)
            if steps < group["warmup_steps"] and self._lowered.get(number) != (steps, group["lr_max"]):
                group["lr_max"] *= steps / (steps + 1)
                self._lowered = {**self._lowered, number: (steps, group["lr_max"])}  # not again if it is skipped

    def _num_steps(self, group: Group) -> int:
        """Completed steps of a group."""
        if self._engine.early is not None:
            return self._engine.early.clock(self.state)
        states = (self.state[param] for param in group["params"] if param in self.state)
        return int(max((float(state["step"]) for state in states if "step" in state), default=0))

    # --- checks ---

    def _check_group(self, group: Group) -> None:
        check_number(self._owner, *self._given_beta(group), "(0, 1)")
        check_int(self._owner, "warmup_steps", group["warmup_steps"], minimum=0)
        check_number(self._owner, "r", group["r"], "[0, inf)")
        check_number(self._owner, "weight_lr_power", group["weight_lr_power"], "[0, inf)")
        if group["l1"]:
            raise ValueError(
                f"{self._owner}(l1={shown(group['l1'])}): must be 0; zeros of y are not zeros of the average."
            )
        if group["cautious"]:
            raise ValueError(f"{self._owner}(cautious=True): must be False; y and z decay by the same amount.")
        if group["caution"]:
            raise ValueError(f"{self._owner}(caution=True): must be False; y and z follow the same direction.")

    def _check_no_average(self, average: Average | None) -> None:
        if average is not None:
            raise ValueError(
                f"{self._owner}(average={shown(average)}): must be None; the rule keeps an average itself."
            )

    def keep_average(self, average: Average | None) -> None:
        """Raises ValueError for any average, since the rule keeps one itself."""
        self._check_no_average(average)

    def _check_learned(self, group: Group) -> None:
        check_flag(self._owner, "train_mode", group["train_mode"])
        check_number(self._owner, "lr_max", group["lr_max"], "[0, inf)")
