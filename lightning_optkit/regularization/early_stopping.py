# SPDX-License-Identifier: Apache-2.0
"""Stopping criteria: generalization loss, progress quotient, and successive increases of the validation error.

Source: Prechelt 1998, "Early Stopping - But When?", Section 2 (classes GL, PQ and UP).
"""

from collections.abc import Sequence

from lightning_optkit._checks import check_in, check_int, check_listed

__all__ = ["generalization_loss", "progress", "progress_quotient", "successive_increases"]


def generalization_loss(errors: Sequence[float]) -> float:
    r"""Excess of the last validation error over the lowest so far, in percent.

    .. math:: GL(t) = 100 \left(\frac{E_{va}(t)}{\min_{t' \le t} E_{va}(t')} - 1\right)

    Args:
        errors: Validation errors, each > 0, from the first to the last.

    Raises:
        ValueError: if there is none, or one is not positive.

    Example:
        >>> round(generalization_loss([1.0, 0.8, 0.9]), 1)
        12.5
    """
    return _loss_of("generalization_loss", errors)


def _loss_of(owner: str, errors: Sequence[float]) -> float:
    errors = _checked("errors", owner, errors)
    return 100.0 * (errors[-1] / min(errors) - 1.0)


def progress(errors: Sequence[float], strip: int = 5) -> float:
    r"""Excess of the mean training error of the last strip over its minimum, in per mille.

    .. math:: P_k(t) = 1000 \left(\frac{\sum_{t'=t-k+1}^{t} E_{tr}(t')}{k \min_{t'} E_{tr}(t')} - 1\right)

    It is high while training is fast or unstable, and goes to zero at the end.

    Args:
        errors: Training errors, each > 0, at least `strip` of them.
        strip: k, in [1, inf).

    Raises:
        ValueError: if there are too few, or one is not positive.

    Example:
        >>> round(progress([9.0, 1.2, 1.0], strip=2), 1)
        100.0
    """
    return _progress_of("progress", "errors", errors, strip)


def _progress_of(owner: str, name: str, errors: Sequence[float], strip: int) -> float:
    check_int(owner, "strip", strip, minimum=1)
    errors = _checked(name, owner, errors)
    if len(errors) < strip:
        raise ValueError(f"{owner}(strip={strip}): there are only {len(errors)} {name}.")
    last = errors[-strip:]
    return 1000.0 * (sum(last) / (strip * min(last)) - 1.0)


def progress_quotient(errors: Sequence[float], training_errors: Sequence[float], strip: int = 5) -> float:
    r"""Generalization loss over progress: :math:`PQ(t) = GL(t) / P_k(t)`.

    Args:
        errors: Validation errors, each > 0.
        training_errors: Training errors, each > 0, at least `strip` of them.
        strip: k, in [1, inf).

    Returns:
        The quotient: 0 if the generalization loss is 0, infinite if it is not and the progress is 0.

    Raises:
        ValueError: if there are too few errors, or one is not positive.

    Example:
        >>> round(progress_quotient([0.8, 0.9], [1.2, 1.0], strip=2), 3)
        0.125
    """
    lost = _loss_of("progress_quotient", errors)
    gained = _progress_of("progress_quotient", "training_errors", training_errors, strip)
    if lost == 0:
        return 0.0
    return lost / gained if gained > 0 else float("inf")


def successive_increases(errors: Sequence[float], strip: int = 5) -> int:
    """Number of successive strips, up to the last complete one, that ended with a higher validation error.

    Args:
        errors: Validation errors.
        strip: k, in [1, inf).

    Raises:
        TypeError: if `errors` is not a list of numbers.
        ValueError: if `strip` is out of range.

    Example:
        >>> successive_increases([9.0, 3.0, 9.0, 4.0, 9.0, 5.0, 0.0], strip=2)
        2
    """
    check_int("successive_increases", "strip", strip, minimum=1)
    errors = _numbers("errors", "successive_increases", errors, "[-inf, inf]", empty=True)
    ends = errors[strip - 1 :: strip]
    count = 0
    for earlier, later in zip(ends[-2::-1], ends[:0:-1], strict=True):
        if later <= earlier:
            break
        count += 1
    return count


def _numbers(name: str, owner: str, values: Sequence[float], interval: str, *, empty: bool = False) -> list[float]:
    listed = check_listed(owner, name, values, "a list of numbers, such as [1.0, 0.8]", empty=empty)
    return [check_in(owner, f"{name}[{place}]", value, interval) for place, value in enumerate(listed)]


def _checked(name: str, owner: str, errors: Sequence[float]) -> list[float]:
    listed = _numbers(name, owner, errors, "[-inf, inf]")
    lowest = min(listed)
    if not lowest > 0:
        raise ValueError(f"{owner}({name}=[..., {lowest:g}, ...]): every error must be greater than 0.")
    return listed
