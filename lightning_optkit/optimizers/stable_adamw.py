# SPDX-License-Identifier: Apache-2.0
"""StableAdamW: AdamW whose rate falls for a tensor whose gradient is larger than its second moment knows.

Source: Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language models",
arXiv:2304.13013, Algorithm 2. The bias is corrected in the decay rates, so `eps` is added to the corrected root; decay
has the same rate as the update.
"""

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_betas, check_number
from lightning_optkit.step.caution import cautious_update
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec, decay_per_rate
from lightning_optkit.step.stages import Stages

__all__ = ["StableAdamW", "stable_adamw_update"]


def stable_adamw_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount StableAdamW subtracts from `param`, as in csrc/rules/stable_adamw.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    eps, share = float(group["eps"]), (1 - beta2) / (1 - beta2**step)
    state["exp_avg"].lerp_(grad, float((1 - beta1) / (1 - beta1**step)))  # v_t
    exp_avg_sq = state["exp_avg_sq"].mul_(1 - share).add_(share * grad * grad)  # u_t
    root = exp_avg_sq.sqrt()
    squares = (grad / root.clamp(min=eps)).double().square().sum()
    rms = math.sqrt(float(squares) / max(1, grad.numel()))
    lr = float(group["lr"]) / rms if rms > 1 else float(group["lr"])
    moved: Tensor = state["exp_avg"] / (root + eps) * lr
    if group["caution"]:
        moved = cautious_update(moved, grad)
    decay = lr * decay_per_rate(group)
    if decay == 0:
        return moved
    decayed = moved + decay * param
    return torch.where(moved * param < 0, moved, decayed) if group["cautious"] else decayed


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "decay": decay_per_rate(group),
        "cautious": float(group["cautious"]),
    }


_RULE = Rule(
    "stable_adamw",
    (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True)),
    _hyperparameters,
    stable_adamw_update,
    needs_whole="set the rate by the gradient's root mean square",
    num_rereads=2,  # the gradient and its second moment, for the root mean square
    owns_decay=lambda group: True,  # at the rate of the tensor
)


class StableAdamW(OnePassOptimizer):
    """StableAdamW: AdamW with the update clipping of Adafactor, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor; of each tensor it is divided by the root mean square of
            the gradient over the root of its second moment, where that is above 1.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the denominator, and its lower bound in the root mean square; in (0, inf).
        weight_decay: Share of each parameter removed per step, times the rate of the tensor; in [0, inf).
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 8 bytes of state per parameter; two walks: one for the root mean square, one for the update.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = StableAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> for size in (1.0, 100.0):  # a gradient that came out of nothing
        ...     weight.grad = torch.full((2,), size)
        ...     optimizer.step()
        >>> weight.data
        tensor([-0.1531, -0.1531])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
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
        check_number(self._owner, "eps", group["eps"], "(0, inf)")
