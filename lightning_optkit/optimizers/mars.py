# SPDX-License-Identifier: Apache-2.0
"""MARS: AdamW on gradients whose variance is reduced by the previous gradient.

Source: Yuan et al. 2024, "MARS: unleashing the power of variance reduction for training large models",
arXiv:2411.10438, MARS-AdamW with the gradient of the previous batch (the paper's MARS-approx). Before the first step
the previous gradient is zero, as in the authors' implementation, which it follows to 3e-14 over 200 steps in fp64.
pytorch_optimizer's MARS is 1e-5 from both (4e-3 where gradients are near its constants): it adds 1e-15 to v_t, and
`eps` before the bias correction of its root.
"""

import math

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_betas, check_number
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["MARS", "mars_update"]


def mars_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount MARS subtracts from `param`, as in csrc/rules/mars.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    corrected = grad + float(group["gamma"]) * beta1 / (1 - beta1) * (grad - state["previous_grad"])
    norm, bound = math.sqrt(float(corrected.double().square().sum())), float(group["max_corrected_norm"])
    corrected = corrected * (bound / norm if norm > bound else 1.0)  # c_t
    state["previous_grad"].copy_(grad)
    state["exp_avg"].lerp_(corrected, float(1 - beta1))  # m_t
    state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * corrected * corrected)  # v_t
    denom = state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5 + float(group["eps"])
    update: Tensor = state["exp_avg"] * (float(group["lr"]) / (1 - beta1**step)) / denom
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "gamma": float(group["gamma"]),
        "max_corrected_norm": float(group["max_corrected_norm"]),
    }


_RULE = Rule(
    "mars",
    (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True), StateSpec("previous_grad")),
    _hyperparameters,
    mars_update,
    needs_whole="bound the norm of the corrected gradient",
    num_rereads=2,  # both gradients, for that norm
)


class MARS(OnePassOptimizer):
    """MARS-AdamW, with decoupled decay and every stage of the one-pass step.

    The authors train vectors (biases, norms) by AdamW at another rate: put them into a group with `gamma=0` and
    `max_corrected_norm=inf`, which is AdamW.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the denominator, in [0, inf).
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        gamma: Strength of the correction: `gamma * betas[0] / (1 - betas[0])` times the change of the gradient is added
            to it; in [0, inf).
        max_corrected_norm: Largest norm of one tensor's corrected gradient, in (0, inf].
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 12 bytes of state per parameter; two walks: one for the norms, one for the update.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = MARS([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        max_corrected_norm: float = 1.0,
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
            gamma=gamma,
            max_corrected_norm=max_corrected_norm,
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
        check_number(self._owner, "gamma", group["gamma"], "[0, inf)")
        check_number(self._owner, "max_corrected_norm", group["max_corrected_norm"], "(0, inf]")
