# SPDX-License-Identifier: Apache-2.0
"""The saved states of a run's optimizers, and of their schedulers, for the groups that they have now.

All of them are checked before one is loaded. A checkpoint without names, as Lightning alone saves it, is left as it is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit._torch_private import INNER_SCHEDULERS, LAST_LRS
from lightning_optkit.callbacks.seams.nameless import labels
from lightning_optkit.diagnostics.measure.parameters import plain_name
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.matching import Matched, match_groups
from lightning_optkit.step.quantized_state import scale_name

__all__ = ["CLASSES", "NAMES", "MatchedStates", "aliases_of", "classes_of", "match_states"]

NAMES, CLASSES = "parameter_names", "optimizer_classes"  # beside "state" and "param_groups"

_OF_GROUPS = ("base_lrs", LAST_LRS, "max_lrs", "min_lrs", "base_momentums", "max_momentums", "lr_lambdas")
# Entries that torch's classes fill in when they load a checkpoint of an older version.
_FILLED_IN = {"amsgrad", "capturable", "centered", "decoupled_weight_decay", "differentiable", "foreach", "fused"}
_FILLED_IN |= {"maximize", "nesterov"}
_KIND = "decoupled_weight_decay"  # tells AdamW from Adam


class MatchedStates(NamedTuple):
    """What a run loads.

    Args:
        optimizers: A state dict per optimizer, in the order of its groups.
        schedulers: A state dict per scheduler.
        is_known: Whether the states belong to names; otherwise nothing was changed.
    """

    optimizers: list[Any]
    schedulers: list[Any]
    is_known: bool


def aliases_of(pl_module: pl.LightningModule) -> dict[Tensor, list[str]]:
    """All names of each parameter, without what compilers and wrappers add; shared ones have several."""
    aliases: dict[Tensor, list[str]] = {}
    for name, param in pl_module.named_parameters(remove_duplicate=False):
        aliases.setdefault(param, []).append(plain_name(name))
    return aliases


def classes_of(optimizer: Optimizer) -> list[str]:
    """The names of its class and of those it derives from."""
    return [cls.__name__ for cls in type(optimizer).__mro__ if cls is not Optimizer and issubclass(cls, Optimizer)]


def match_states(
    pl_module: pl.LightningModule,
    optimizers: Sequence[Optimizer],
    schedulers: Sequence[Any],
    saved: Sequence[Any],
    saved_schedulers: Sequence[Any],
) -> MatchedStates:
    """Fits the states of a checkpoint to the optimizers of a run.

    Args:
        pl_module: The module of the run.
        optimizers: Its optimizers.
        schedulers: Its schedulers.
        saved: The optimizer states of the checkpoint.
        saved_schedulers: Those of its schedulers.

    Raises:
        ValueError: for other optimizers, parameters or groups.
    """
    states = [*saved]
    is_known = bool(states) and bool(optimizers) and all(isinstance(each, Mapping) and NAMES in each for each in states)
    if is_known and len(states) != len(optimizers):
        raise ValueError(
            f"{type(pl_module).__name__}.configure_optimizers: the checkpoint has {len(states)} optimizers and this "
            f"run has {len(optimizers)}; resume with those of the run that saved it."
        )
    for optimizer, state in zip(optimizers, states, strict=False):
        _check_class(optimizer, state)
        _check_codes(optimizer, state)
    if not is_known:
        for optimizer, state in zip(optimizers, states, strict=False):
            _check_sizes(optimizer, state)
        return MatchedStates(states, [*saved_schedulers], False)
    aliases = aliases_of(pl_module)
    origins: dict[Any, tuple[list[int], int]] = {}
    for place, optimizer in enumerate(optimizers):
        matched, size = _matched(aliases, optimizer, place, states), len(states[place]["param_groups"])
        states[place], origins[optimizer] = matched.state_dict, (matched.origins, size)
    pairs = zip(schedulers, saved_schedulers, strict=False)
    none: tuple[list[int], int] = ([], 0)
    ordered = [_ordered(state, *origins.get(getattr(each, "optimizer", None), none)) for each, state in pairs]
    return MatchedStates(states, [*ordered, *saved_schedulers[len(ordered) :]], True)


def _matched(
    aliases: Mapping[Tensor, list[str]], optimizer: Optimizer, place: int, states: Sequence[Mapping[str, Any]]
) -> Matched:
    what, state = f"{type(optimizer).__name__}:", states[place]
    saved_names, names = labels(what, state, state[NAMES], optimizer.param_groups, aliases)
    held = [{*state[NAMES].values()} for state in states]
    for each in (each for group in names for each in group):
        others = [number for number, known in enumerate(held) if known.intersection(each)]
        if others and place not in others:
            raise ValueError(
                f"{what} {each[0]} is a parameter of optimizer {place} here and of optimizer {others[0]} in the "
                "checkpoint; let configure_optimizers return the optimizers, and their parameters, of the run that "
                "saved it."
            )
    return match_groups(what, state, saved_names, optimizer.param_groups, names)


def _check_class(optimizer: Optimizer, state: Any) -> None:
    """Raises for the state of another class, which would fail in a step, or be another rule without a word."""
    if not isinstance(state, Mapping) or "param_groups" not in state:
        return
    own, saved, groups = classes_of(optimizer), state.get(CLASSES, []), state["param_groups"]
    whose = ""
    if saved and saved[0] != own[0]:
        derives = own[0] in saved or saved[0] in own
        same = all(g.get(_KIND) == o.get(_KIND) for g, o in zip(groups, optimizer.param_groups, strict=False))
        whose = "" if derives and same else f"is of {saved[0]}"
    elif type(optimizer).__module__.startswith("torch.optim."):  # those of this package look themselves
        lacks = optimizer.defaults.keys() - _FILLED_IN
        lacking = next((key for group in groups for key in sorted(lacks - group.keys())), None)
        whose = f"has no {lacking!r} in its groups, so it is of another optimizer" if lacking else ""
        if not saved and any(bool(group.get(_KIND)) != bool(optimizer.defaults.get(_KIND)) for group in groups):
            whose = whose or f"has another {_KIND!r} in its groups, so it is of another optimizer"
    if whose:
        raise ValueError(
            f"{own[0]}: the optimizer state of the checkpoint {whose}; resume with the optimizer of the run that saved "
            "it, or begin a run from its weights alone."
        )


def _check_codes(optimizer: Optimizer, state: Any) -> None:
    """Raises for 8-bit state as this package keeps it, of which another class would take the codes for numbers."""
    if isinstance(optimizer, OnePassOptimizer) or not isinstance(state, Mapping):
        return
    held = state.get("state")
    for each in held.values() if isinstance(held, Mapping) else ():
        name = next((name for name in each if scale_name(name) in each), None) if isinstance(each, Mapping) else None
        if name is not None:
            raise ValueError(
                f"{type(optimizer).__name__}: the state {name!r} of the checkpoint is in 8 bits, which only those of "
                "lightning_optkit read; resume with the one of the run that saved it, or with Fuse()."
            )


def _check_sizes(optimizer: Optimizer, state: Any) -> None:
    if isinstance(state, Mapping) and not state and optimizer.state_dict():  # Lightning's stand-in for none has neither
        raise ValueError(
            f"{type(optimizer).__name__}: the checkpoint is of a run without an optimizer; begin a run from its "
            "weights alone."
        )
    if not isinstance(state, Mapping) or "param_groups" not in state:
        return
    saved, own = (
        [len(group["params"]) for group in groups] for groups in (state["param_groups"], optimizer.param_groups)
    )
    if saved != own:
        raise ValueError(
            f"{type(optimizer).__name__}: the checkpoint has groups of {saved} parameters and this run of {own}; "
            "resume with the groups of the run that saved it, from the same configure_optimizers and ParameterGroups."
        )


def _ordered(state: Any, origins: Sequence[int], size: int) -> Any:
    """The state of a scheduler with its lists of a value per group, of which there were `size`, for the groups here."""
    if not isinstance(state, Mapping) or [*origins] == [*range(size)]:
        return state
    ordered = dict(state)
    for key, value in state.items():
        if key in _OF_GROUPS and isinstance(value, list | tuple) and len(value) >= size:
            ordered[key] = [value[origin] for origin in origins]
        elif key == INNER_SCHEDULERS:
            ordered[key] = [_ordered(each, origins, size) for each in value]
    return ordered
