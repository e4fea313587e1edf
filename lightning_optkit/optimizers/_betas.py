# SPDX-License-Identifier: Apache-2.0
"""Three decay rates, as some rules have them."""

from typing import Any

__all__ = ["triple"]


def triple(owner: str, betas: Any) -> tuple[Any, Any, Any]:
    """`betas` as three numbers.

    Raises:
        TypeError: if it is no sequence.
        ValueError: if it has another length.
    """
    if len(betas) != 3:
        raise ValueError(f"{owner}(betas={betas!r}): betas must be three numbers.")
    first, second, third = betas
    return first, second, third
