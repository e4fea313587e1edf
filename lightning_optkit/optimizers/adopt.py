# SPDX-License-Identifier: Apache-2.0
"""ADOPT: Adam that divides by the second moment of the previous steps, before it averages; in one pass.

Source: Taniguchi et al. 2024, arXiv:2411.02853v3, Algorithm 2, with its clipping. The first step only fills the second
moment (the paper's v_0) and updates no parameter.
"""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_betas, check_number
from lightning_optkit.step.caution import cautious_update
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec, decay_per_rate
from lightning_optkit.step.stages import Stages

__all__ = ["ADOPT", "adopt_update"]


def adopt_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount ADOPT subtracts from `param`, as in csrc/rules/adopt.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    if step == 1:
        state["exp_avg_sq"].copy_(grad * grad)  # v_0
        return torch.zeros_like(grad)
    normed = grad / state["exp_avg_sq"].sqrt().clamp(min=group["eps"])
    if group["clip_exponent"] is not None:
        bound = (step - 1) ** group["clip_exponent"]
        normed = normed.clamp(-bound, bound)
    state["exp_avg"].lerp_(normed, float(1 - beta1))  # m_t
    state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad * grad)  # v_t
    moved: Tensor = state["exp_avg"] * float(group["lr"])
    if group["caution"] and group["decoupled_weight_decay"]:
        moved = cautious_update(moved, grad)
    decay = float(group["lr"]) * _decay(group)
    if decay == 0:
        return moved
    decayed = moved + decay * param
    return torch.where(moved * param < 0, moved, decayed) if group["cautious"] else decayed


def _decay(group: Group) -> float:
    return decay_per_rate(group) if group["decoupled_weight_decay"] else 0.0


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    clip_exponent = -1.0 if group["clip_exponent"] is None else float(group["clip_exponent"])
    return {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "clip_exponent": clip_exponent,
        "decay": _decay(group),
        "cautious": float(group["cautious"]),
    }


_RULE = Rule(
    "adopt",
    (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True)),
    _hyperparameters,
    adopt_update,
    owns_decay=lambda group: bool(group["decoupled_weight_decay"]),  # a stage would decay in the first step too
)


class ADOPT(OnePassOptimizer):
    """ADOPT, which converges with any `betas[1]`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Lower bound of the denominator, in [0, inf).
        clip_exponent: The normalized gradient of step t is clipped to +-t**clip_exponent, with t = 1 for the first
            update; in [0, inf). None: no clipping, as in the paper's Algorithm 1.
        weight_decay: Strength of the decay, in [0, inf).
        decouple: False: decay is L2, added to the gradient. True: it acts on the parameter, times `lr`, as in AdamW.
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 8 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = ADOPT([weight], lr=0.1)
        >>> for _ in range(2):
        ...     weight.grad = torch.tensor([2.0, -3.0])
        ...     optimizer.step()
        >>> weight.data
        tensor([0.9900, 1.0100])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_exponent: float | None = 0.25,
        weight_decay: float = 0.0,
        decouple: bool = False,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            clip_exponent=clip_exponent,
            weight_decay=weight_decay,
            decoupled_weight_decay=decouple,
            maximize=maximize,
            fused=fused,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    _decay_flag = "decouple"

    def _check_group(self, group: Group) -> None:
        check_betas(self._owner, group["betas"])
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
        if group["clip_exponent"] is not None:
            check_number(self._owner, "clip_exponent", group["clip_exponent"], "[0, inf)")
