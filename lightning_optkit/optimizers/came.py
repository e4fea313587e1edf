# SPDX-License-Identifier: Apache-2.0
"""CAME: Adafactor with momentum, where a step is smaller the less its momentum agrees with the newest update.

Source: Luo et al. 2023, "CAME: Confidence-guided Adaptive Memory Efficient Optimization", arXiv:2307.02047, Algorithm
2. Means replace sums, and eps[1] is added to the squared residuals of matrices only, as in the authors' code.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit._norms import norm
from lightning_optkit.optimizers._factored_moment import shape_by_column, shape_by_element, shape_by_row
from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_number, pair, several, with_real_params
from lightning_optkit.step.rule import Group, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["CAME", "came_update"]


def came_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount CAME subtracts from `param`. Updates `state` in place."""
    if param.numel() == 0:
        return torch.zeros_like(param)
    beta1, beta2, beta3 = (float(beta) for beta in group["betas"])
    eps1, eps2 = (float(eps) for eps in group["eps"])
    squares, is_matrix = grad * grad + eps1, grad.ndim > 1
    if is_matrix:
        update = _inverse_root(squares, state["row_var"], state["col_var"], 1 - beta2) * grad
    else:
        update = grad / state["variance"].lerp_(squares, 1 - beta2).sqrt()
    rms = float(norm(update)) / math.sqrt(update.numel())
    update /= max(1.0, rms / float(group["clip_threshold"]))
    average: Tensor = state["exp_avg"].lerp_(update, 1 - beta1)
    if not is_matrix:
        return average * float(group["lr"])
    residual = (update - average).square_() + eps2
    return (
        _inverse_root(residual, state["row_residual"], state["col_residual"], 1 - beta3) * average * float(group["lr"])
    )


def _inverse_root(squares: Tensor, rows: Tensor, columns: Tensor, share: float) -> Tensor:
    """1 / sqrt(row means times column means, over the mean), of the averages after `squares` enter them."""
    rows.lerp_(squares.mean(-1, keepdim=True), share)
    columns.lerp_(squares.mean(-2, keepdim=True), share)
    return (rows / rows.mean(-2, keepdim=True)).rsqrt() * columns.rsqrt()


_RULE = Rule(
    "came",
    (
        StateSpec("exp_avg"),
        StateSpec("variance", nonnegative=True, shape=shape_by_element),
        StateSpec("row_var", nonnegative=True, full_precision=True, shape=shape_by_row),
        StateSpec("col_var", nonnegative=True, full_precision=True, shape=shape_by_column),
        StateSpec("row_residual", nonnegative=True, full_precision=True, shape=shape_by_row),
        StateSpec("col_residual", nonnegative=True, full_precision=True, shape=shape_by_column),
    ),
    lambda group: {},
    came_update,
    needs_whole="factor the second moment",
    num_rereads=1,  # the gradient, for the second moment and for the update
)


class CAME(OnePassOptimizer):
    """CAME, with decoupled decay and every stage of the one-pass step; it runs in PyTorch.

    A parameter of two dimensions or more has its second moment and its squared residuals per row and column of its last
    two dimensions; any other has a second moment per element and no confidence.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`; all real.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the momentum, of the squares and of the squared residuals, each in [0, 1).
        eps: Added to the squared gradients and to the squared residuals, each in (0, inf).
        clip_threshold: Largest RMS of an update before momentum, in (0, inf].
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        maximize: Ascend.
        fused: No effect: the rule is not compiled.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, a complex one, or two devices.

    Cost: 4 bytes of state per element, 8 per row and column of a matrix (a vector: 8 per element).

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = CAME([weight], lr=0.1, betas=(0.0, 0.9, 0.9))
        >>> weight.grad = torch.full((2, 3), 5.0)
        >>> optimizer.step()
        >>> [tuple(optimizer.state[weight][name].shape) for name in ("exp_avg", "row_var", "col_residual")]
        [(2, 3), (2, 1), (1, 3)]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            clip_threshold=clip_threshold,
            weight_decay=weight_decay,
            maximize=maximize,
            fused=fused,
            decoupled_weight_decay=True,
        )
        super().__init__(params, defaults, **stages)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; nothing is changed if it does not fit."""
        super().add_param_group(with_real_params(self._owner, param_group))

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        return "fused=False" if group["fused"] is False else "no kernel for two factored averages"

    def _check_group(self, group: Group) -> None:
        for place, beta in enumerate(several(self._owner, "betas", group["betas"], 3)):
            check_number(self._owner, f"betas[{place}]", beta, "[0, 1)")
        for place, eps in enumerate(pair(self._owner, "eps", group["eps"])):
            check_number(self._owner, f"eps[{place}]", eps, "(0, inf)")
        check_number(self._owner, "clip_threshold", group["clip_threshold"], "(0, inf]")
