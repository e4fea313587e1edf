# SPDX-License-Identifier: Apache-2.0
"""Describes the step of each group: rule, stages, dtypes, path, and bytes moved."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit._native import extension
from lightning_optkit._torch_private import supports_amp_scaling
from lightning_optkit.step.average import Average
from lightning_optkit.step.clip import Clip
from lightning_optkit.step.early import early_updates
from lightning_optkit.step.plan_text import plan_text
from lightning_optkit.step.planning import left_out_by, segment_kind
from lightning_optkit.step.rule import Group
from lightning_optkit.step.sharded import ShardedReferenceSegment
from lightning_optkit.step.shards import why_gathered
from lightning_optkit.step.state import StateLayout
from lightning_optkit.step.stepped import GroupContext, Stepped, group_contexts

__all__ = ["Explanation", "GroupPlan", "explain"]


@dataclass(frozen=True)
class GroupPlan:
    """One row of an explanation: parameters of one group with the same dtype and path.

    Args:
        group: Index in `optimizer.param_groups`.
        rule: Name of the update rule.
        stages: The stages folded into the walk, in order.
        dtype: Dtype of the parameters.
        state_dtype: Dtype of the rule's state.
        path: "compiled (avx512)", or "reference: ..." with the reason.
        num_tensors: Number of parameters.
        num_elements: Number of their elements.
        bytes_moved: Bytes of parameters, gradients and state that one step reads and writes, including the norm pass;
            temporaries of PyTorch on the reference path are not counted.
        num_walks: Passes over the parameters, those that measure norms included.
        separate_bytes: Bytes that would be moved if every stage but decay and L2, which torch's optimizers have too,
            were a pass of its own.
        separate_walks: The number of passes then.

    Example:
        >>> from lightning_optkit.optimizers import SGD
        >>> plan = SGD(torch.nn.Linear(3, 2).parameters(), lr=0.1).explain().groups[0]
        >>> plan.rule, plan.stages, plan.num_elements, plan.bytes_per_element
        ('sgd', ('update',), 8, 12.0)
    """

    group: int
    rule: str
    stages: tuple[str, ...]
    dtype: str
    state_dtype: str
    path: str
    num_tensors: int
    num_elements: int
    bytes_moved: int
    num_walks: int
    separate_bytes: int
    separate_walks: int

    @property
    def bytes_per_element(self) -> float:
        """`bytes_moved` per parameter element."""
        return self.bytes_moved / max(1, self.num_elements)


@dataclass(frozen=True)
class Explanation:
    """How an optimizer steps: a `GroupPlan` per row, and `str()` as a text of 80 columns.

    Args:
        optimizer: Its class name.
        groups: The parameters that are stepped.
        num_frozen: Number of parameters that are not stepped, since they need no gradient and have none.
        num_frozen_elements: Number of their elements.
    """

    optimizer: str
    groups: tuple[GroupPlan, ...]
    num_frozen: int = 0
    num_frozen_elements: int = 0

    def __str__(self) -> str:
        return plan_text(self)


def explain(optimizer: Stepped) -> Explanation:
    """Explains the next step, for every parameter that is not frozen, whether or not it will have a gradient."""
    layout = StateLayout(optimizer.average, optimizer.state_dtype)
    plans: list[GroupPlan] = []
    frozen: list[Tensor] = []
    left_out = left_out_by(optimizer)
    for context in group_contexts(optimizer):
        alike: dict[tuple[torch.dtype, str, bool], list[Tensor]] = {}
        for p in context.group["params"]:
            if not p.requires_grad and p.grad is None:
                frozen.append(p)
                continue
            is_left_out = p in left_out
            alike.setdefault((p.dtype, _path(optimizer, p, context), is_left_out), []).append(p)
        for (_, path, is_left_out), params in alike.items():
            clip = None if is_left_out else optimizer.clip
            plans.append(_group_plan(optimizer, layout, context, clip, path, params))
    name, num_elements = f"lightning_optkit.{type(optimizer).__name__}", sum(p.numel() for p in frozen)
    return Explanation(name, tuple(plans), len(frozen), num_elements)


def _path(optimizer: Stepped, param: Tensor, context: GroupContext) -> str:
    group, rule = context.group, context.rule
    reason = optimizer._why_reference(param, group)
    if reason is None and segment_kind(optimizer, param, group, rule) is ShardedReferenceSegment:
        reason = "the walk cannot wait for sums over the processes"
    if reason is not None:
        path = f"reference: {reason}"
    else:
        assert extension is not None
        path = "compiled (cuda)" if param.is_cuda else f"compiled ({extension.cpu_isa()})"
    gathers = why_gathered(param, group, rule, optimizer.clip, optimizer.state_dtype)
    if gathers is not None:
        path = f"{path}, gathered in every process to {gathers}"
    is_sparse = param.grad is not None and param.grad.layout != torch.strided
    # So its moments and its decay go on, where torch.optim.SparseAdam leaves such a row alone.
    return (
        f"{path}, its sparse gradient written out first: a row without one has a gradient of 0" if is_sparse else path
    )


def _group_plan(
    optimizer: Stepped, layout: StateLayout, context: GroupContext, clip: Clip | None, path: str, params: list[Tensor]
) -> GroupPlan:
    """The row of parameters that `clip` clips, which is that of the optimizer unless it leaves them out."""
    param, rule = params[0], context.rule
    state_names = rule.kept_by(param, context.state_names)
    state_dtype = layout.dtype_of(state_names[0], param, rule) if state_names else None
    stages = _stages(optimizer, context, clip, param)
    num_bytes = sum(_bytes_moved(optimizer, layout, context, clip, p) for p in params)
    num_walks = 1 + _num_measurements(optimizer, context, clip)
    separate = _separate_moves(optimizer, context, clip)
    return GroupPlan(
        group=context.number,
        rule=rule.name,
        stages=stages,
        dtype=str(param.dtype).removeprefix("torch."),
        state_dtype=_name_of(state_dtype),
        path=path,
        num_tensors=len(params),
        num_elements=sum(p.numel() for p in params),
        bytes_moved=num_bytes,
        num_walks=num_walks,
        separate_bytes=num_bytes + sum(sum(separate) * p.dtype.itemsize * p.numel() for p in params),
        separate_walks=num_walks + len(separate),
    )


def _num_measurements(optimizer: Stepped, context: GroupContext, clip: Clip | None) -> int:
    """Passes that measure norms before the update."""
    measures = (
        optimizer.clip is not None and optimizer.clip.needs_norm,
        _clips_units(clip) or bool(context.group["centralize"]),
        context.rule.trust_ratio is not None,
    )
    return sum(measures)


def _clips_units(clip: Clip | None) -> bool:
    return clip is not None and math.isfinite(clip.bounds.unit_ratio)


def _separate_moves(optimizer: Stepped, context: GroupContext, clip: Clip | None) -> list[int]:
    """For each stage that would be a pass of its own, how often it would read or write the gradient or parameter."""
    passes = {
        "unscale": (2, supports_amp_scaling(optimizer)),
        "clip": (2, clip is not None),
        "centralize": (2, bool(context.group["centralize"])),
        "l1": (2, bool(context.group["l1"])),
        "average": (1, optimizer.average is not None),  # that of the average itself counts in either case
    }
    return [moves for moves, is_on in passes.values() if is_on]


def _bytes_moved(
    optimizer: Stepped, layout: StateLayout, context: GroupContext, clip: Clip | None, param: Tensor
) -> int:
    group, rule = context.group, context.rule
    state_names = rule.kept_by(param, context.state_names)
    walks = 3 + rule.num_rereads  # of the gradient or the parameter
    if optimizer.clip is not None and optimizer.clip.needs_norm:
        walks += 1
    if rule.trust_ratio is not None:  # one more read, for the norms
        walks += 2
    if _clips_units(clip) or group["centralize"]:
        walks += 2 if _clips_units(clip) else 1
    num_bytes = walks * param.dtype.itemsize * param.numel()
    for name in layout.tensors(state_names, group, param):
        shape = rule.shape_of(name, param)
        assert shape is not None
        is_read_before = rule.trust_ratio is not None and rule.trust_ratio_of_update and name in state_names
        num_walks = (1 if rule.spec(name).written_once else 2) + is_read_before
        num_bytes += num_walks * layout.dtype_of(name, param, rule).itemsize * shape.numel()
    return num_bytes


def _name_of(state_dtype: torch.dtype | None) -> str:
    if state_dtype is None:
        return "-"
    return "int8" if state_dtype == torch.uint8 else str(state_dtype).removeprefix("torch.")


def _stages(optimizer: Stepped, context: GroupContext, clip: Clip | None, param: Tensor) -> tuple[str, ...]:
    group, rule = context.group, context.rule
    decoupled = group["decoupled_weight_decay"]
    decays = float(group["weight_decay"]) != 0 and not rule.owns_decay(group)
    is_16_bit = param.dtype.itemsize == 2
    rounding = group["rounding"] if is_16_bit or group["rounding"] == "kahan" else "nearest"
    listed = [
        "in backward" if early_updates(optimizer) is not None else "",
        "norm" if optimizer.clip is not None and optimizer.clip.needs_norm else "",
        "unscale" if supports_amp_scaling(optimizer) else "",
        repr(clip) if clip is not None else "",
        "centralize" if group["centralize"] else "",
        f"L2({group['weight_decay']:g})" if decays and not decoupled else "",
        "trust" if rule.trust_ratio is not None else "",
        "update",
        "caution" if group["caution"] else "",
        "estimate" if rule.estimate is not None else "",
        _decay(group) if decays and decoupled else "",
        f"L1({group['l1']:g})" if group["l1"] else "",
        rounding if rounding != "nearest" else "",
        _average(optimizer.average, group) if optimizer.average is not None else "",
        "statistics" if optimizer.record_statistics else "",
    ]
    return tuple(stage for stage in listed if stage)


def _decay(group: Group) -> str:
    at = f" at lr {group['decay_lr']:g}" if group["decouple_lr"] else ""
    return f"{'cautious ' if group['cautious'] else ''}decay({group['weight_decay']:g}{at})"


def _average(average: Average, group: Group) -> str:
    """With the decay of the group, if it is another: a schedule, or a checkpoint, may have set it."""
    decay = float(group.get("average_decay", average.decay))
    return repr(average) if decay == average.decay else f"{average!r} at decay {decay:g}"
