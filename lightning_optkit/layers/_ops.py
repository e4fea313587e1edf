# SPDX-License-Identifier: Apache-2.0
"""The ops `lightning_optkit::norm` and `add_norm` with their gradients; needs the compiled extension.

A traced call uses the ops with their registered autograd formula. An eager call that the C++ node in `_node` does not
support uses a `torch.autograd.Function` over the same kernels, with half the Python overhead.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_optkit._native import extension, node
from lightning_optkit._torch_private import apply_without_transforms, innermost_transform
from lightning_optkit.layers import _fakes  # noqa: F401  # registers
from lightning_optkit.layers._arguments import check_memory, is_plain
from lightning_optkit.layers._reference import norm_backward_reference, survival

__all__ = ["add_norm", "norm"]

_ops = torch.ops.lightning_optkit
_norm, _add_norm, _norm_backward = _ops._norm.default, _ops._add_norm.default, _ops.norm_backward.default


def norm(centered: bool, input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float) -> Tensor:
    """The normalized input."""
    if torch.compiler.is_compiling():
        return _ops.norm(centered, input, weight, bias, dims, eps)[0]  # type: ignore[no-any-return]
    if _needs_grad(input, weight, bias):
        return _Norm.apply(input, weight, bias, centered, dims, eps)  # type: ignore[no-any-return, no-untyped-call]
    return _norm(centered, input, weight, bias, dims, eps)[0]  # type: ignore[no-any-return]


def add_norm(
    centered: bool,
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: int,
    eps: float,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(normalized sum, sum)."""
    if torch.compiler.is_compiling():
        y, total, _ = _ops.add_norm(centered, input, residual, weight, bias, dims, eps, dropout, seed)
        return y, total
    if residual.requires_grad or _needs_grad(input, weight, bias):
        return _apply_add_norm(input, residual, weight, bias, centered, dims, eps, dropout, seed)  # type: ignore[no-any-return]
    y, total, _ = _add_norm(centered, input, residual, weight, bias, dims, eps, dropout, seed)
    return y, total


def _needs_grad(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, centered: bool, dims: int, eps: float
    ) -> Tensor:
        y, stats = _norm(centered, input, weight, bias, dims, eps)
        ctx.save_for_backward(input, weight, stats)
        ctx.constants = centered, dims, eps
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        centered, dims, eps = ctx.constants
        input, weight, stats = ctx.saved_tensors
        wants = ctx.needs_input_grad
        dx, _, d_weight, d_bias = _gradients(
            centered, dy, None, input, stats, weight, dims, eps, 0.0, None, wants[0], wants[1], wants[2],
            _fits(dy, None, input, stats, weight),
        )  # fmt: skip
        return dx, d_weight, d_bias, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centered: bool,
        dims: int,
        eps: float,
        dropout: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        y, total, stats = _add_norm(centered, input, residual, weight, bias, dims, eps, dropout, seed)
        ctx.save_for_backward(total, weight, stats, seed)
        ctx.constants = centered, dims, eps, dropout, input.dtype, residual.dtype
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, stats, seed = ctx.saved_tensors
        found = _add_norm_gradients(
            ctx.constants, dy, d_sum, total, stats, weight, seed, ctx.needs_input_grad,
            _fits(dy, d_sum, total, stats, weight),
        )  # fmt: skip
        return (*found, *[None] * 5)


def _add_norm_gradients(
    constants: tuple[Any, ...],
    dy: Tensor | None,
    d_sum: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    wants: tuple[bool, ...],
    takes_kernel: bool = True,
) -> tuple[Tensor | None, ...]:
    """Gradients of input, residual, weight, bias."""
    centered, dims, eps, dropout, input_dtype, residual_dtype = constants
    if dy is None:
        dy = torch.zeros_like(total)
    dx, d_input, d_weight, d_bias = _gradients(
        centered, dy, d_sum, total, stats, weight, dims, eps, dropout, seed, wants[0] or wants[1], wants[2], wants[3],
        takes_kernel,
    )  # fmt: skip
    return (
        d_input.to(input_dtype) if wants[0] and d_input is not None else None,
        dx.to(residual_dtype) if wants[1] and dx is not None else None,
        d_weight,
        d_bias,
    )


def _gradients(
    centered: bool,
    dy: Tensor,
    d_sum: Tensor | None,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    dropout: float,
    seed: Tensor | None,
    wants_input: bool,
    wants_weight: bool,
    wants_bias: bool,
    takes_kernel: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Computed by the kernel, or by torch ops for double backward."""
    if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or not takes_kernel):
        found = _reference_gradients(centered, dy, d_sum, input, weight, dims, eps, dropout, seed)
    else:
        found = _norm_backward(
            centered, dy, d_sum, input, stats, weight, dims, dropout, seed, wants_input, wants_weight, wants_bias
        )
        if seed is None:
            found = (found[0], found[0], *found[2:])
    dx, d_input, d_weight, d_bias = found
    return (
        dx if wants_input else None,
        d_input if wants_input else None,
        d_weight if wants_weight else None,
        d_bias if wants_bias else None,
    )


def _fits(dy: Tensor | None, d_sum: Tensor | None, input: Tensor, stats: Tensor, weight: Tensor | None) -> bool:
    """Whether an eager backward may use the kernel: hooks on saved tensors may have replaced them."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        innermost_transform() is None
        and all(t is None or is_plain(t) for t in (dy, d_sum, input, stats, weight))
        and stats.dtype == wide
        and all(t is None or t.dtype == input.dtype for t in (dy, d_sum))
    )


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout in (torch.strided, torch.jagged) else gradient.to_dense()


def _reference_gradients(
    centered: bool,
    dy: Tensor,
    d_sum: Tensor | None,
    input: Tensor,
    weight: Tensor | None,
    dims: int,
    eps: float,
    dropout: float,
    seed: Tensor | int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computed by differentiable torch ops; also used by the C++ node."""
    dy, d_sum = _dense(dy), None if d_sum is None else _dense(d_sum)
    for name, tensor in (("dy", dy), ("d_sum", d_sum), ("input", input), ("weight", weight)):
        check_memory("norm_backward", name, tensor)
    alive = survival(input, dropout, seed) if dropout > 0.0 and seed is not None else None
    return norm_backward_reference(centered, dy, d_sum, input, weight, dims, eps, alive)


# The callers have already checked for transforms.
_apply_norm, _apply_add_norm = apply_without_transforms(_Norm), apply_without_transforms(_AddNorm)


if node is not None and extension is not None:
    node.connect(extension.__file__, _reference_gradients)


# --- for traced graphs ---


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    centered, input, weight, _, dims, eps = inputs
    ctx.save_for_backward(input, weight, output[1])
    ctx.constants = centered, dims, eps
    ctx.mark_non_differentiable(output[1])


def _norm_vjp(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    centered, dims, eps = ctx.constants
    input, weight, stats = ctx.saved_tensors
    wants = ctx.needs_input_grad
    dx, _, d_weight, d_bias = _gradients(
        centered, dy, None, input, stats, weight, dims, eps, 0.0, None, wants[1], wants[2], wants[3]
    )
    return None, dx, d_weight, d_bias, None, None


def _save_add_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    centered, input, residual, weight, _, dims, eps, dropout, seed = inputs
    ctx.save_for_backward(output[1], weight, output[2], seed)
    ctx.constants = centered, dims, eps, dropout, input.dtype, residual.dtype
    ctx.mark_non_differentiable(output[2])


def _add_norm_vjp(ctx: Any, dy: Tensor | None, d_sum: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight, stats, seed = ctx.saved_tensors
    found = _add_norm_gradients(ctx.constants, dy, d_sum, total, stats, weight, seed, ctx.needs_input_grad[1:5])
    return (None, *found, None, None, None, None)


torch.library.register_autograd("lightning_optkit::norm", _norm_vjp, setup_context=_save_norm)
torch.library.register_autograd("lightning_optkit::add_norm", _add_norm_vjp, setup_context=_save_add_norm)
