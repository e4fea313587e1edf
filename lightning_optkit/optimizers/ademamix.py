# SPDX-License-Identifier: Apache-2.0
"""AdEMAMix: Adam with a second, slow average of the gradients; in one pass.

Source: Pagliardini et al. 2024, arXiv:2409.03137, Algorithm 1, with the schedules of alpha and beta3 of its section 3.
"""

import math

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import check_int
from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_number, several
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["AdEMAMix", "ademamix_update"]


def ademamix_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount AdEMAMix subtracts from `param`, as in csrc/rules/ademamix.h. Updates `state` in place."""
    beta1, beta2, beta3 = group["betas"]
    lr, alpha = float(group["lr"]), group["alpha"]
    if group["alpha_warmup"] and step < group["alpha_warmup"]:
        alpha = alpha * step / group["alpha_warmup"]
    if group["beta3_warmup"] and step < group["beta3_warmup"]:
        share = step / group["beta3_warmup"]
        inverse_log = (1 - share) * _inverse_log(beta1) + share * _inverse_log(beta3)
        beta3 = min(beta3, math.exp(1 / inverse_log)) if inverse_log else beta3
    state["exp_avg"].lerp_(grad, float(1 - beta1))  # m1_t
    state["exp_avg_slow"].lerp_(grad, float(1 - beta3))  # m2_t
    state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad * grad)  # nu_t
    denom = state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5 + group["eps"]
    update: Tensor = (state["exp_avg"] * (lr / (1 - beta1**step)) + state["exp_avg_slow"] * (lr * alpha)) / denom
    return update


def _inverse_log(beta: float) -> float:
    return 1 / math.log(beta) if beta > 0 else 0.0


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2, beta3 = (float(beta) for beta in group["betas"])
    return {
        "beta1": beta1,
        "beta2": beta2,
        "beta3": beta3,
        "eps": float(group["eps"]),
        "alpha": float(group["alpha"]),
        "alpha_warmup": float(group["alpha_warmup"] or 0),
        "beta3_warmup": float(group["beta3_warmup"] or 0),
        "inverse_log_beta1": _inverse_log(beta1),
        "inverse_log_beta3": _inverse_log(beta3),
    }


_RULE = Rule(
    "ademamix",
    (StateSpec("exp_avg"), StateSpec("exp_avg_slow"), StateSpec("exp_avg_sq", nonnegative=True)),
    _hyperparameters,
    ademamix_update,
)


class AdEMAMix(OnePassOptimizer):
    """AdEMAMix, with decoupled decay and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the fast average, of the second moment and of the slow average, each in [0, 1).
        alpha: Weight of the slow average relative to the fast one, in [0, inf).
        beta3_warmup: Steps over which the slow average's decay rate grows from `betas[0]` to `betas[2]`, its half-life
            linearly; at least 1. None: no warmup. The paper uses the length of the run.
        alpha_warmup: Steps over which `alpha` grows linearly from 0; at least 1. None: no warmup. The paper uses the
            length of the run.
        eps: Added to the denominator, in [0, inf).
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 12 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdEMAMix([weight], lr=0.1, alpha_warmup=1000, beta3_warmup=1000)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])
    """

    kept_entries = OnePassOptimizer.kept_entries | {"beta3_warmup", "alpha_warmup"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: int | None = None,
        alpha_warmup: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            alpha=alpha,
            beta3_warmup=beta3_warmup,
            alpha_warmup=alpha_warmup,
            eps=eps,
            weight_decay=weight_decay,
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
        check_number(self._owner, "alpha", group["alpha"], "[0, inf)")
        for name in ("beta3_warmup", "alpha_warmup"):
            if group[name] is not None:
                check_int(self._owner, name, group[name], minimum=1)
