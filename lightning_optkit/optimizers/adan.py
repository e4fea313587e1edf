# SPDX-License-Identifier: Apache-2.0
"""Adan: Adam with Nesterov's momentum written in differences of gradients; in one pass.

Source: Xie et al. 2022, arXiv:2208.06677, Algorithm 1, without its restarts. Differs from it as the authors'
implementation does: a beta is the weight of the old value (1 - the paper's beta), and all three moments are
bias-corrected.
"""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import check_one_of
from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_number, several
from lightning_optkit.step.caution import cautious_update
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec, decay_per_rate
from lightning_optkit.step.stages import Stages

__all__ = ["Adan", "adan_update"]


def adan_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Adan subtracts from `param`, as in csrc/rules/adan.h. Updates `state` in place."""
    beta1, beta2, beta3 = group["betas"]
    lr = float(group["lr"])
    diff = torch.zeros_like(grad) if step == 1 else grad - state["previous_grad"]
    looking_ahead = grad + beta2 * diff
    state["exp_avg"].lerp_(grad, float(1 - beta1))  # m_k
    state["exp_avg_diff"].lerp_(diff, float(1 - beta2))  # v_k
    state["exp_avg_sq"].mul_(beta3).add_((1 - beta3) * looking_ahead * looking_ahead)  # n_k
    state["previous_grad"].copy_(grad)
    denom = state["exp_avg_sq"].sqrt() / (1 - beta3**step) ** 0.5 + group["eps"]
    moved: Tensor = state["exp_avg"] * (lr / (1 - beta1**step))
    moved = (moved + state["exp_avg_diff"] * (lr * beta2 / (1 - beta2**step))) / denom
    if group["caution"] and not group["no_prox"]:
        moved = cautious_update(moved, grad)
    decay = lr * _proximal_decay(group)
    return (moved + decay * param) / (1 + decay) if decay else moved


def _proximal_decay(group: Group) -> float:
    return 0.0 if group["no_prox"] else decay_per_rate(group)


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2, beta3 = group["betas"]
    return {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "beta3": float(beta3),
        "eps": float(group["eps"]),
        "proximal_decay": _proximal_decay(group),
    }


_RULE = Rule(
    "adan",
    (
        StateSpec("exp_avg"),
        StateSpec("exp_avg_diff"),
        StateSpec("exp_avg_sq", nonnegative=True),
        StateSpec("previous_grad"),
    ),
    _hyperparameters,
    adan_update,
    owns_decay=lambda group: not group["no_prox"],
)


class Adan(OnePassOptimizer):
    """Adan, with the arguments of the authors' implementation and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the gradient, of its difference and of their square, each in [0, 1).
        eps: Added to the denominator, in [0, inf).
        weight_decay: Strength of the decay, in [0, inf).
        no_prox: False: decay divides the moved parameter by `1 + lr * weight_decay`. True: it multiplies the old one by
            `1 - lr * weight_decay`, as in AdamW.
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices,
            or `cautious` without `no_prox`.

    Cost: 16 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adan([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
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
            no_prox=no_prox,
            decoupled_weight_decay=True,
            maximize=maximize,
            fused=fused,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _check_group(self, group: Group) -> None:
        betas = several(self._owner, "betas", group["betas"], 3)
        for place, beta in enumerate(betas):
            check_number(self._owner, f"betas[{place}]", beta, "[0, 1)")
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
        check_one_of(self._owner, "no_prox", group["no_prox"], (False, True))
        if group["cautious"] and not group["no_prox"]:
            raise ValueError(f"{self._owner}(cautious=True): needs no_prox=True; the proximal decay acts everywhere.")
