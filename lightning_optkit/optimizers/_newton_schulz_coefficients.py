# SPDX-License-Identifier: Apache-2.0
"""The polynomials of the Newton-Schulz iterations: one for all, or one per iteration.

Source: Amsel et al. 2025, "The Polar Express: Optimal Matrix Sign Methods and Their Application to the Muon Algorithm",
arXiv:2505.16932, Algorithm 1 and the coefficients of Appendix A (lower bound 1e-3, degree 5).
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from lightning_optkit._checks import NO_LIST, check_numbers, shown

__all__ = ["Coefficients", "Triple", "check_coefficients", "coefficients_per_step"]

Triple: TypeAlias = tuple[float, float, float]
Coefficients: TypeAlias = Triple | list[Triple] | Literal["polar_express"]

_OPTIMAL: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_LIMIT: Triple = (1.875, -1.25, 0.375)
_SAFETY = 1.01


def _shrunk(triple: Triple) -> Triple:
    """The polynomial of x / 1.01: rounding must not carry a singular value out of the range of the next one."""
    a, b, c = triple
    return a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5


# The authors also divide by 1.01 times the norm, which is part of the first polynomial here.
_POLAR_EXPRESS = (_shrunk(_shrunk(_OPTIMAL[0])), *map(_shrunk, _OPTIMAL[1:]), _LIMIT)


def coefficients_per_step(coefficients: Coefficients | tuple[Triple, ...], steps: int) -> tuple[Triple, ...]:
    """The coefficients of each of `steps` iterations; the last ones of a list that is shorter are repeated.

    Example:
        >>> coefficients_per_step([(2.0, -1.5, 0.5), (1.875, -1.25, 0.375)], 3)
        ((2.0, -1.5, 0.5), (1.875, -1.25, 0.375), (1.875, -1.25, 0.375))
    """
    if coefficients == "polar_express":
        return tuple(_POLAR_EXPRESS[min(step, len(_POLAR_EXPRESS) - 1)] for step in range(steps))
    several: Sequence[Any] = coefficients if _is_list(coefficients) else [coefficients]
    given = [tuple(triple) for triple in several]
    return tuple(given[min(step, len(given) - 1)] for step in range(steps))


def check_coefficients(owner: str, coefficients: Any) -> None:
    """Raises unless they are three numbers, a list of such triples, or "polar_express".

    Raises:
        TypeError: for anything else than a string or a sequence.
        ValueError: for another string, another count, or a number that is not finite.
    """
    if isinstance(coefficients, str):
        if coefficients != "polar_express":
            requirement = 'ns_coefficients must be three numbers, a list of them, or "polar_express"'
            raise ValueError(f"{owner}(ns_coefficients={shown(coefficients)}): {requirement}.")
        return
    for triple in coefficients if _is_list(coefficients) else [coefficients]:
        check_numbers(owner, "ns_coefficients", triple, 3, "(-inf, inf)")


def _is_list(coefficients: Any) -> bool:
    """Whether there are several triples."""
    if isinstance(coefficients, NO_LIST) or not isinstance(coefficients, Sequence) or not coefficients:
        return False
    return all(isinstance(triple, Sequence) and not isinstance(triple, NO_LIST) for triple in coefficients)
