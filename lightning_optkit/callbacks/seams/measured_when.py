# SPDX-License-Identifier: Apache-2.0
"""Which steps of a run are measured, probed, or counted for the predictions of rare classes."""

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.classes import is_dominated

__all__ = ["is_regular", "may_count", "may_probe", "next_look"]

_FIRST = (0, 1, 2, 3, 5, 8, 16, 32)  # measured steps before the regular ones: what is wrong from the start shows early
# A run that has not learned much in its first quarter is probed this often in the rest of it.
_PROBED_FROM, _PROBED_EVERY, _MOST_PROBES = 1 / 4, 1 / 20, 15
_COUNTED = 80  # parts of a run of which one class has most samples; in its second half each of them is measured
_LENGTH = 400  # steps, where the length of the run is not known
_AHEAD = 1_000  # steps that are looked through at once


def is_regular(step: int, every: int) -> bool:
    """Whether the step is measured in any run.

    Example:
        >>> [step for step in range(300) if is_regular(step, every=100)]
        [0, 1, 2, 3, 5, 8, 16, 32, 100, 200]
    """
    return step in _FIRST or step % every == 0


def may_probe(run: RunSeen, num_probes: int) -> bool:
    """Whether the next step is probed, after so many probes, if the run has not learned much."""
    return num_probes < _MOST_PROBES and _is_probed(run.steps, run.steps_planned or _LENGTH)


def may_count(run: RunSeen) -> bool:
    """Whether the next step is measured since one class has most samples: of a rare one few are seen in a step."""
    return _is_counted(run.steps, run.steps_planned or _LENGTH) and is_dominated(run)


def next_look(run: RunSeen, every: int) -> int:
    """The first step from here on for which one of these is worth asking, while the planned length is the same.

    Example:
        >>> [next_look(RunSeen(steps=step, steps_planned=10_000), every=100) for step in (4, 33, 101)]
        [5, 100, 200]
    """
    step, length = run.steps, run.steps_planned or _LENGTH
    while not (is_regular(step, every) or _is_probed(step, length) or _is_counted(step, length)):
        step += 1
        if step == run.steps + _AHEAD:
            break
    return step


def _is_probed(step: int, length: int) -> bool:
    # An odd distance, so that probes of short epochs meet different batches.
    since = step - max(6, int(_PROBED_FROM * length))
    return since >= 0 and since % (max(3, int(_PROBED_EVERY * length)) | 1) == 0


def _is_counted(step: int, length: int) -> bool:
    return 2 * step >= length and step % (max(1, length // _COUNTED) | 1) == 0
