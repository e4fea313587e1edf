# SPDX-License-Identifier: Apache-2.0
"""Averages in a separate pass: for optimizers of other packages, or in addition to an average in the one-pass step."""

from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_optkit._checks import check_instance, check_int, check_like, check_text, shown
from lightning_optkit._torch_private import foreach_copy_, foreach_lerp_
from lightning_optkit.averaging._names import check_free
from lightning_optkit.averaging._ring import is_snapshot, ring_for, snapshot_names
from lightning_optkit.averaging.ema import EMA
from lightning_optkit.averaging.lawa import LAWA
from lightning_optkit.averaging.power_ema import PowerEMA
from lightning_optkit.averaging.swa import SWA
from lightning_optkit.step import Average
from lightning_optkit.step.coefficients import average_weight
from lightning_optkit.step.numbers import decay_of, starts_at_a_step
from lightning_optkit.step.rounding import move_average_
from lightning_optkit.step.saved import saved_number, saved_tensor
from lightning_optkit.step.shards import distribute_like, local
from lightning_optkit.step.split_weights import joined

__all__ = [
    "AnyAverage",
    "averages_of",
    "late_averages",
    "protect_average",
    "read_average",
    "state_names",
    "update_average_",
    "update_tensors_",
]

AnyAverage: TypeAlias = EMA | PowerEMA | SWA | LAWA | Average

State: TypeAlias = dict[str, Tensor]


@torch.no_grad()
def update_average_(optimizer: Optimizer, average: AnyAverage, step: int, name: str | None = None) -> None:
    """Updates the average of every parameter, `optimizer.state[p][average.state_name]`, in place.

    After the step, the value of a parameter before its first step is gone: call `late_averages` before the step if some
    parameters get their first gradient later than others.

    Args:
        optimizer: Any optimizer; the average and its counter are added to its state, so that checkpoints contain them.
        average: E.g. `EMA(0.999)`, `SWA(start=900)` or `LAWA(k=6, every=100)`.
        step: Number of optimizer steps, this one included; 0 only creates it, before a checkpoint is loaded.
        name: Its name in the state if the optimizer has another average; None: the default name.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if the average starts at an epoch or a fraction of the run (see `SWA.for_run`), if step < 0, or if
            the state has something else under its name.

    Example:
        >>> from lightning_optkit.averaging import EMA
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.Rprop([weight])
        >>> weight.grad = torch.ones(1)
        >>> update_average_(optimizer, EMA(0.9), step=1)
        >>> optimizer.state[weight]["ema"]
        tensor([1.])
    """
    _check("update_average_", optimizer, average, name)
    check_int("update_average_", "step", step, minimum=0)
    first = _names(average, name)[0]
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if p.grad is not None or first in optimizer.state.get(p, {})]
        # A schedule may have set the group's decay; a second average uses its own.
        decay = group.get("average_decay") if name is None else None
        update_tensors_([(p, optimizer.state[p]) for p in kept], average, step, name, decay)


@torch.no_grad()
def update_tensors_(
    kept: Iterable[tuple[Tensor, State]],
    average: AnyAverage,
    step: int,
    name: str | None = None,
    decay: float | None = None,
) -> None:
    """The same for any tensors, each with a dict that stores its average; integer tensors are copied.

    Args:
        kept: Pairs of a tensor and its dict.
        average: See `update_average_`.
        step: See `update_average_`.
        name: See `update_average_`.
        decay: Replaces the decay of an exponential average.
    """
    if not starts_at_a_step(average):
        call = f"update_average_(average={shown(average)})"
        raise ValueError(f"{call}: start must be a step; give average.for_run(total_steps).")
    due = step >= average.start and (step - average.start) % average.every == 0
    moved: list[tuple[float, Tensor, Tensor]] = []
    for tensor, state in kept:
        # A sharded checkpoint is loaded into existing state, so shards have theirs from the first step on.
        if due or hasattr(tensor, "to_local"):
            _create(tensor, state, average, name)
        if due:
            moved.append(_counted(tensor, state, average, name, decay))
    for (weight, dtype), members in groupby(moved, key=lambda item: (item[0], item[1].dtype)):
        _, averages, tensors = zip(*members, strict=True)
        if weight == 1:
            foreach_copy_(averages, tensors)
        elif dtype == torch.bfloat16:
            for number, (held, tensor) in enumerate(zip(averages, tensors, strict=True)):
                move_average_(held, tensor, weight, (0, step, number))
        else:
            foreach_lerp_(averages, [t.to(a.dtype) for a, t in zip(averages, tensors, strict=True)], weight)


@torch.no_grad()
def late_averages(
    optimizer: Optimizer, average: AnyAverage, name: str | None = None, aside: Iterable[State] = ()
) -> dict[Tensor, State]:
    """The averages of parameters that get their first gradient after the other averages have started.

    Such a parameter, of a layer that was frozen for example, has not changed so far, so its average is a copy with the
    number of updates of the others. Call this between the backward pass and the step, and put the result into
    `optimizer.state` after the step: the optimizers of torch create their own state only if there is none.

    Args:
        optimizer: See `update_average_`.
        average: See `update_average_`.
        name: See `update_average_`.
        aside: Further states with averages, which are not in the optimizer yet.

    Example:
        >>> from lightning_optkit.averaging import EMA
        >>> body, head = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        >>> optimizer = torch.optim.SGD([body, head])
        >>> head.grad = torch.ones(1)
        >>> update_average_(optimizer, EMA(0.9), step=1)
        >>> body.grad = torch.ones(1)
        >>> late_averages(optimizer, EMA(0.9))[body]
        {'ema': tensor([1.]), 'num_averaged': tensor(1.)}
    """
    first, counter = _names(average, name)[0], _counter(average, name)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    late = [p for p in params if p.grad is not None and first not in optimizer.state.get(p, {})]
    states = [*optimizer.state.values(), *aside] if late else []
    num_averaged = max((float(state.get(counter, 0)) for state in states), default=0.0)
    started: dict[Tensor, State] = {}
    for param in late if num_averaged else ():
        state = started[param] = {}
        _create(param, state, average, name)
        for each in _names(average, name):
            local(state[each]).copy_(local(param.detach()))
        state[counter].fill_(num_averaged)
    return started


def _check(owner: str, optimizer: Optimizer, average: AnyAverage, name: str | None) -> None:
    check_instance(owner, "optimizer", optimizer, Optimizer, "one such as torch.optim.Rprop(model.parameters())")
    check_like(owner, "average", average, ("state_name", "start"), "an average such as EMA(0.999)")
    if name is not None:
        check_text(owner, "name", name, 'None or the name of a second average, such as "ema_2"')
    check_free(owner, optimizer.state.values(), name, _names(average, name), _counter(average, name))


def _names(average: AnyAverage, name: str | None) -> list[str]:
    """Names of its tensors in a state."""
    base = name or average.state_name
    return snapshot_names(base, average.k) if isinstance(average, LAWA) else [base]


def state_names(average: AnyAverage, name: str | None = None) -> set[str]:
    """Names of everything that it stores in the state of a parameter."""
    return {*_names(average, name), _counter(average, name)}


def _counter(average: AnyAverage, name: str | None) -> str:
    """Name of its update counter: the name used by the step, if the step supports this average."""
    if name is None and not isinstance(average, LAWA):
        return "num_averaged"
    return f"num_averaged_{name or average.state_name}"


def _create(tensor: Tensor, state: State, average: AnyAverage, name: str | None) -> None:
    names = _names(average, name)
    dtype = tensor.dtype
    if dtype.is_floating_point and not isinstance(average, LAWA):
        dtype = torch.promote_types(dtype, torch.float32)
        is_trained = tensor.requires_grad or isinstance(tensor, Parameter)  # and no buffer
        if dtype == torch.float32 and is_trained and isinstance(average, Average):
            dtype = average.dtype
    if isinstance(average, LAWA) and not _has_ring(state, average, name):  # of a checkpoint
        fitted = _fitted(state, average, name)
        state.clear()
        state.update(fitted)
    if names[0] in state:  # of a checkpoint, perhaps with another dtype of the average
        state.update({each: state[each].to(dtype) for each in names})
        return
    state.update({each: torch.zeros_like(tensor, dtype=dtype) for each in names})
    state[_counter(average, name)] = torch.zeros((), dtype=torch.float32)


def _has_ring(state: State, average: LAWA, name: str | None) -> bool:
    base = name or average.state_name
    return f"{base}_snapshot_{average.k - 1}" in state and f"{base}_snapshot_{average.k}" not in state


def _fitted(state: State, average: AnyAverage, name: str | None) -> State:
    """A state with as many snapshots as this average keeps; any other average has one tensor."""
    if not isinstance(average, LAWA):
        return state
    return ring_for(state, name or average.state_name, _counter(average, name), average.k)


def _counted(
    tensor: Tensor, state: State, average: AnyAverage, name: str | None, decay: float | None
) -> tuple[float, Tensor, Tensor]:
    """Counts an update; returns the tensor's weight in the average, the average and the tensor, as local shards."""
    counter, names = _counter(average, name), _names(average, name)
    so_far = int(state[counter])
    state[counter] += 1.0
    held = state[names[so_far % len(names)]]
    if so_far == 0 or isinstance(average, LAWA) or not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        weight = 1.0
    else:
        decay = decay_of(average, average.decay if decay is None else decay, so_far)
        weight = average_weight(average.kind, decay, so_far)
    return weight, local(held), joined(local(tensor.detach()), state)


@torch.no_grad()
def read_average(state: State, average: AnyAverage, name: str | None = None) -> Tensor | None:
    """The average in the state of one parameter; None before its first update."""
    counter, names = _counter(average, name), _names(average, name)
    state = _fitted(state, average, name)
    num_averaged = int(state.get(counter, 0))
    if num_averaged == 0 or names[0] not in state:
        return None
    held = [state[each] for each in names[:num_averaged]]
    if len(held) == 1 or not held[0].dtype.is_floating_point:
        return held[(num_averaged - 1) % len(names)]
    total = held[0].to(torch.promote_types(held[0].dtype, torch.float32), copy=True)
    for snapshot in held[1:]:
        total += snapshot
    return total / len(held)


def averages_of(optimizer: Optimizer, average: AnyAverage, name: str | None = None) -> dict[Tensor, Tensor]:
    """The average of every parameter that has one with at least one update, whether or not the step computes it.

    Args:
        optimizer: The optimizer that has it in its state.
        average: The average passed to `update_average_` or to the optimizer.
        name: See `update_average_`.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if the state has something else under its name.

    Example:
        >>> from lightning_optkit.averaging import SWA
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> for step in (1, 2):
        ...     weight.grad = -torch.ones(1)
        ...     optimizer.step()
        ...     update_average_(optimizer, SWA(start=1), step)
        >>> averages_of(optimizer, SWA(start=1))[weight]
        tensor([1.5000])
    """
    _check("averages_of", optimizer, average, name)
    read = {param: read_average(state, average, name) for param, state in optimizer.state.items()}
    return {param: value for param, value in read.items() if value is not None}


def protect_average(optimizer: Optimizer, average: AnyAverage, name: str | None = None) -> list[RemovableHandle]:
    """Makes `load_state_dict` load an average of `update_average_` unchanged.

    `Optimizer.load_state_dict` casts all state to the dtype of its parameter, and a one-pass optimizer refuses foreign
    state.

    Args:
        optimizer: Any optimizer that is passed to `update_average_`.
        average: The same average.
        name: See `update_average_`.

    Returns:
        Two handles; call `remove()` on them to undo it.

    Raises:
        TypeError: for an argument of another kind.
        ValueError: if the state has something else under its name.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        >>> weight.grad = torch.ones_like(weight)
        >>> optimizer = torch.optim.Rprop([weight])
        >>> update_average_(optimizer, EMA(0.9), step=1)
        >>> handles = protect_average(optimizer, EMA(0.9))
        >>> optimizer.load_state_dict(optimizer.state_dict())
        >>> optimizer.state[weight]["ema"].dtype  # torch alone would make it that of the weight
        torch.float32
    """
    _check("protect_average", optimizer, average, name)
    names, base = state_names(average, name), name or average.state_name
    saved: dict[Tensor, State] = {}

    def is_taken(entry: object) -> bool:
        return entry in names or (isinstance(average, LAWA) and is_snapshot(entry, base))

    def take_out(loading: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved.clear()
        params = [param for group in loading.param_groups for param in group["params"]]
        try:
            ids = [saved_id for group in state_dict["param_groups"] for saved_id in group["params"]]
            states = [state_dict["state"].get(saved_id, {}) for saved_id in ids]
            taken = [{each: value for each, value in state.items() if is_taken(each)} for state in states]
        except (AttributeError, KeyError, TypeError):  # not a state dict: the loader raises a message
            return state_dict
        for number, (param, state) in enumerate(zip(params, taken, strict=False)):
            what = f"{type(loading).__name__}.load_state_dict(state_dict=...): of parameter {number}, the state"
            read = {each: _restored(f"{what} {each!r}", param, each, value) for each, value in state.items()}
            saved[param] = _fitted(read, average, name)
        rest = {key: _without(state, is_taken) for key, state in state_dict["state"].items()}
        return {**state_dict, "state": {key: state for key, state in rest.items() if state}}

    def put_back(loaded: Optimizer) -> None:
        for param, state in saved.items():
            if state:
                loaded.state[param].update(state)
        saved.clear()

    return [
        optimizer.register_load_state_dict_pre_hook(take_out),
        optimizer.register_load_state_dict_post_hook(put_back),
    ]


@torch.inference_mode(False)
@torch.no_grad()
def _restored(what: str, param: Tensor, name: str, value: object) -> Tensor:
    """A copy of a saved average or counter, after checking that it fits `param`."""
    if name.startswith("num_averaged"):
        return saved_number(what, value).cpu()
    tensor = saved_tensor(what, value)
    if tensor.shape != param.shape:
        raise ValueError(f"{what} has shape {list(tensor.shape)}, its parameter {list(param.shape)}.")
    # torch loads what is in no state here, such as more snapshots, as whole tensors.
    return distribute_like(tensor.detach().to(param.device, copy=True), param)


def _without(state: Any, is_taken: Callable[[object], bool]) -> Any:
    return {name: value for name, value in state.items() if not is_taken(name)} if isinstance(state, dict) else state
