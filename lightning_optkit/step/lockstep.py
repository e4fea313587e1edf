# SPDX-License-Identifier: Apache-2.0
"""Updates that need sums over a whole tensor, of which each process may hold a shard: they ask for them.

An update is a generator. It yields the sums over what it holds, a vector of fp64, and receives those over the whole
tensor. Many updates that run in lockstep share one all-reduce for each question.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_optkit.step.shards import reduce_sum_

__all__ = ["Asking", "alone", "together"]

T = TypeVar("T")

Asking = Generator[Tensor, Tensor, T]
"""Yields sums over a shard, receives those over the whole tensor, and returns T."""


def alone(asking: Asking[T]) -> T:
    """The result for a tensor that is whole: every sum is what it is."""
    return _run([asking], lambda sums: sums)[0]


def together(asking: Iterable[Asking[T]], groups: Sequence[Any]) -> list[T]:
    """The results for shards of the processes in `groups`, all of which ask the same number of questions."""
    return _run(asking, lambda sums: reduce_sum_(sums, groups))


def _run(asking: Iterable[Asking[T]], whole: Callable[[Tensor], Tensor]) -> list[T]:
    results: dict[int, T] = {}
    waiting: dict[int, tuple[Asking[T], Tensor]] = {}

    def advance(number: int, each: Asking[T], answer: Tensor | None) -> None:
        try:
            waiting[number] = each, next(each) if answer is None else each.send(answer)
        except StopIteration as end:
            waiting.pop(number, None)
            results[number] = end.value

    for number, each in enumerate(asking):
        advance(number, each, None)
    while waiting:
        asked = dict(waiting)
        sums = [sums for _, sums in asked.values()]
        answers = torch.split(whole(torch.cat(sums)), [len(each) for each in sums])
        for (number, (each, _)), answer in zip(asked.items(), answers, strict=True):
            advance(number, each, answer)
    return [results[number] for number in sorted(results)]
