# SPDX-License-Identifier: Apache-2.0
"""Lion: the sign of an interpolated momentum; in one pass.

Source: Chen et al. 2023, arXiv:2302.06675, Algorithm 2.
"""

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_betas
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["Lion", "lion_update"]


def lion_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Lion subtracts from `param`, as in csrc/rules/lion.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    mixed = state["exp_avg"] * beta1 + (1 - beta1) * grad  # c_t
    state["exp_avg"].mul_(beta2).add_((1 - beta2) * grad)  # m_t
    sign = mixed.sign().where(~mixed.isnan(), mixed)  # torch's sign of NaN is 0
    update: Tensor = sign * float(group["lr"])
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return {"beta1": float(beta1), "beta2": float(beta2)}


_RULE = Rule("lion", (StateSpec("exp_avg"),), _hyperparameters, lion_update)


class Lion(OnePassOptimizer):
    """Lion, with decoupled decay and every stage of the one-pass step. Its rate is 3-10 times smaller than AdamW's.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Length of every update per element, in [0, inf), or a 1-element tensor.
        betas: Weight of the momentum inside the sign, and decay rate of the momentum, each in [0, 1).
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 4 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Lion([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
            fused=fused,
            decoupled_weight_decay=True,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _check_group(self, group: Group) -> None:
        check_betas(self._owner, group["betas"])
