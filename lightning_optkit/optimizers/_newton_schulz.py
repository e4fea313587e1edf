# SPDX-License-Identifier: Apache-2.0
"""The matrix half of Muon: orthogonalized momentum, for all matrices of one shape at once.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
kellerjordan.github.io/posts/muon.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lightning_optkit._torch_private import has_bf16_products
from lightning_optkit.optimizers._muon_variants import normalized, orthogonalized_from
from lightning_optkit.optimizers._newton_schulz_coefficients import Coefficients, Triple, coefficients_per_step
from lightning_optkit.step.gradient_reference import clip_reference, dense
from lightning_optkit.step.lockstep import alone
from lightning_optkit.step.numbers import GroupNumbers, compute_dtype
from lightning_optkit.step.reference_segment import ReferenceSegment
from lightning_optkit.step.rule import Group, Rule, State
from lightning_optkit.step.segments import Bound
from lightning_optkit.step.split_weights import joined
from lightning_optkit.step.statistics import Clipped

__all__ = ["MatrixSegment", "is_stack", "muon_update", "orthogonalize"]


_Iteration = tuple[tuple[Triple, ...], int, float]
_Members = list[Bound]

# Elements per batch: a larger batch gains nothing, and its intermediates no longer fit a cache.
_BATCH = 2**19


def orthogonalize(matrices: Tensor, coefficients: Coefficients | tuple[Triple, ...], steps: int, eps: float) -> Tensor:
    """Quintic Newton-Schulz iterations in bf16: singular values converge toward 1, singular vectors are kept.

    A CPU without bf16 products computes the same in fp32 and rounds to bf16; where torch rounds more than once per
    product, last bits differ.

    Args:
        matrices: [count, rows, columns].
        coefficients: Coefficients of X, (X X^T) X and (X X^T)^2 X, for all iterations or one triple for each.
        steps: Iterations.
        eps: Lower bound of the Frobenius norm that a matrix is divided by.

    Returns:
        [count, rows, columns], bf16 or bf16 values in fp32.
    """
    is_tall = matrices.size(1) > matrices.size(2)
    is_wide_held = matrices.device.type == "cpu" and not has_bf16_products()

    def rounded(t: Tensor) -> Tensor:
        return t.bfloat16().float() if is_wide_held else t

    x = rounded(matrices) if is_wide_held else matrices.bfloat16()
    if not x.numel():
        return x  # no largest element to scale by
    x = x.mT if is_tall else x
    # Above this bound the squares would overflow; the factor is a power of two, so nothing else changes.
    x = x * torch.where(x.abs().amax((1, 2), keepdim=True) > 2.0**48, 2.0**-64, 1.0).to(x.dtype)
    norms = rounded(torch.stack([matrix.norm() for matrix in x]))
    x = rounded(x / norms.clamp(min=eps).view(-1, 1, 1))
    # A single matrix uses the products of torch.optim.Muon; batched products may sum in another order.
    is_alone = len(x) == 1
    x = x[0] if is_alone else x
    product = torch.addmm if is_alone else torch.baddbmm
    for a, b, c in coefficients_per_step(coefficients, steps):
        gram = rounded(x @ x.mT)
        x = rounded(product(x, rounded(product(gram, gram, gram, beta=b, alpha=c)), x, beta=a))
    x = x[None] if is_alone else x
    return x.mT if is_tall else x


def muon_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Muon subtracts from the matrix `param`. Updates `state` in place."""
    direction = _look_ahead(grad, state["momentum_buffer"], group)
    return _finished(_in_parts(_as_matrices(direction, group), _iteration(group)), grad, state, group)


def _look_ahead(grad: Tensor, buffer: Tensor, group: Group) -> Tensor:
    """Updates the momentum, and returns the matrix to orthogonalize."""
    buffer.lerp_(grad, 1 - group["momentum"])
    momentum = grad.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
    return orthogonalized_from(momentum, group)


def is_stack(t: Tensor, group: Group) -> bool:
    """Whether `t` is a stack of matrices instead of one."""
    return t.ndim == 3 and bool(group["stacked"])


def _as_matrices(t: Tensor, group: Group) -> Tensor:
    """[count, rows, columns]; a tensor that is no stack is one matrix, that of a convolution [out, in * kernel]."""
    return t if is_stack(t, group) else t.flatten(1)[None]


def _in_parts(matrices: Tensor, iteration: _Iteration) -> Tensor:
    """Orthogonalizes a few matrices at a time."""
    parts = torch.split(matrices, max(1, _BATCH // max(1, matrices[0].numel()))) if len(matrices) > 1 else (matrices,)
    made = [orthogonalize(part, *iteration) for part in parts]
    return made[0] if len(made) == 1 else torch.cat(made)


def _iteration(group: Group) -> _Iteration:
    steps = group["ns_steps"]
    return coefficients_per_step(group["ns_coefficients"], steps), steps, float(group["eps"])


def _finished(orthogonal: Tensor, like: Tensor, state: State, group: Group) -> Tensor:
    """The amount to subtract; updates the second moments of a variant."""
    rows, columns = orthogonal.shape[1:]
    matrices = normalized(orthogonal.to(like.dtype), state, group)
    if group["adjust_lr_fn"] == "match_rms_adamw" or group["variant"] == "adamuon":
        ratio = 0.2 * math.sqrt(max(rows, columns))
    else:
        ratio = math.sqrt(max(1, rows / columns)) if columns else 1.0
    return matrices.reshape(like.shape).mul(float(group["lr"]) * ratio)


def _hand_over(
    orthogonal: Tensor, buffer: Tensor, param: Tensor, grad: Tensor, state: State, group: Group, step: float
) -> Tensor:
    """Returns the result of `muon_update`, given the part of it that was computed in advance."""
    state["momentum_buffer"].copy_(buffer)
    return _finished(orthogonal, buffer, state, group)


class MatrixSegment(ReferenceSegment):
    """Matrices: the iterations run on all matrices of one shape together, the stages on one after another."""

    def step(
        self, groups: Sequence[Group], numbers: Sequence[GroupNumbers], grad_scale: float, statistics: bool
    ) -> Clipped:
        """Updates the bound parameters."""
        self.check()
        alike: dict[tuple[torch.Size, torch.dtype, _Iteration], _Members] = {}
        for bound in self._bound:
            param, group = bound.entry.param, groups[bound.entry.group_index]
            key = (_as_matrices(param, group).shape, compute_dtype(param), _iteration(group))
            alike.setdefault(key, []).append(bound)
        updates = (
            update
            for (shape, _work, iteration), members in alike.items()
            for batch in _batches(members, shape.numel())
            for update in self._orthogonalized(batch, iteration, groups, numbers, grad_scale)
        )
        return self._step_each(updates, groups, numbers, grad_scale, statistics)

    def _orthogonalized(
        self,
        batch: _Members,
        iteration: _Iteration,
        groups: Sequence[Group],
        numbers: Sequence[GroupNumbers],
        grad_scale: float,
    ) -> Iterator[tuple[Rule, Bound]]:
        """For each matrix of one shape: a rule that returns its precomputed update, and the bound entry."""
        buffers, directions = [], []
        for entry, state, grad in batch:
            group, stage = groups[entry.group_index], numbers[entry.group_index]
            work = compute_dtype(entry.param)
            param = joined(entry.param.detach(), state).to(work)
            g, _ = alone(clip_reference(dense(grad).to(work), param, grad_scale, stage, is_vector=False))
            buffers.append(state["momentum_buffer"].to(work))
            directions.append(_as_matrices(_look_ahead(g, buffers[-1], group), group))
        together = torch.cat(directions) if len(directions) > 1 else directions[0]
        made = torch.split(_in_parts(together, iteration), [len(direction) for direction in directions])
        for bound, buffer, orthogonal in zip(batch, buffers, made, strict=True):
            yield replace(self.rule, update=partial(_hand_over, orthogonal, buffer)), bound


def _batches(members: _Members, size: int) -> Iterator[_Members]:
    """Runs of `members`, of `size` elements each, that are computed together."""
    at_once = max(1, _BATCH // max(1, size))
    for begin in range(0, len(members), at_once):
        yield members[begin : begin + at_once]
