# SPDX-License-Identifier: Apache-2.0
"""The text of an explanation, in lines of at most 80 characters where a word allows it."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_optkit.step.explain import Explanation, GroupPlan

__all__ = ["plan_text"]

_WIDTH = 80


def plan_text(explained: "Explanation") -> str:
    """One block per group; neighbors that differ only in their parameters share one."""
    lines = [explained.optimizer]
    for _, alike in groupby(explained.groups, key=lambda g: (g.rule, g.stages, g.dtype, g.state_dtype, g.path)):
        lines += _block(list(alike))
    if explained.num_frozen:
        lines.append(f"left out, frozen: {explained.num_frozen:,} tensors, {explained.num_frozen_elements:,} elements")
    return "\n".join([*lines, *_total(explained.groups)])


def _block(plans: Sequence["GroupPlan"]) -> Iterator[str]:
    first, last = plans[0], plans[-1]
    num_tensors, num_elements, num_bytes = (
        sum(getattr(plan, name) for plan in plans) for name in ("num_tensors", "num_elements", "bytes_moved")
    )
    number = f"{first.group}" if first.group == last.group else f"{first.group} to {last.group}"
    yield f"{'group' if first.group == last.group else 'groups'} {number}: {first.rule}"
    yield from _wrapped(first.path.split(" "), " ")
    yield from _wrapped(first.stages, " > ")
    state = "" if first.state_dtype == "-" else f", state in {first.state_dtype}"
    tensors = "1 tensor" if num_tensors == 1 else f"{num_tensors:,} tensors"
    yield f"  {tensors}, {num_elements:,} elements of {first.dtype}{state}"
    yield f"  {num_bytes / max(1, num_elements):.4g} bytes per element, {_size(num_bytes)}"


def _wrapped(parts: Iterable[str], separator: str) -> Iterator[str]:
    """The parts, joined, with line breaks only between two of them."""
    line = ""
    for part in parts:
        if line and len(line) + len(separator) + len(part) > _WIDTH - 2:
            yield f"  {line}{separator.rstrip()}"
            line = part
        else:
            line = f"{line}{separator}{part}" if line else part
    if line:
        yield f"  {line}"


def _total(plans: Sequence["GroupPlan"]) -> Iterator[str]:
    total = sum(plan.bytes_moved for plan in plans)
    compiled = [plan for plan in plans if plan.path.startswith("compiled")]
    walks = max((plan.num_walks for plan in compiled), default=0)
    separate = max((plan.separate_walks for plan in compiled), default=0)
    if separate <= walks:
        yield f"one step moves {_size(total)}"
    else:
        apart = sum(plan.separate_bytes for plan in compiled) + sum(
            plan.bytes_moved for plan in plans if plan not in compiled
        )
        passes = "1 pass" if walks == 1 else f"{walks} passes"
        yield f"one step moves {_size(total)} in {passes}"
        yield f"each stage on its own: {_size(apart)} in {separate} passes"


def _size(num_bytes: int) -> str:
    """With a unit that gives at least one digit before the decimal point, if there is one."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"
