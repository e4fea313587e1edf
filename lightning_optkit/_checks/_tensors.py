# SPDX-License-Identifier: Apache-2.0
"""Checks of tensors, modules and generators."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_optkit._checks._kinds import check_listed
from lightning_optkit._checks._shown import kind_shown, shown

__all__ = ["check_generator", "check_home", "check_module", "check_tensor", "check_tensors"]

Numbers = Literal["any", "real", "floating", "inexact"]

_WORDS = {
    "any": "a tensor",
    "real": "a real tensor",
    "floating": "a floating tensor",
    "inexact": "a floating or complex tensor",
}


def check_tensor(
    owner: str,
    name: str,
    value: Any,
    numbers: Numbers = "any",
    *,
    min_ndim: int = 0,
    sparse: bool = False,
    meta: bool = True,
) -> Tensor:
    """Returns `value` if it is a tensor with readable numbers.

    Args:
        owner: Owner of the argument, for the message.
        name: Name of the argument.
        value: The argument.
        numbers: Allowed dtypes: "any", "real" (not complex), "floating" (neither integers nor complex), "inexact" (no
            integers).
        min_ndim: Least number of dimensions.
        sparse: Whether layouts other than dense are allowed.
        meta: Whether a tensor on the meta device is allowed.

    Raises:
        TypeError: if it is not a tensor of such a dtype.
        ValueError: if it has too few dimensions, another layout, or no memory.

    Example:
        >>> check_tensor("r_drop", "logits", torch.zeros(2), "floating")
        tensor([0., 0.])
    """
    is_right = isinstance(value, Tensor) and (
        numbers == "any"
        or (numbers == "real" and not value.is_complex())
        or value.is_floating_point()
        or (numbers == "inexact" and value.is_complex())
    )
    if not is_right:
        found = value.dtype if isinstance(value, Tensor) else kind_shown(value)
        raise TypeError(f"{owner}({name}={found}): {name} must be {_WORDS[numbers]}.")
    tensor: Tensor = value
    if not sparse and tensor.layout != torch.strided:
        raise ValueError(f"{owner}({name}=<{tensor.layout}>): {name} must be dense; use {name}.to_dense().")
    if not meta and tensor.is_meta:
        raise ValueError(f"{owner}({name}=<tensor on meta>): {name} must hold numbers, not only a shape.")
    if tensor.dim() < min_ndim:
        raise ValueError(
            f"{owner}({name}.shape={tuple(tensor.shape)}): {name} must have at least {min_ndim} "
            f"dimension{'s' * (min_ndim > 1)}."
        )
    return tensor


def check_tensors(
    owner: str,
    name: str,
    values: Any,
    numbers: Numbers = "any",
    *,
    optional: bool = False,
    empty: bool = True,
    sparse: bool = False,
    meta: bool = True,
) -> list[Any]:
    """Returns `values` as a list, if they are tensors with readable numbers. A single tensor counts as a list.

    Args:
        owner: Owner of the argument, for the message.
        name: Name of the argument.
        values: The argument.
        numbers: See `check_tensor`.
        optional: Whether None is allowed in place of a tensor.
        empty: Whether an empty list is allowed.
        sparse: See `check_tensor`.
        meta: See `check_tensor`.

    Raises:
        TypeError: if they are not tensors of such a dtype.
        ValueError: if there are none, or one has another layout or no memory.

    Example:
        >>> check_tensors("l1_penalty", "params", (p for p in [torch.zeros(1)]))
        [tensor([0.])]
    """
    such_as = "an iterable of tensors, such as model.parameters()"
    if isinstance(values, Tensor):
        listed: list[Any] = [values]
    else:
        listed = check_listed(owner, name, values, such_as, empty=empty, member=" parameter")
    for place, value in enumerate(listed):
        if not (optional and value is None):
            check_tensor(owner, f"{name}[{place}]", value, numbers, sparse=sparse, meta=meta)
    return listed


def check_module(owner: str, name: str, value: Any) -> nn.Module:
    """Returns `value` if it is a module, not a class.

    Raises:
        TypeError: if it is not.

    Example:
        >>> check_module("swap_norms", "model", nn.Linear(4, 2))
        Linear(in_features=4, out_features=2, bias=True)
    """
    if not isinstance(value, nn.Module):
        raise TypeError(f"{owner}({name}={kind_shown(value)}): {name} must be a torch.nn.Module.")
    return value


def check_home(owner: str, device: Any, dtype: Any) -> None:
    """Raises unless parameters can be created on `device` in `dtype`; None is torch's default.

    Raises:
        TypeError: if it is not a device, or not a dtype.
        ValueError: if the device does not exist, or the dtype is not floating-point.

    Example:
        >>> check_home("ScaleNorm", "cpu", torch.bfloat16)
    """
    if device is not None:
        if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
            raise TypeError(f'{owner}(device={shown(device)}): device must be None or a device, such as "cpu".')
        try:
            torch.empty(0, device=device)
        except Exception as error:
            reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise ValueError(f"{owner}(device={shown(device)}): device must be there; torch says {reason}.") from error
    if dtype is None:
        return
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{owner}(dtype={shown(dtype)}): dtype must be None or a torch.dtype, such as torch.float32.")
    if not dtype.is_floating_point:
        raise ValueError(f"{owner}(dtype={dtype}): dtype must be floating, such as torch.float32.")


def check_generator(owner: str, value: torch.Generator | None, name: str = "generator") -> torch.Generator | None:
    """Returns `value` if it is a generator or None.

    Raises:
        TypeError: if it is not; a seed is not a generator.

    Example:
        >>> check_generator("Mixup", None)
    """
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(
            f"{owner}({name}={shown(value)}): {name} must be None or a torch.Generator, such as "
            "torch.Generator().manual_seed(0)."
        )
    return value
