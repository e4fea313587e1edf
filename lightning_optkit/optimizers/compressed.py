# SPDX-License-Identifier: Apache-2.0
"""Optimizer state dicts with moments in 8 or 16 bits: smaller files of any run, whatever its own state is."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_optkit._checks import check_instance, check_one_of
from lightning_optkit.optimizers.convert import one_pass_like, why_not_convertible
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.loading import check_outline
from lightning_optkit.step.packed import is_packed, packed, widened
from lightning_optkit.step.plain import is_dense
from lightning_optkit.step.quantized_state import scale_name
from lightning_optkit.step.rule import Rule
from lightning_optkit.step.saved import saved_dict

__all__ = ["COMPRESSED_DTYPES", "compressed_state_dict", "why_not_compressible", "widened_state_dict"]

COMPRESSED_DTYPES = ("int8", torch.bfloat16)


def why_not_compressible(optimizer: Optimizer) -> str | None:
    """Why it is not known which numbers in the state of `optimizer` are moments, or None.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> why_not_compressible(torch.optim.Rprop([weight]))
        'no one-pass rule for torch.optim.Rprop'
    """
    return None if isinstance(optimizer, OnePassOptimizer) else why_not_convertible(optimizer)


def compressed_state_dict(
    optimizer: Optimizer, dtype: Literal["int8"] | torch.dtype = "int8", state_dict: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The state dict of an optimizer with its moments in 8 or 16 bits, rounded to nearest.

    Moments in fp32 (8 bits: also in 16 bits) of the shape of their parameter are compressed; those in 8 bits keep their
    codes. State in 16 bits, points (`z` of Schedule-Free), averages, low-order parts of weights and counters are saved
    as they are. The relative error of a moment is at most 1/16 ("int8", for a moment above 2^-15 of the largest of its
    block of 128, if signed, else 2^-31) or 1/256 (bfloat16).

    Optimizers of this package load the result. For torch's class use `widened_state_dict` first: of "int8" it can make
    nothing, and fails at its next step.

    Args:
        optimizer: One of this package, or of torch with the same rule.
        dtype: "int8" or torch.bfloat16.
        state_dict: Its state dict, which is not changed. Default: the current one.

    Raises:
        TypeError: if the state dict, or a part of it, is of a wrong type.
        ValueError: for another dtype, an optimizer whose rule is not known, or a state dict of other parameters.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1000))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> compressed_state_dict(optimizer)["state"][0]["exp_avg"]["codes"].dtype
        torch.uint8
    """
    check_instance("compressed_state_dict", "optimizer", optimizer, Optimizer, "one such as AdamW(model.parameters())")
    check_one_of("compressed_state_dict", "dtype", dtype, COMPRESSED_DTYPES)
    reason = why_not_compressible(optimizer)
    if reason is not None:
        raise ValueError(f"compressed_state_dict(optimizer=<{type(optimizer).__name__}>): {reason}.")
    ours = optimizer if isinstance(optimizer, OnePassOptimizer) else one_pass_like(optimizer)
    given = optimizer.state_dict() if state_dict is None else state_dict
    check_outline("compressed_state_dict(state_dict=...):", ours, given)
    state = dict(given["state"])
    if ours.state_dtype == "int8":  # a converted optimizer saves its codes in fp32, for torch's class
        dtype = "int8"
    for saved, group in zip(given["param_groups"], ours.param_groups, strict=True):
        rule = ours._rule(group)
        for number, param in zip(saved["params"], group["params"], strict=True):
            if number in state:
                held = _with_packed_codes(state[number], rule)
                state[number] = {n: _compressed(v, n, rule, param, dtype) for n, v in held.items()}
    return {**given, "state": state}


def widened_state_dict(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A compressed state dict with its 8-bit moments in fp32, for torch's class; any other as it is.

    Args:
        state_dict: What `compressed_state_dict` returned, perhaps saved and loaded.

    Raises:
        TypeError: for an entry of a wrong type.
        ValueError: for a damaged entry, and for 8-bit state as an optimizer's own `state_dict` has it, without the sign
            that `compressed_state_dict` adds.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(1000))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> saved = compressed_state_dict(optimizer)
        >>> optimizer.load_state_dict(widened_state_dict(saved))
    """
    what = "widened_state_dict(state_dict=...):"
    held = saved_dict(f"{what} 'state'", saved_dict(what, state_dict, ("state",))["state"])
    state = {}
    for number, values in held.items():
        entry = f"{what} the state of parameter {number!r}"
        values = saved_dict(entry, values)
        bare = next((name for name in values if _is_code(values, name)), None)
        if bare is not None:
            raise ValueError(f"{entry}, {bare!r}, is in 8 bits; give what compressed_state_dict(optimizer) returns.")
        state[number] = {
            name: widened(f"{entry}, {name!r}", value) if is_packed(value) else value for name, value in values.items()
        }
    return {**state_dict, "state": state}


def _is_code(values: Mapping[Any, Any], name: object) -> bool:
    """Whether a value of a saved state is in 8 bits, as a step keeps it: the scales are beside it."""
    return isinstance(name, str) and scale_name(name) in values and not is_packed(values[name])


def _with_packed_codes(values: Mapping[str, Any], rule: Rule) -> dict[str, Any]:
    """The state of a parameter with codes and scales in one entry, which says whether they are signed."""
    found = dict(values)
    for name in rule.state_names:
        if name in found and _is_code(values, name):
            signed = not rule.spec(name).nonnegative
            found[name] = {"codes": found[name], "scale": found.pop(scale_name(name)), "signed": signed}
    return found


def _compressed(value: Any, name: str, rule: Rule, param: Tensor, dtype: Literal["int8"] | torch.dtype) -> Any:
    """The value of a state, compressed if it is a moment and gains by it."""
    if name not in rule.state_names or rule.spec(name).full_precision or not isinstance(value, Tensor):
        return value
    wide = (torch.float32,) if dtype != "int8" else (torch.float32, torch.bfloat16, torch.float16)
    is_plain = value.shape == param.shape and not isinstance(value, DTensor) and is_dense(value)
    if not is_plain or value.dtype not in wide or value.numel() == 0:
        return value
    if isinstance(dtype, torch.dtype):
        return value.to(dtype)
    return packed(value, signed=not rule.spec(name).nonnegative)
