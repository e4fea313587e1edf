# SPDX-License-Identifier: Apache-2.0
"""Argument checks, one for each kind of argument. Every message reads `Owner(argument=value): requirement.`"""

from lightning_optkit._checks._kinds import (
    check_bools,
    check_callable,
    check_instance,
    check_like,
    check_listed,
    check_mapping,
    check_one_of,
    check_pattern,
    check_text,
    iterate,
)
from lightning_optkit._checks._numbers import NO_LIST, check_in, check_int, check_numbers, check_whole
from lightning_optkit._checks._saved import check_path, check_state
from lightning_optkit._checks._shown import kind_shown, shown
from lightning_optkit._checks._tensors import check_generator, check_home, check_module, check_tensor, check_tensors

__all__ = [
    "NO_LIST",
    "check_bools",
    "check_callable",
    "check_generator",
    "check_home",
    "check_in",
    "check_instance",
    "check_int",
    "check_like",
    "check_listed",
    "check_mapping",
    "check_module",
    "check_numbers",
    "check_one_of",
    "check_path",
    "check_pattern",
    "check_state",
    "check_tensor",
    "check_tensors",
    "check_text",
    "check_whole",
    "iterate",
    "kind_shown",
    "shown",
]
