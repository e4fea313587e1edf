# SPDX-License-Identifier: Apache-2.0
"""What must be equal on all processes, and which batches must not be: exact."""

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.verdict import ONCE, Verdict

__all__ = ["duplicate_data", "ranks_diverge"]


def ranks_diverge(run: RunSeen) -> Verdict | None:
    """Replicated parameters that are not bitwise equal on all ranks."""
    for seen in run.ranks:
        if seen.differing:
            cause = "the processes no longer hold the same weights: something changed them without the others"
            more = f" and {len(seen.differing) - 1} more" if len(seen.differing) > 1 else ""
            evidence = f"{seen.differing[0]}{more} differed between ranks after step {seen.step}"
            remedy = "change weights on every rank alike, and call the module through DDP, not module.module"
            return Verdict("ranks_diverge", seen.differing[0], cause, evidence, remedy, seen.step, 1.0)
    return None


def duplicate_data(run: RunSeen) -> Verdict | None:
    """Two ranks that were given the same batches, or batches that are all the same."""
    if run.repeated_batches:
        cause = "every step trains on the same batch, although the loader has more than one"
        evidence = f"the first {run.repeated_batches} batches were bitwise equal"
        remedy = "one DataLoader(..., shuffle=True) per fit: next(iter(loader)) gives its first batch each time"
        confidence = 1.0 if run.repeated_batches > 2 else ONCE
        return Verdict("duplicate_data", None, cause, evidence, remedy, 0, confidence)
    for seen in run.ranks:
        if seen.same_batches:
            ranks = ", ".join(map(str, seen.same_batches))
            cause = "processes train on the same batches, so adding them adds nothing"
            evidence = f"ranks {ranks} had {seen.num_batches} equal batches in a row"
            remedy = "leave Trainer(use_distributed_sampler=True) and give the loader no sampler or seed of your own"
            return Verdict("duplicate_data", None, cause, evidence, remedy, 0, 1.0)
    return None
