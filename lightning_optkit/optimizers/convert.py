# SPDX-License-Identifier: Apache-2.0
"""Converts a torch optimizer to ours and back in place, so that schedulers and users keep their reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit._checks import check_instance
from lightning_optkit._torch_private import (
    instance_amp_scaling,
    is_watched_by_scheduler,
    patch_step,
    set_amp_scaling,
    version_of,
    watch_step,
)
from lightning_optkit.optimizers.adadelta import Adadelta
from lightning_optkit.optimizers.adafactor import Adafactor
from lightning_optkit.optimizers.adagrad import Adagrad
from lightning_optkit.optimizers.adam import Adam
from lightning_optkit.optimizers.adamax import Adamax
from lightning_optkit.optimizers.adamw import AdamW
from lightning_optkit.optimizers.muon import OWN_KEYS, Muon
from lightning_optkit.optimizers.nadam import NAdam
from lightning_optkit.optimizers.radam import RAdam
from lightning_optkit.optimizers.rmsprop import RMSprop
from lightning_optkit.optimizers.sgd import SGD
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.full_precision import full_precision
from lightning_optkit.step.full_precision import full_precision_state_dict as write_full_precision
from lightning_optkit.step.loading import places
from lightning_optkit.step.restoring import restored
from lightning_optkit.step.rule import Rule, State
from lightning_optkit.step.shards import local, place_like
from lightning_optkit.step.split_weights import LOW_ORDER_PARTS, is_cast, low_order_part
from lightning_optkit.step.stages import ADDED_ENTRIES
from lightning_optkit.step.state import fill_

__all__ = [
    "from_torch_",
    "full_precision_state_dict",
    "one_pass_class",
    "one_pass_like",
    "to_torch_",
    "why_not_convertible",
]

_AUTOMATIC = {"fused": None, "foreach": None}  # we select the implementation
_ADDED_KEYS = {*ADDED_ENTRIES, "decoupled_weight_decay", *_AUTOMATIC}
_ADDED_KEYS |= {*OWN_KEYS, "maximize", "differentiable"}  # torch.optim.Muon lacks the last two

_ADDED_STATE = {"momentum_step"}  # torch would not update it

_LEFT = "versions_of_parts"
"""Attribute: the versions of the parameters that the low-order parts in the state belong to. Torch's steps, and anybody
else, may change the parameters before the next conversion. None: they hold an average, and the parts are not its."""
_AVERAGES = "averages_of_parameters"
"""Attribute: the average that a 16-bit parameter holds, in fp32, with the version of the parameter."""


@dataclass(frozen=True)
class _Before:
    """The attributes that `to_torch_` restores."""

    groups: list[dict[str, Any]]
    defaults: dict[str, Any]
    supports_amp_scaling: bool | None
    attributes: frozenset[str]
    hooks: list[RemovableHandle] = field(default_factory=list)


_OURS: dict[type[Optimizer], type[OnePassOptimizer]] = {
    torch.optim.SGD: SGD,
    torch.optim.Adagrad: Adagrad,
    torch.optim.RMSprop: RMSprop,
    torch.optim.Adadelta: Adadelta,
    torch.optim.Adafactor: Adafactor,
    torch.optim.Adam: Adam,
    torch.optim.AdamW: AdamW,
    torch.optim.Adamax: Adamax,
    torch.optim.Muon: Muon,
    torch.optim.NAdam: NAdam,
    torch.optim.RAdam: RAdam,
}


def one_pass_class(cls: type[Optimizer]) -> type[OnePassOptimizer] | None:
    """Our class of the same rule as the torch.optim class `cls`, or None.

    Example:
        >>> one_pass_class(torch.optim.Adam).__name__
        'Adam'
    """
    return _OURS.get(cls)


def why_not_convertible(optimizer: Optimizer) -> str | None:
    """Why `from_torch_` would refuse `optimizer`, or None.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> why_not_convertible(torch.optim.Rprop([weight]))
        'no one-pass rule for torch.optim.Rprop'
    """
    cls = type(optimizer)
    if isinstance(optimizer, OnePassOptimizer):
        return f"{cls.__name__} is one-pass already"
    if cls not in _OURS:
        where = "torch.optim" if cls.__module__.startswith("torch.optim") else cls.__module__
        base = next((base for base in cls.__mro__ if base in _OURS), None)
        if base is not None:
            return f"{where}.{cls.__name__} changes torch.optim.{base.__name__}"
        return f"no one-pass rule for {where}.{cls.__name__}"
    try:
        _build(optimizer, "nearest", torch.float32, False)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).removesuffix(".")
    return None


def _build(
    optimizer: Optimizer, rounding: str, state_dtype: torch.dtype | Literal["int8"], statistics: bool
) -> OnePassOptimizer:
    """A one-pass optimizer with the same groups, built by its constructor, so that checks run before any change."""
    build: Callable[..., OnePassOptimizer] = _OURS[type(optimizer)]
    groups = [{**group, **_AUTOMATIC} for group in optimizer.param_groups]
    return build(groups, rounding=rounding, state_dtype=state_dtype, statistics=statistics)


def one_pass_like(optimizer: Optimizer) -> OnePassOptimizer:
    """A new one-pass optimizer of the rule and groups of torch's `optimizer`, without state.

    Raises:
        KeyError: if it has no one-pass rule (`why_not_convertible`).

    Example:
        >>> one_pass_like(torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])).param_groups[0]["lr"]
        0.001
    """
    return _build(optimizer, "nearest", torch.float32, False)


def from_torch_(
    optimizer: Optimizer,
    *,
    rounding: Literal["nearest", "stochastic", "kahan", "split24", "split32"] = "nearest",
    state_dtype: torch.dtype | Literal["int8"] = torch.float32,
    statistics: bool = False,
) -> None:
    """Makes a `torch.optim` optimizer a one-pass optimizer of the same rule, groups and state; its torch class is kept.

    Args:
        optimizer: An instance of a torch class that has a one-pass rule, not of a subclass.
        rounding: See `lightning_optkit.step.Stages`.
        state_dtype: See `lightning_optkit.step.Stages`.
        statistics: See `lightning_optkit.step.Stages`.

    Raises:
        TypeError: if it has no one-pass rule; nothing is changed then.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
        >>> from_torch_(optimizer)
        >>> optimizer.explain().groups[0].rule
        'adam'
    """
    check_instance(
        "from_torch_", "optimizer", optimizer, Optimizer, "one such as torch.optim.AdamW(model.parameters())"
    )
    reason = why_not_convertible(optimizer)
    if reason is not None:
        raise TypeError(f"from_torch_(optimizer=<{type(optimizer).__name__}>): {reason}.")
    cls = _OURS[type(optimizer)]
    ours = _build(optimizer, rounding, state_dtype, statistics)
    saved = optimizer.state_dict()["state"]
    left, _ = vars(optimizer).pop(_LEFT, {}), vars(optimizer).pop(_AVERAGES, None)
    built: dict[Tensor, State] = {}
    for place in places(ours, ours.param_groups):
        state = saved.get(place.number, {})
        is_moved = left.get(place.param, version_of(place.param)) != version_of(place.param)
        gone = LOW_ORDER_PARTS.values() if is_moved else ()
        built[place.param] = restored(place, {name: value for name, value in state.items() if name not in gone})
    before = _Before(
        groups=[{key: group[key] for key in _AUTOMATIC if key in group} for group in optimizer.param_groups],
        defaults=optimizer.defaults,
        supports_amp_scaling=instance_amp_scaling(optimizer),
        attributes=frozenset(vars(optimizer)),
    )
    for group, new in zip(optimizer.param_groups, ours.param_groups, strict=True):
        group.update({key: value for key, value in new.items() if key not in group})
        group.update(_AUTOMATIC)
    taken_over = {key: value for key, value in vars(ours).items() if key not in vars(optimizer)}
    _become(optimizer, cls)
    vars(optimizer).update(taken_over)
    optimizer.defaults = {**ours.defaults, **optimizer.defaults, **_AUTOMATIC}
    set_amp_scaling(optimizer, False)
    optimizer._before_conversion = before  # type: ignore[attr-defined]
    before.hooks.append(optimizer.register_state_dict_post_hook(_save_as_asked_for))
    assert isinstance(optimizer, OnePassOptimizer)
    for param, state in built.items():
        if state:
            optimizer.state[param] = state
        else:
            optimizer.state.pop(param, None)


def to_torch_(optimizer: OnePassOptimizer) -> None:
    """Turns a converted optimizer back into the torch optimizer it was, with its current state.

    Moments of 16-bit parameters are cast to the parameters' dtype, as torch's classes require. State that torch's class
    does not know (averages, counters) is kept; torch ignores it.

    Args:
        optimizer: One that `from_torch_` converted.

    Raises:
        TypeError: if it is no optimizer.
        ValueError: if it was not converted from a torch optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> from_torch_(optimizer)
        >>> to_torch_(optimizer)
        >>> type(optimizer)
        <class 'torch.optim.adamw.AdamW'>
    """
    check_instance("to_torch_", "optimizer", optimizer, Optimizer, "one that from_torch_ converted")
    before: _Before | None = vars(optimizer).pop("_before_conversion", None)
    cls = getattr(optimizer, "_torch_class", None)
    if before is None or cls is None:
        raise ValueError(
            f"to_torch_(optimizer=<{type(optimizer).__name__}>): it was not made by from_torch_, or it is a copy."
        )
    shown = {param: (version_of(param), average) for param, average in optimizer._shown.items()}
    for hook in before.hooks:
        hook.remove()
    for group, implementation in zip(optimizer.param_groups, before.groups, strict=False):
        rule = optimizer._rule(group)
        for param in group["params"]:
            _cast_as_torch_keeps_(optimizer.state.get(param, {}), rule, param)
        for key in _ADDED_KEYS - set(before.defaults):
            group.pop(key, None)
        group.update(implementation)
    optimizer.defaults = before.defaults
    for name in set(vars(optimizer)) - before.attributes - {"step"}:
        del vars(optimizer)[name]
    set_amp_scaling(optimizer, before.supports_amp_scaling)
    params = [param for param, state in optimizer.state.items() if low_order_part(state) is not None]
    if params:
        setattr(optimizer, _LEFT, {param: None if param in shown else version_of(param) for param in params})
    if shown:
        setattr(optimizer, _AVERAGES, shown)
    _become(optimizer, cls)


def _cast_as_torch_keeps_(state: State, rule: Rule, param: Tensor) -> None:
    """Gives the state of a parameter the dtypes and strides of torch's class, in place, without what is ours alone."""
    for name in [name for name in rule.state_names if name in state]:
        like = rule.like(name, param)
        plain = torch.empty_like(local(like), requires_grad=False)
        if state[name].dtype == plain.dtype and local(state[name]).stride() == plain.stride():
            continue  # a copy of all states would double their memory
        fill_(plain, like, state, rule.spec(name), state[name])
        state[name] = place_like(plain, like)
    for name in _ADDED_STATE:
        state.pop(name, None)


def full_precision_state_dict(optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """`model.state_dict()` with the 16-bit parameters of `optimizer` in fp32, also after a fit with `Fuse`.

    Args:
        optimizer: A one-pass optimizer, or one of torch that was converted: `trainer.optimizers[0]` after the fit.
            After a fit with `WeightAveraging` this is the average. A parameter that was written since it was converted
            back is exported as it is.
        model: The model with its parameters.

    Raises:
        TypeError: if it is no optimizer.
        ValueError: if the model's state dict lacks a parameter, or the state of one is damaged.

    Example:
        >>> model = torch.nn.Linear(2, 1).bfloat16()
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> from_torch_(optimizer, rounding="split32")
        >>> model(torch.ones(1, 2).bfloat16()).sum().backward()
        >>> optimizer.step()
        >>> to_torch_(optimizer)
        >>> full_precision_state_dict(optimizer, model)["weight"].dtype
        torch.float32
    """
    if isinstance(optimizer, OnePassOptimizer):
        return optimizer.full_precision_state_dict(model)
    check_instance("full_precision_state_dict", "optimizer", optimizer, Optimizer, "one such as trainer.optimizers[0]")
    left, averages = vars(optimizer).get(_LEFT, {}), vars(optimizer).get(_AVERAGES, {})

    def value_of(param: Tensor) -> Tensor:
        version, average = averages.get(param, (None, None))
        if average is not None and version == version_of(param):
            return full_precision("full_precision_state_dict", average, {})
        state = {name: value for name, value in optimizer.state.get(param, {}).items() if not is_cast(name, value)}
        is_moved = left.get(param, version_of(param)) != version_of(param)
        return full_precision("full_precision_state_dict", param, {} if is_moved else state)

    return write_full_precision("full_precision_state_dict", optimizer.param_groups, model, value_of)


def _save_as_asked_for(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Saves what torch's class can continue from: the implementation that the user selected, and no 8-bit codes."""
    assert isinstance(optimizer, OnePassOptimizer)
    before: _Before = optimizer._before_conversion  # type: ignore[attr-defined]
    for group, implementation in zip(state_dict["param_groups"], before.groups, strict=False):
        group.update(implementation)
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        rule = optimizer._rule(group)
        for number in saved["params"]:
            state = state_dict["state"].get(number)
            if state is not None:
                state_dict["state"][number] = _in_full(state, rule)


def _in_full(state: State, rule: Rule) -> State:
    """The state with the rule's states in 8 bits as fp32. Of sharded parameters every process calls it."""
    full = dict(state)
    for name in rule.state_names:
        codes = state.get(name)
        if codes is not None and codes.dtype == torch.uint8:
            wide = torch.empty_like(local(codes), dtype=torch.float32)
            fill_(wide, codes, full, rule.spec(name), codes)
            full[name] = place_like(wide, codes)
    return full


def _become(optimizer: Optimizer, cls: type[Optimizer]) -> None:
    scheduled = is_watched_by_scheduler(optimizer)
    vars(optimizer).pop("step", None)
    optimizer.__class__ = cls
    patch_step(optimizer)
    if scheduled:
        watch_step(optimizer)
