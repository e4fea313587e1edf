# SPDX-License-Identifier: Apache-2.0
"""Whether first batches repeat, and what differs, or wrongly does not, among the processes of a run."""

from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.equal_items import has_equal_items
from lightning_optkit.callbacks.seams.rank_checks import differing_parameters, ranks_with_same_batches, replicates
from lightning_optkit.diagnostics._guard import Guarding
from lightning_optkit.diagnostics._observations import RanksSeen, RunSeen
from lightning_optkit.diagnostics.measure.batches import digest

__all__ = ["Compared"]

_BATCHES = 3


class Compared:
    """The comparisons of one fit; each process must ask for them in the same batches.

    Args:
        guard: What stands around them.
    """

    def __init__(self, guard: Guarding) -> None:
        self._guard, self._digests = guard, list[int]()
        self._is_meant: bool | None = None  # whether batches are equal since what they are made of is
        self.is_over = False  # all batches that are compared have been

    def weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule, seen: RunSeen) -> None:
        """Compares the weights after a step with those of the other processes, and adds what differs to `seen`."""
        differing: tuple[str, ...] = ()
        with self._guard("the comparison of weights among processes"):
            if replicates(trainer):
                differing = differing_parameters(trainer, dict(pl_module.named_parameters()))
        if differing:
            seen.ranks.append(RanksSeen(seen.steps - 1, differing=differing))

    def batch(self, trainer: pl.Trainer, batch: Any, seen: RunSeen) -> None:
        """Compares the first batches with each other, then with those of the other processes."""
        self._digests.append(0)
        with self._guard("the comparison of batches"):
            self._digests[-1] = digest(batch)
        num, is_same = len(self._digests), bool(self._digests[0]) and len(set(self._digests)) == 1
        is_repeated = is_same and num > 1 and trainer.num_training_batches > _BATCHES
        if is_repeated and self._is_meant is None:
            self._is_meant = False
            with self._guard("the look at equal batches"):
                self._is_meant = has_equal_items(trainer, batch)
        is_repeated = is_repeated and not self._is_meant
        seen.repeated_batches = num if is_repeated else 0
        if num < _BATCHES:
            return
        self.is_over = True
        with self._guard("the comparison of batches among processes"):
            if replicates(trainer):
                same = ranks_with_same_batches(trainer, self._digests)
                seen.ranks.append(RanksSeen(seen.steps, same_batches=same, num_batches=_BATCHES))
