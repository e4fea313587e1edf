# SPDX-License-Identifier: Apache-2.0
"""SOAP: Adam in the slowly changing eigenbasis of Shampoo's preconditioner.

Source: Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321, Algorithms 3 and 4. As
in the authors' code, the first step only initializes the bases, and a basis is applied from the step after the one that
computed it. Differs from it: a parameter of more than two dimensions counts as one matrix [first, rest], and decay acts
on the old parameter, as in AdamW.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import check_int
from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_betas, check_number, with_real_params
from lightning_optkit.step.rule import Group, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["SOAP", "soap_update"]

_SIDES = (("row_statistics", "row_basis"), ("col_statistics", "col_basis"))


def soap_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount SOAP subtracts from `param`. Updates `state` in place."""
    if param.numel() == 0:
        return torch.zeros_like(param)
    beta1, beta2 = group["betas"]
    matrix = grad.reshape(grad.shape[0], -1) if _sides(state) else grad
    if step == 1:
        _update_statistics(matrix, state, group)
        for statistics, basis in _sides(state):
            state[basis].copy_(_eigenvectors(state[statistics]))
        return torch.zeros_like(grad)
    exp_avg_sq = state["exp_avg_sq"].reshape(matrix.shape)
    exp_avg = state["exp_avg"].lerp_(grad, float(1 - beta1)).reshape(matrix.shape)
    exp_avg_sq.lerp_(_rotated(matrix, state).square(), float(1 - beta2))
    updates = step - 1
    denom = exp_avg_sq.sqrt() / (1 - beta2**updates) ** 0.5 + float(group["eps"]) / (1 - beta2**updates) ** 0.5
    moved = _rotated_back(_rotated(exp_avg, state) / denom, state).reshape(grad.shape)
    _update_statistics(matrix, state, group)
    if updates % group["precondition_frequency"] == 0:
        _update_bases(exp_avg_sq, state)
    state["exp_avg_sq"].copy_(exp_avg_sq.reshape(grad.shape))
    update: Tensor = moved * (float(group["lr"]) / (1 - beta1**updates))
    return update


def _sides(state: State) -> list[tuple[str, str]]:
    """The names of the statistics and of the basis of each side that has them."""
    return [side for side in _SIDES if side[0] in state]


def _rotated(matrix: Tensor, state: State) -> Tensor:
    matrix = state["row_basis"].mT @ matrix if "row_basis" in state else matrix
    return matrix @ state["col_basis"] if "col_basis" in state else matrix


def _rotated_back(matrix: Tensor, state: State) -> Tensor:
    matrix = state["row_basis"] @ matrix if "row_basis" in state else matrix
    return matrix @ state["col_basis"].mT if "col_basis" in state else matrix


def _update_statistics(matrix: Tensor, state: State, group: Group) -> None:
    share = 1 - float(group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"])
    if "row_statistics" in state:
        state["row_statistics"].lerp_(matrix @ matrix.mT, share)  # L
    if "col_statistics" in state:
        state["col_statistics"].lerp_(matrix.mT @ matrix, share)  # R


def _eigenvectors(statistics: Tensor) -> Tensor:
    """In the order of falling eigenvalues; no rotation where a gradient was not finite."""
    if not bool(statistics.isfinite().all()):
        return torch.eye(len(statistics), dtype=statistics.dtype, device=statistics.device)
    vectors: Tensor = torch.linalg.eigh(statistics)[1]
    return vectors.flip(1)


def _update_bases(exp_avg_sq: Tensor, state: State) -> None:
    """One power iteration and a QR decomposition; the second moment follows the order of the basis."""
    for statistics, basis in _sides(state):
        product = state[statistics] @ state[basis]
        order = (state[basis] * product).sum(0).argsort(descending=True)
        exp_avg_sq.copy_(exp_avg_sq.index_select(int(basis == "col_basis"), order))
        state[basis].copy_(torch.linalg.qr(product.index_select(1, order))[0])


@cache
def _rule_of(largest: int) -> Rule:
    def of_rows(shape: torch.Size) -> torch.Size | None:
        return torch.Size((shape[0], shape[0])) if len(shape) > 1 and shape[0] <= largest else None

    def of_columns(shape: torch.Size) -> torch.Size | None:
        columns = shape[1:].numel()
        return torch.Size((columns, columns)) if len(shape) > 1 and columns <= largest else None

    matrices = [
        StateSpec(name, full_precision=True, shape=shape)
        for side, shape in zip(_SIDES, (of_rows, of_columns), strict=True)
        for name in side
    ]
    return Rule(
        "soap",
        (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True), *matrices),
        lambda group: {},
        soap_update,
        needs_whole="rotate it",
        num_rereads=2,  # the gradient, for the statistics
    )


class SOAP(OnePassOptimizer):
    """SOAP for matrices, Adam for vectors, with decoupled decay and every stage of the one-pass step; in PyTorch.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the two moments, each in [0, 1).
        shampoo_beta: Decay rate of the statistics of rows and columns, in [0, 1). None: `betas[1]`.
        eps: Added to the denominator, in [0, inf).
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        precondition_frequency: Steps between two updates of the bases, at least 1.
        max_precondition_dim: Largest side of a matrix that is rotated, at least 0; both sides larger: Adam.
        maximize: Ascend.
        fused: No effect: the rule is not compiled.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, a complex one, or two devices.

    Cost: 8 bytes of state per element, and 8 per element of both square matrices; six matrix products a step.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 3))
        >>> optimizer = SOAP([weight], lr=0.1)
        >>> weight.grad = torch.full((2, 3), 5.0)
        >>> optimizer.step()  # the first step initializes the bases
        >>> [tuple(optimizer.state[weight][name].shape) for name in ("exp_avg_sq", "row_basis", "col_basis")]
        [(2, 3), (2, 2), (3, 3)]
    """

    kept_entries = OnePassOptimizer.kept_entries | {"precondition_frequency", "max_precondition_dim"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            shampoo_beta=shampoo_beta,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precondition_dim=max_precondition_dim,
            maximize=maximize,
            fused=fused,
            decoupled_weight_decay=True,
        )
        super().__init__(params, defaults, **stages)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; nothing is changed if it does not fit."""
        super().add_param_group(with_real_params(self._owner, param_group))

    def _rule(self, group: Group) -> Rule:
        return _rule_of(group["max_precondition_dim"])

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        return "fused=False" if group["fused"] is False else "matrix products and decompositions"

    def _check_group(self, group: Group) -> None:
        check_betas(self._owner, group["betas"])
        if group["shampoo_beta"] is not None:
            check_number(self._owner, "shampoo_beta", group["shampoo_beta"], "[0, 1)")
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
        check_int(self._owner, "precondition_frequency", group["precondition_frequency"], minimum=1)
        check_int(self._owner, "max_precondition_dim", group["max_precondition_dim"], minimum=0)
