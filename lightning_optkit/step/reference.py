# SPDX-License-Identifier: Apache-2.0
"""The one-pass step in plain PyTorch: the reference for the compiled path, and the path for parameters it cannot take.

Line by line the same as csrc/core/pipeline.h and csrc/cpu/step_loop.h.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit.step.caution import cautious_update
from lightning_optkit.step.coefficients import average_weight
from lightning_optkit.step.gradient_reference import as_real, clip_reference, dense
from lightning_optkit.step.lockstep import Asking
from lightning_optkit.step.numbers import GroupNumbers, compute_dtype
from lightning_optkit.step.plain import is_dense
from lightning_optkit.step.quantized_state import dequantize8, quantize8_, scale_name
from lightning_optkit.step.rounding import move_average_, random_bits, round_stochastically
from lightning_optkit.step.rule import Group, Rule, State, StateSpec
from lightning_optkit.step.split_weights import correction_of, join, rest_of, split_
from lightning_optkit.step.statistics import Clipped, TensorStatistics

__all__ = ["Done", "step_reference_"]


@dataclass(frozen=True)
class Done:
    """Result of the step of one parameter.

    Args:
        statistics: Its statistics, if requested.
        clipped: Result of clipping by tensor or by unit.
        observed: Its part of the sums for a rule with an estimate.
    """

    statistics: TensorStatistics | None
    clipped: Clipped
    observed: tuple[float, float]


def step_reference_(
    rule: Rule,
    param: Tensor,
    grad: Tensor,
    state: State,
    state_names: tuple[str, ...],
    group: Group,
    numbers: GroupNumbers,
    *,
    average_name: str | None,
    grad_scale: float,
    tensor_index: int,
    statistics: bool = True,
    is_shard: bool = False,
) -> Asking[Done]:
    """Updates one parameter and its state in place. Never writes to `grad`. Asks for the sums over the whole tensor.

    Args:
        rule: The update rule.
        param: Parameter, of any floating or complex dtype.
        grad: Gradient of the same shape; may be sparse.
        state: Its entry in `optimizer.state`.
        state_names: Names of the rule's own states in it.
        group: Its parameter group, read by the rule.
        numbers: The numbers of the group, read by the stages.
        average_name: Name of the average in `state`, if one is kept.
        grad_scale: Factor for the gradient: 1 / loss scale x clip coefficient.
        tensor_index: Number of the parameter, which selects its random stream.
        statistics: Whether to collect statistics, which takes longer than the update.
        is_shard: Whether other processes have the other rows of the tensor.
    """
    state["step"] += 1.0
    step, work = float(state["step"]), compute_dtype(param)
    weights = _weights(param, state, copied=statistics)
    before, p = weights.before.to(work), weights.whole.to(work)
    g, clipped = yield from clip_reference(
        as_real(dense(grad)).to(work), before, grad_scale, numbers, is_vector=param.ndim < 2, is_shard=is_shard
    )
    if not numbers.decoupled and numbers.weight_decay != 0:
        g = g + numbers.weight_decay * before
    working = {name: _decoded(state, rule.spec(name)).to(work) for name in state_names}
    scalars = {scalar.name: state[scalar.name] for scalar in rule.scalars if state_names}
    group = group if rule.resolve is None else rule.resolve(group, param)
    update, rate, observed = yield from _update(rule, p, g, working, scalars, group, step)
    key = (int(numbers.rounding_seed), int(step), tensor_index)
    for name, value in working.items():
        _write(state, rule.spec(name), value, weights.memory, (*key, rule.state_names.index(name)))

    numbers = numbers._replace(lr=numbers.lr * rate)
    next_p = _move(p, update, numbers)
    stored = _store(weights.memory, correction_of(state), next_p, numbers, key)
    unchanged = stored == weights.before if statistics else None
    if weights.rest is not None:
        lost = as_real(state["compensation"])
        # Nothing is kept on overflow: an infinity would remain after the parameter has come back in range.
        lost.copy_(_finite_or_zero(next_p - stored.to(work)))
        unchanged = None if unchanged is None else unchanged & (lost == weights.rest)
    if average_name is not None:
        _average(state, average_name, stored, numbers, key)
    if unchanged is None:
        return Done(None, clipped, observed)
    difference = next_p - p
    counted = TensorStatistics.from_tensors(g, next_p, difference, (difference != 0) & unchanged)
    return Done(counted, clipped, observed)


@dataclass(frozen=True)
class _Weights:
    """A parameter before its step.

    Args:
        memory: The parameter, which the step overwrites; complex numbers as pairs.
        before: What it stores; joined with its correction if it has one.
        rest: What Kahan summation kept of it, or None.
    """

    memory: Tensor
    before: Tensor
    rest: Tensor | None

    @property
    def whole(self) -> Tensor:
        return self.before if self.rest is None else self.before + self.rest


def _weights(param: Tensor, state: State, *, copied: bool) -> _Weights:
    memory, correction = as_real(param.detach()), correction_of(state)
    if correction is not None:
        return _Weights(memory, join(memory, correction), None)
    # Nothing is stored before the next value is computed, so only the statistics need a copy.
    before = memory.clone() if copied else memory
    rest = rest_of(before, as_real(state["compensation"])) if "compensation" in state else None
    return _Weights(memory, before, rest)


def _update(
    rule: Rule,
    p: Tensor,
    g: Tensor,
    working: dict[str, Tensor],
    scalars: Mapping[str, Tensor],
    group: Group,
    step: float,
) -> Asking[tuple[Tensor, float, tuple[float, float]]]:
    """The update, the factor that the rule estimated for its rate, and its part of the sums for the next one."""
    if rule.trust_ratio is not None:
        ratio = yield from _trust_ratio(rule, p, g, working, group, step)
        group = {**group, "lr": float(group["lr"]) * ratio}
    estimate, given, rate, observed = rule.estimate, group, 1.0, (0.0, 0.0)
    if estimate is not None:
        rate = estimate.rate(group, step)
        group = {**group, "lr": float(group["lr"]) * rate}
        if estimate.observes_before:
            observed = estimate.observe(p, g, working, given, step)
    update = rule.update(p, g, {**working, **scalars}, group, step)
    if group["caution"] and not rule.owns_decay(group):
        update = cautious_update(update, g)
    if estimate is not None and not estimate.observes_before:
        observed = estimate.observe(p, g, working, given, step)
    return update, rate, observed


def _store(
    param: Tensor, correction: Tensor | None, value: Tensor, numbers: GroupNumbers, key: tuple[int, int, int]
) -> Tensor:
    """Stores `value` in the parameter, rounded as its group says; returns the stored values."""
    if correction is not None:
        random = None
        if correction.dtype == torch.int8:
            random = random_bits(param.numel(), *key, param.device)
            # In the order of memory, as the compiled step numbers elements; it takes no parameter with gaps.
            is_walked = is_dense(param)
            random = random.as_strided(param.shape, param.stride()) if is_walked else random.view(param.shape)
        return split_(param, correction, value, random)
    if numbers.rounding == 1 and param.dtype in (torch.bfloat16, torch.float16):
        return param.copy_(round_stochastically(value, param.dtype, *key))
    return param.copy_(value)


def _finite_or_zero(t: Tensor) -> Tensor:
    """A copy with inf and NaN replaced by zero."""
    return torch.where(t.isfinite(), t, 0.0)


def _decoded(state: State, spec: StateSpec) -> Tensor:
    stored = state[spec.name]
    if stored.dtype != torch.uint8:
        return as_real(stored)
    return dequantize8(stored, state[scale_name(spec.name)], signed=not spec.nonnegative)


def _write(state: State, spec: StateSpec, value: Tensor, param: Tensor, key: tuple[int, int, int, int]) -> None:
    stored = state[spec.name]
    if stored.dtype == torch.uint8:
        quantize8_(stored, state[scale_name(spec.name)], value, signed=not spec.nonnegative, key=key)
    elif stored.dtype in (torch.bfloat16, torch.float16):  # with rounding to nearest, a slow average would not move
        *counted, number = key
        if value.shape == param.shape and value.stride() != param.stride():  # random bits go by the parameter's order
            value = torch.empty_like(param, dtype=value.dtype).copy_(value)
        stored.copy_(round_stochastically(value, stored.dtype, *counted, state=number))
    else:
        as_real(stored).copy_(value)


def _trust_ratio(rule: Rule, p: Tensor, g: Tensor, state: State, group: Group, step: float) -> Asking[float]:
    """The trust ratio, from the gradient that the rule sees, the parameter, and its update at a rate of 1."""
    assert rule.trust_ratio is not None
    update = torch.zeros_like(p)
    if rule.trust_ratio_of_update:
        untouched = {name: value.clone() for name, value in state.items()}
        update = rule.update(p, g, untouched, {**group, "lr": 1.0}, step)
    whole = yield torch.stack([each.double().square().sum() for each in (g, p, update)])
    grad_sq, param_sq, update_sq = whole.tolist()
    return rule.trust_ratio(group, TensorStatistics(grad_sq, param_sq, update_sq, nonfinite=0.0, lost=0.0))


def _move(p: Tensor, update: Tensor, numbers: GroupNumbers) -> Tensor:
    kept = p
    if numbers.decoupled and numbers.lr * numbers.weight_decay != 0:
        kept = p * (1.0 - numbers.lr * numbers.weight_decay)
        if numbers.cautious:
            kept = torch.where(update * p < 0, p, kept)
    moved = kept - update
    if numbers.lr * numbers.l1 != 0:
        moved = torch.sign(moved) * (moved.abs() - numbers.lr * numbers.l1).clamp(min=0)
    return moved


def _average(state: State, name: str, stored: Tensor, numbers: GroupNumbers, key: tuple[int, int, int]) -> None:
    if not numbers.average_due:
        return
    weight = average_weight(int(numbers.average_kind), numbers.average_decay, float(state["num_averaged"]))
    if weight == 0:
        return
    move_average_(as_real(state[name]), stored, weight, key)
    state["num_averaged"] += 1.0
