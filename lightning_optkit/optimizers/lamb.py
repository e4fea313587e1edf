# SPDX-License-Identifier: Apache-2.0
"""LAMB: Adam's direction, at a rate proportional to the norm of each layer's weights.

Source: You et al. 2020, "Large batch optimization for deep learning: training BERT in 76 minutes", arXiv:1904.00962,
Algorithm 2; `trust_clip`: LAMBC, Fong et al. 2020, "Improving Layer-wise Adaptive Rate Methods using Trust Ratio
Clipping", arXiv:2011.13584, in the form of timm's Lamb.
"""

import math

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import check_one_of
from lightning_optkit.step import OnePassOptimizer, Rule, TensorStatistics
from lightning_optkit.step.arguments import check_betas, check_number, pair
from lightning_optkit.step.caution import cautious_update
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["LAMB", "lamb_update"]


def lamb_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount LAMB subtracts from `param`, as in csrc/rules/lamb.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.lerp_(grad, float(1 - beta1))
    exp_avg_sq.mul_(beta2).add_((1 - beta2) * grad * grad)
    denom = exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step) + float(group["eps"])
    direction: Tensor = exp_avg / (1 - beta1**step) / denom
    if group["caution"]:
        direction = cautious_update(direction, grad)
    update: Tensor = float(group["lr"]) * (direction + float(group["weight_decay"]) * param)
    return update


def _trust_ratio(group: Group, sums: TensorStatistics) -> float:
    """phi(|x|) / |r + lambda x|."""
    least, most = group["norm_bounds"]
    phi = min(max(sums.param_norm, least), most)
    ratio = phi / sums.update_norm if group["adapt"] and phi > 0 and sums.update_norm > 0 else 1.0
    return min(ratio, 1.0) if group["trust_clip"] else ratio


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    min_norm, max_norm = group["norm_bounds"]
    return {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]),
        "adapt": float(group["adapt"]),
        "min_norm": float(min_norm),
        "max_norm": float(max_norm),
    }


_RULE = Rule(
    "lamb",
    (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True)),
    _hyperparameters,
    lamb_update,
    trust_ratio=_trust_ratio,
    owns_decay=lambda group: True,
)


class LAMB(OnePassOptimizer):
    """LAMB, for very large batches: every layer's update is `lr` times the norm of its weights.

    Biases and norms are usually excluded: put them into a group with `adapt=False` and `weight_decay=0`.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Length of the update relative to the weights, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the two moments, each in [0, 1).
        eps: Added to the denominator, in [0, inf).
        weight_decay: lambda, inside the norm; in [0, inf).
        adapt: Whether the rate depends on the norm of the layer; False: Adam with decoupled decay.
        norm_bounds: Bounds of phi: the norm of the weights is clamped to them.
        trust_clip: Bound the ratio of the norms by 1, so that no layer's rate exceeds `lr`: LAMBC. Runs in PyTorch.
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        cautious: Must be False: decay is part of the rule.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 8 bytes of state per parameter; two walks: one for the norms, one for the update.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LAMB([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.tensor([1.0, -1.0])
        >>> optimizer.step()  # by 0.1 times the norm of the weights, 5
        >>> weight.data
        tensor([2.6464, 4.3536])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt: bool = True,
        norm_bounds: tuple[float, float] = (0.0, math.inf),
        trust_clip: bool = False,
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
            norm_bounds=norm_bounds,
            adapt=adapt,
            trust_clip=trust_clip,
            maximize=maximize,
            fused=fused,
            decoupled_weight_decay=False,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _completed(self, saved: Group, group: Group) -> Group:
        """A checkpoint from before `trust_clip` lacks it."""
        return {"trust_clip": group["trust_clip"], **super()._completed(saved, group)}

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        if group["trust_clip"]:
            return "no kernel that clips the trust ratio"
        return super()._why_reference(param, group)

    def _check_group(self, group: Group) -> None:
        check_betas(self._owner, group["betas"])
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
        check_one_of(self._owner, "adapt", group["adapt"], (False, True))
        check_one_of(self._owner, "trust_clip", group["trust_clip"], (False, True))
        check_one_of(self._owner, "cautious", group["cautious"], (False,))
        least, most = pair(self._owner, "norm_bounds", group["norm_bounds"])
        check_number(self._owner, "norm_bounds[0]", least, "[0, inf)")
        check_number(self._owner, "norm_bounds[1]", most, "(0, inf]")
        if not least < most:
            raise ValueError(f"{self._owner}(norm_bounds={(least, most)}): norm_bounds must be 0 <= least < largest.")
