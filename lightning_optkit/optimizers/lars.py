# SPDX-License-Identifier: Apache-2.0
"""LARS: SGD with momentum, at a rate proportional to the weight-to-gradient ratio of each layer.

Source: You et al. 2017, "Large batch training of convolutional networks", arXiv:1708.03888, Algorithm 1; `trust_clip`:
`apex.parallel.LARC(clip=True)`, in the form of timm's Lars.
"""

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import check_one_of
from lightning_optkit.step import OnePassOptimizer, Rule, TensorStatistics
from lightning_optkit.step.arguments import check_number
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["LARS", "lars_update"]


def lars_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount LARS subtracts from `param`, as in csrc/rules/lars.h. Updates `state` in place."""
    buffer = state["momentum_buffer"]
    direction = grad + float(group["weight_decay"]) * param
    lr = float(group["lr"])
    # A ratio of norms may exceed the range of fp32: a power of two is then factored out.
    scale = 2.0**64 if lr > 2.0**64 else 2.0**-64 if 0 < lr < 2.0**-64 else 1.0
    buffer.mul_(float(group["momentum"])).add_(lr / scale * (direction * scale))
    return buffer.clone()


def _trust_ratio(group: Group, sums: TensorStatistics) -> float:
    """Eta |w| / (|g| + beta |w|)."""
    if not group["adapt"] or sums.param_norm == 0 or sums.grad_norm == 0:
        return _at_most(1.0, float(group["lr"])) if group["adapt"] and group["trust_clip"] else 1.0
    denominator = sums.grad_norm + float(group["weight_decay"]) * sums.param_norm + float(group["eps"])
    ratio = float(group["trust_coefficient"]) * sums.param_norm / denominator
    return _at_most(ratio, float(group["lr"])) if group["trust_clip"] else ratio


def _at_most(ratio: float, lr: float) -> float:
    """The factor of `lr` for the smaller one of the two rates."""
    return min(ratio / lr, 1.0) if lr > 0 else 1.0


def _hyperparameters(group: Group) -> Hyperparameters:
    return {name: float(group[name]) for name in ("momentum", "weight_decay", "adapt", "trust_coefficient", "eps")}


_RULE = Rule(
    "lars",
    (StateSpec("momentum_buffer"),),
    _hyperparameters,
    lars_update,
    trust_ratio=_trust_ratio,
    trust_ratio_of_update=False,
    owns_decay=lambda group: True,
)


class LARS(OnePassOptimizer):
    """LARS, for very large batches: every layer's rate is proportional to |weights| / |gradient|.

    The rate is part of the momentum buffer, as in the paper, so a change of `lr` affects only later gradients. Biases
    and norms are usually excluded: put them into a group with `adapt=False` and `weight_decay=0`.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Global rate, in [0, inf), or a 1-element tensor.
        momentum: Decay rate of the momentum buffer, in [0, 1).
        weight_decay: L2 coefficient beta, added to the gradient and to the denominator; in [0, inf).
        trust_coefficient: eta, the factor of the ratio of norms, in (0, inf).
        eps: Added to the denominator, in [0, inf).
        adapt: Whether the rate depends on the norms; False: SGD with momentum.
        trust_clip: Take the smaller one of the layer's own rate and `lr`, instead of their product: LARC. Runs in
            PyTorch.
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        cautious: Must be False: decay is part of the rule.
        caution: Must be False: decay is part of the momentum.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 4 bytes of state per parameter; two walks: one for the norms, one for the update.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = LARS([weight], lr=1.0, trust_coefficient=0.1)
        >>> weight.grad = torch.tensor([100.0, 0.0])
        >>> optimizer.step()  # by 0.1 times the norm of the weights, 5
        >>> weight.data
        tensor([2.5000, 4.0000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        adapt: bool = True,
        trust_clip: bool = False,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
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
        check_number(self._owner, "momentum", group["momentum"], "[0, 1)")
        check_number(self._owner, "trust_coefficient", group["trust_coefficient"], "(0, inf)")
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
        check_one_of(self._owner, "adapt", group["adapt"], (False, True))
        check_one_of(self._owner, "trust_clip", group["trust_clip"], (False, True))
        check_one_of(self._owner, "cautious", group["cautious"], (False,))
        if group["caution"]:
            raise ValueError(f"{self._owner}(caution=True): must be False; decay is part of the momentum.")
