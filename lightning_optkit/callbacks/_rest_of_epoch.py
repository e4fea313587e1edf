# SPDX-License-Identifier: Apache-2.0
"""The samples of an epoch that are left, for a run that goes on with other processes or another batch size.

Samplers deal out one order: the k-th batches of all processes are together its k-th part. So the
samples already seen are the beginning of the order, and the rest can be dealt out anew.
"""

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

from lightning_optkit.callbacks._gradients_of_processes import mean_gradients
from lightning_optkit.callbacks.seams.lightning_private import HasState, batch_progress, epoch_progress
from lightning_optkit.callbacks.seams.run import Run

__all__ = ["RestOfEpoch", "can_be_dealt_anew", "deal_rest", "dealing_of", "dealt_anew", "fill_in"]


_SAMPLERS = (SequentialSampler, RandomSampler, DistributedSampler)  # not classes derived from them
_MAY_DIFFER = {"processes", "batch size", "batches per epoch", "sampler", "drop_last"}

RestOfEpoch = dict[str, Any]  # plain types: it is saved with a checkpoint written in such an epoch


def dealing_of(loaders: list[Any], processes: int, batches: float) -> dict[str, Any] | None:
    """How the only loader deals out its samples, in plain types; None if this is unknown or the epoch is cut short."""
    (loader, *others) = loaders or [None]
    if others or not isinstance(loader, DataLoader) or isinstance(loader, HasState):
        return None
    sampler, batch_sampler = loader.sampler, loader.batch_sampler
    if type(batch_sampler) is not BatchSampler or type(sampler) not in _SAMPLERS or len(loader) != batches:
        return None
    facts = {"samples": sized_len(loader.dataset), "num_workers": loader.num_workers, "batches": batches}
    facts |= {"batch_size": batch_sampler.batch_size, "drop_last": batch_sampler.drop_last}
    if isinstance(sampler, DistributedSampler):
        distributed = {"shuffle": sampler.shuffle, "replicas": sampler.num_replicas, "seed": sampler.seed}
        return None if sampler.drop_last else {**facts, **distributed}
    if processes > 1:  # each of them sees all samples
        return None
    if isinstance(sampler, RandomSampler):
        parts = sampler.replacement or sampler.num_samples != facts["samples"]
        if parts or sampler.generator is not loader.generator:
            return None
    return {**facts, "shuffle": isinstance(sampler, RandomSampler), "replicas": 1, "seed": None}


def fill_in(ranks: list[Any], rank: int, mine: dict[str, Any]) -> None:
    """Gives a process without a state the place in the data of another one.

    Args:
        ranks: The saved states of the processes; None for those that did not save theirs.
        rank: This process.
        mine: Its random state.
    """
    missing = [number for number, each in enumerate(ranks) if each is None]
    known = next(each for each in ranks if each is not None)
    if missing:
        is_open = bool(known["gradients"])  # what misses those of the first process has a warning of its own
        rank_zero_warn(
            f"ExactResume: the checkpoint was saved on an exception, without the random states of the processes "
            f"{missing}"
            + (", and without their gradients of the open accumulation window, which the first step misses" * is_open)
            + "; the run goes on with the same data, but not exactly"
            + ("; resume from a checkpoint written before it to have that step whole." if is_open else ".")
        )
    if ranks[rank] is None:
        drawn = {name: mine[name] for name in ("python", "numpy", "torch", "cuda", "own") if name in mine}
        ranks[rank] = {**known, "now": {**known["now"], **drawn}, "gradients": {}}


def can_be_dealt_anew(changed: set[str], before: dict[str, Any] | None, now: dict[str, Any] | None) -> bool:
    """Whether the rest of an epoch dealt in the one way can be dealt in the other."""
    if before is None or now is None or not changed <= _MAY_DIFFER:
        return False
    return all(before[name] == now[name] for name in ("samples", "shuffle"))


def dealt_anew(
    trainer: pl.Trainer, resume: dict[str, Any], now: dict[str, Any], mine: dict[str, Any]
) -> dict[str, Any]:
    """The state of ExactResume that these processes would have, with the rest of the epoch dealt out among them.

    Args:
        trainer: The Trainer, whose position in the epoch is moved to the place from which as much is left.
        resume: The state that was saved.
        now: How the samples are dealt out now.
        mine: The random state of this process, for one that did not exist before.
    """
    saved = [each for each in resume["ranks"] if each is not None]
    rank, processed = trainer.global_rank, batch_progress(trainer).current.processed
    before = saved[rank if rank < len(saved) else 0]
    state = {
        **(before["now"] if rank < len(saved) else mine),
        **{key: before["now"][key] for key in ("seeds", "seed", "loaders") if key in before["now"]},
    }
    epoch: dict[str, Any] = {"iter": state, "fresh": True, "fetches": {}}
    position = now["batches"]
    if not before["finished"]:
        index = epoch_progress(trainer).current.processed
        rest = _rest(saved[0], resume["dealing"], now, index, processed, Run(trainer).window)
        epoch["rest"], position = rest, rest["position"]
    _move_in_epoch(trainer, position - processed)
    gradients = mean_gradients([each["gradients"] for each in saved])
    done = {name: before.get(name, False) for name in ("finished", "followed")}
    known = {"now": state, "epoch": epoch, **done, "gradients": gradients, "switches": before.get("switches", {})}
    return {**resume, "ranks": [known] * trainer.world_size}


def _move_in_epoch(trainer: pl.Trainer, batches: int) -> None:
    """Moves the position in the current epoch by so many batches."""
    current = batch_progress(trainer).current
    for name in ("ready", "started", "processed", "completed"):
        setattr(current, name, getattr(current, name) + batches)


def _rest(
    saved: dict[str, Any], dealt: dict[str, Any], now: dict[str, Any], epoch: int, processed: int, window: int
) -> RestOfEpoch:
    """What is left of the epoch after so many batches per process.

    Args:
        saved: The state of a process: the random states of now, and before the epoch's iter() and fetches.
        dealt: How the run that was saved dealt out the samples.
        now: How they are dealt out now.
        epoch: Index of the epoch.
        processed: Batches that each process of the saved run has seen in this epoch.
        window: Batches per step. The next one stands in its window where the saved one stood, if there are enough.
    """
    begun = saved["epoch"].get("rest")
    if begun is None:
        begun = {"order": {**_drawn_from(saved, dealt), "epoch": epoch}, "seen": 0, "position": 0}
    batches = processed - begun["position"]
    seen = min(begun["seen"] + batches * dealt["batch_size"] * dealt["replicas"], dealt["samples"])
    share = math.ceil((dealt["samples"] - seen) / now["replicas"])
    left = max(1, share // now["batch_size"]) if now["drop_last"] else math.ceil(share / now["batch_size"])
    position = now["batches"] - left
    if (before := position - (position - processed) % window) >= 0:
        position = before
    return {"order": begun["order"], "seen": seen, "left": left, "position": position}


def _drawn_from(saved: dict[str, Any], dealt: dict[str, Any]) -> dict[str, Any]:
    """What the order of an epoch is drawn from."""
    order = {name: dealt[name] for name in ("samples", "shuffle", "seed")}
    if order["shuffle"] and order["seed"] is None:
        # Without workers the order is drawn in the first fetch; workers fetch in iter(), after a seed for themselves.
        epoch, has_workers = saved["epoch"], dealt["num_workers"] > 0
        state = epoch["iter"] if has_workers else epoch["fetches"].get(0, saved["now"])
        order |= {"torch": state["torch"], "own": state["loaders"][:1], "skips": has_workers and epoch["fresh"]}
    return order


def _order(order: dict[str, Any]) -> list[int]:
    """All samples of the epoch, in its order."""
    samples = range(order["samples"])
    if not order["shuffle"]:
        return [*samples]
    if order["seed"] is not None:
        distributed: Any = DistributedSampler(samples, 1, 0, seed=order["seed"])  # type: ignore[arg-type]
        distributed.set_epoch(order["epoch"])
        return [*distributed]
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(order["torch"].cpu())
        generator = None
        if order["own"]:
            generator = torch.Generator()
            generator.set_state(order["own"][0].cpu())
        sampler = RandomSampler(samples, generator=generator)
        if order["skips"]:
            iter(DataLoader(samples, sampler=sampler, generator=generator))  # type: ignore[arg-type]
        return [*sampler]


def deal_rest(loader: DataLoader[Any], rest: RestOfEpoch) -> None:
    """Makes a loader go on with the rest of the epoch, until its batch sampler is given another sampler."""
    batch_sampler = loader.batch_sampler
    assert isinstance(batch_sampler, BatchSampler)
    left = _order(rest["order"])[rest["seen"] :]
    sampler, length = loader.sampler, len(loader.sampler)  # type: ignore[arg-type]
    replicas, rank = (sampler.num_replicas, sampler.rank) if isinstance(sampler, DistributedSampler) else (1, 0)
    missing = -len(left) % replicas  # as torch's sampler does, the first ones are seen once more
    if batch_sampler.drop_last:
        missing = max(missing, batch_sampler.batch_size * replicas - len(left))
    batch_sampler.sampler = _Rest([*left, *(left * missing)[:missing]][rank::replicas], length)


class _Rest(Sampler[int]):
    """The given samples; with the length of a whole epoch, in which Lightning counts."""

    def __init__(self, samples: list[int], length: int) -> None:
        self._samples, self._length = samples, length

    def __iter__(self) -> Iterator[int]:
        return iter(self._samples)

    def __len__(self) -> int:
        return self._length
