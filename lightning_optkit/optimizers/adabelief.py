# SPDX-License-Identifier: Apache-2.0
"""AdaBelief: Adam that divides by the deviation of the gradient from its own average; in one pass.

Source: Zhuang et al. 2020, "AdaBelief optimizer: adapting stepsizes by the belief in observed gradients",
arXiv:2010.07468, Algorithm 2. Like the authors' package adabelief_pytorch with `rectify=False`, it also adds `eps` to
the root.
"""

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_betas, check_number
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["AdaBelief", "adabelief_update"]


def adabelief_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount AdaBelief subtracts from `param`, as in csrc/rules/adabelief.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    eps = float(group["eps"])
    exp_avg = state["exp_avg"].lerp_(grad, float(1 - beta1))  # m_t
    surprise = grad - exp_avg
    state["exp_avg_var"].mul_(beta2).add_((1 - beta2) * surprise * surprise).add_(eps)  # s_t
    denom = state["exp_avg_var"].sqrt() / (1 - beta2**step) ** 0.5 + eps
    update: Tensor = exp_avg * (float(group["lr"]) / (1 - beta1**step)) / denom
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return {"beta1": float(beta1), "beta2": float(beta2), "eps": float(group["eps"])}


_RULE = Rule(
    "adabelief",
    (StateSpec("exp_avg"), StateSpec("exp_avg_var", nonnegative=True)),
    _hyperparameters,
    adabelief_update,
)


class AdaBelief(OnePassOptimizer):
    """AdaBelief, with decoupled decay and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the average and of the squared deviation from it, each in [0, 1).
        eps: Added to the squared deviation in every step, and to its root; in [0, inf). It is an addend of a square, so
            it is the square of Adam's.
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 8 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdaBelief([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()  # by lr / beta1: the gradient differs by that share from its first average
        >>> weight.data
        tensor([0.8889, 1.1111])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
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
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
