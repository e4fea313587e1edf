# SPDX-License-Identifier: Apache-2.0
"""State in 8 bits inside a saved state dict, one entry for its codes, scales and sign, so that it describes itself.

Other than codes under the name of the state, torch's classes cannot take such an entry for numbers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optkit.step.plain import is_dense
from lightning_optkit.step.quantized_state import BLOCK, dequantize8, quantize8_, scale_name, zero_scales
from lightning_optkit.step.saved import saved_dict, saved_floats, saved_tensor

__all__ = ["is_packed", "packed", "unpacked", "widened"]

_ENTRIES = ("codes", "scale", "signed")


def is_packed(value: object) -> bool:
    """Whether a value of a saved state is, or claims to be, packed."""
    return isinstance(value, Mapping)


@torch.no_grad()
def packed(value: Tensor, *, signed: bool) -> dict[str, Any]:
    """`value` in 8 bits, rounded to nearest: the relative error of a number is at most 1/16 down to its least code."""
    codes = torch.empty_like(value, dtype=torch.uint8)
    scale = zero_scales(codes)
    quantize8_(codes, scale, torch.empty_like(codes, dtype=torch.float32).copy_(value), signed=signed, key=None)
    return {"codes": codes, "scale": scale, "signed": signed}


def _parts_of(what: str, value: object) -> tuple[Tensor, Tensor, bool]:
    """Codes, scales and sign of a packed value, checked.

    Raises:
        TypeError: if a part has a wrong type.
        ValueError: if one is missing, or they do not fit together.
    """
    held = saved_dict(what, value, _ENTRIES)
    codes, signed = saved_tensor(f"{what}['codes']", held["codes"]), held["signed"]
    if codes.dtype != torch.uint8 or not is_dense(codes):
        raise ValueError(f"{what}['codes'] must be a tensor of uint8, in memory without gaps.")
    if not isinstance(signed, bool):
        raise TypeError(f"{what}['signed'] must be True or False.")
    return codes, saved_floats(f"{what}['scale']", held["scale"], (-(-codes.numel() // BLOCK),)), signed


def unpacked(what: str, saved: Mapping[Any, Any], signs: Mapping[str, bool]) -> Mapping[Any, Any]:
    """The saved state of a parameter with codes and scales under names of their own, as the step keeps them.

    Args:
        what: The beginning of error messages.
        saved: Values by name.
        signs: By name, whether the state is signed.

    Raises:
        TypeError: for a part of a wrong type.
        ValueError: for a packed value that is damaged, or of another sign.
    """
    if not any(map(is_packed, saved.values())):
        return saved
    found: dict[Any, Any] = {}
    for name, value in saved.items():
        if not is_packed(value):
            found[name] = value
            continue
        entry = f"{what}, the state {name!r}"
        codes, scale, signed = _parts_of(entry, value)
        if signs.get(name, signed) != signed:
            raise ValueError(f"{entry}['signed'] must be {signs[name]}.")
        found[name], found[scale_name(name)] = codes, scale
    return found


def widened(what: str, value: object) -> Tensor:
    """The numbers of a packed value, in fp32. Raises like `_parts_of`."""
    codes, scale, signed = _parts_of(what, value)
    return dequantize8(codes, scale, signed=signed)
