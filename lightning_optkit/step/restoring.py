# SPDX-License-Identifier: Apache-2.0
"""The saved state of one parameter: checks it, and converts it to the dtypes and layouts of the walk."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_optkit.step.plain import is_dense
from lightning_optkit.step.quantized_state import BLOCK, scale_name
from lightning_optkit.step.rule import Group, Rule, Scalar, State
from lightning_optkit.step.rule_identity import NEXT, is_of_a_variant
from lightning_optkit.step.saved import saved_floats, saved_number, saved_tensor
from lightning_optkit.step.shards import local, place_like
from lightning_optkit.step.split_weights import CORRECTIONS, is_cast
from lightning_optkit.step.state import StateLayout, fill_

__all__ = ["Place", "check_state", "restored"]

_OTHER_AVERAGES = ("ema_", "power_ema_", "swa_", "lawa_", "num_averaged_")  # averaged outside the step; ignored


@dataclass(frozen=True)
class Place:
    """A parameter that state is loaded for, with its new group and rule.

    Args:
        number: Its index among all parameters.
        param: The parameter.
        group: Its new group.
        rule: Its rule.
        carried: Names of other state, in the dtype of the parameter.
        layout: Dtypes of the remaining state.
    """

    number: int
    param: Tensor
    group: Group
    rule: Rule
    carried: tuple[str, ...]
    layout: StateLayout

    @property
    def scalars(self) -> dict[str, Scalar]:
        """The scalars to restore, by name."""
        return {scalar.name: scalar for scalar in self.layout.scalars(self.rule, self.rule.state_names)}

    @property
    def signs(self) -> dict[str, bool]:
        """Whether each state of the rule is signed."""
        return {name: not self.rule.spec(name).nonnegative for name in self.rule.state_names}

    @property
    def tensors(self) -> set[str]:
        """Names of the tensors to restore."""
        return {*self.rule.state_names, *self.layout.tensors((), self.group, self.param), *self.carried}


def check_state(what: str, place: Place, saved: Mapping[Any, Any]) -> None:
    """Raises if `saved` cannot be state of the parameter.

    Args:
        what: The beginning of error messages.
        place: The parameter.
        saved: Values by name; None counts as missing.

    Raises:
        TypeError: for a value of a wrong type.
        ValueError: for state of another rule or shape, or invalid values.
    """
    held = _taken_over(saved)
    scalars = {"num_averaged": Scalar("num_averaged", 0.0, 1.0), **place.scalars}
    scaled = {scale_name(name): name for name in place.rule.state_names}
    for name, value in held.items():
        entry = f"{what} of parameter {place.number}, the state {name!r}"
        if not isinstance(name, str):
            raise TypeError(f"{entry} must have a name that is a string.")
        if name.startswith(_OTHER_AVERAGES):
            continue
        if name in scalars:
            saved_number(entry, value, signed=scalars[name].signed)
        elif name in scaled:
            _check_scale(entry, place, scaled[name], held)
        elif name in place.tensors | {"compensation", *CORRECTIONS, "ema", "power_ema", "swa"} or is_of_a_variant(
            name, place.rule
        ):
            _check_tensor(entry, place, name, held)
        else:
            raise ValueError(f"{what} the checkpoint is of another rule; it holds the state {name!r}; {NEXT}.")
    _check_is_whole(what, place, held)


def _check_tensor(entry: str, place: Place, name: str, held: Mapping[str, Any]) -> None:
    value, param, shape = saved_tensor(entry, held[name]), place.param, place.rule.shape_of(name, place.param)
    if shape is None:
        raise ValueError(f"{entry} must not be there; its parameter of shape {list(param.shape)} keeps none.")
    if value.shape != shape:
        allowed = "" if shape == param.shape else f"; it must have {list(shape)}"
        raise ValueError(f"{entry} has shape {list(value.shape)}, its parameter {list(param.shape)}{allowed}.")
    if name in CORRECTIONS:
        if value.dtype != CORRECTIONS[name]:
            raise ValueError(f"{entry} must be {_name_of(CORRECTIONS[name])}, got {_name_of(value.dtype)}.")
    elif name in place.rule.state_names and value.dtype == torch.uint8:
        if scale_name(name) not in held:
            raise ValueError(f"{entry} is in 8 bits; it must have its scales beside it, {scale_name(name)!r}.")
        if isinstance(value, DTensor) and not isinstance(param, DTensor):
            raise ValueError(f"{entry} is in 8 bits; it must be whole, as its parameter is.")
        if not is_dense(local(value)):
            raise ValueError(f"{entry} is in 8 bits; it must be in memory without gaps.")
    elif not (value.is_floating_point() or (value.is_complex() and param.is_complex())):
        kind = "complex or floating-point" if param.is_complex() else "floating-point"
        raise ValueError(f"{entry} must hold {kind} numbers, got {_name_of(value.dtype)}.")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_scale(entry: str, place: Place, name: str, held: Mapping[str, Any]) -> None:
    codes = held.get(name)
    if not isinstance(codes, Tensor) or codes.dtype != torch.uint8:
        raise ValueError(f"{entry} must stand beside {name!r} in 8 bits.")
    saved_floats(entry, held[scale_name(name)], (-(-codes.numel() // BLOCK),))


def _check_is_whole(what: str, place: Place, held: Mapping[str, Any]) -> None:
    rule = place.rule
    needed = rule.kept_by(place.param, rule.needed_names)
    begun = (*rule.state_names, *(scalar.name for scalar in rule.scalars), *(("step",) if needed else ()))
    found = [name for name in begun if name in held]
    wanted = (*needed, "step") if rule.counts_steps else needed
    missing = [name for name in wanted if name not in held]
    if found and missing:
        raise ValueError(
            f"{what} the state of parameter {place.number} holds {found[0]!r} but no {missing[0]!r}; it must be whole."
        )


def restored(place: Place, saved: Mapping[str, Any]) -> State:
    """Checked state, converted for the parameter, in memory of its own.

    `Optimizer.load_state_dict` would cast state to the parameter's dtype, e.g. fp32 moments of bf16 parameters to bf16,
    and would alias the checkpoint's tensors where no cast is needed.
    """
    held, state = _taken_over(saved), State()
    for name in [name for name in held if name in place.tensors]:
        _restore(place, name, held, state)
    for scalar in place.scalars.values():
        # torch's SGD keeps no step count: a momentum buffer means that there was a first step.
        is_inherited = scalar.name != "num_averaged" and any(name in held for name in place.rule.state_names)
        if scalar.name in held or is_inherited:
            number = saved_number(scalar.name, held.get(scalar.name, scalar.inherited), signed=scalar.signed)
            state[scalar.name] = number.to(place.param.device)
    return state


def _restore(place: Place, name: str, held: Mapping[str, Any], state: State) -> None:
    param, rule, value = place.param, place.rule, held[name].detach()
    like = rule.like(name, param)
    dtype = param.dtype if name in place.carried else place.layout.dtype_of(name, param, rule)
    tensor = torch.empty_like(local(like), dtype=dtype, requires_grad=False)
    if scale_name(name) in held:
        state[scale_name(name)] = held[scale_name(name)].detach().to(value.device, torch.float32, copy=True)
    fill_(tensor, like, state, rule.spec(name), value)
    state[name] = place_like(tensor, like)


def _taken_over(saved: Mapping[Any, Any]) -> dict[Any, Any]:
    """The saved state without None, and without a correction that went through torch's class of the rule.

    That class casts all state to the dtype of the parameter, and then steps without this.
    """
    return {name: value for name, value in saved.items() if value is not None and not is_cast(name, value)}
