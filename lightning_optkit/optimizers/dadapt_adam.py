# SPDX-License-Identifier: Apache-2.0
"""DAdaptAdam: Adam that estimates its own rate by D-Adaptation.

Source: Defazio & Mishchenko 2023, "Learning-Rate-Free Learning by D-Adaptation", arXiv:2301.07733, the Adam version
(Algorithm 5), as in the authors' package dadaptation 3.2: the inner product of the estimate uses the second moment from
before the step. Unlike the package, the moments and both sums are updated at a rate of 0, every parameter has its own
step count for the bias correction, and there is no rate per layer.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack, override

from lightning_optkit._checks import check_one_of
from lightning_optkit.optimizers._estimated_rate import EstimatedRateOptimizer, adam_rate
from lightning_optkit.step import Rule
from lightning_optkit.step.arguments import check_betas, check_number
from lightning_optkit.step.rule import Estimate, Group, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["DAdaptAdam", "dadapt_adam_update"]

_LEARNED = ("d", "d_numerator")


def dadapt_adam_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount DAdaptAdam subtracts from `param`; `lr` includes the estimate. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    scaled = grad * float(group["lr"])
    state["exp_avg"].lerp_(scaled, float(1 - beta1))  # m_{k+1}
    state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * grad * grad)  # v_{k+1}
    state["s"].lerp_(scaled, 1 - _root(group))  # s_{k+1}
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + float(group["eps"]))


def _observe(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> tuple[float, float]:
    """<g_k, s_k> over the second moment, times the rate, and |s_{k+1}|_1."""
    lr = float(group["lr"]) * adam_rate(group, step)
    weighted = state["s"] / (state["exp_avg_sq"].sqrt() + float(group["eps"]))
    next_s = state["s"].lerp(grad * lr, 1 - _root(group))
    return lr * float((grad.double() * weighted.double()).sum()), float(next_s.double().abs().sum())


def _root(group: Group) -> float:
    return math.sqrt(group["betas"][1])


_RULE = Rule(
    "dadapt_adam",
    (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True), StateSpec("s")),
    lambda group: {},
    dadapt_adam_update,
    num_rereads=1,  # the gradient, for the estimate
    estimate=Estimate(lambda group: group["d"], adam_rate, _observe, observes_before=True),
)


class DAdaptAdam(EstimatedRateOptimizer):
    """Adam with D-Adaptation, with the arguments of the authors' package: leave `lr` at 1 and use a cosine schedule.

    The rate is `lr * d`. `d` estimates the distance from the initial parameters to the solution; it starts at `d0`,
    never falls, is shared by all groups, and can be read (but not set per group) as `param_groups[i]["d"]`, a 0-d
    tensor. Weight decay and `l1` are also multiplied by `lr * d`. The momentum contains the rate of each of its
    gradients. Runs in PyTorch. `Prodigy` is its successor by the same authors.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Factor of the estimate, in [0, inf), or a 1-element tensor; the same in every group, or 0: frozen.
        betas: Decay rates of the two moments, each in [0, 1); the square root of the second one is that of the sums for
            the estimate.
        eps: Added to the denominator, in (0, inf).
        weight_decay: Strength of the decay, in [0, inf).
        decouple: False: decay is L2, added to the gradient. True: it acts on the parameter, times `lr * d`.
        use_bias_correction: Correct the bias of the moments as Adam does, which lowers the rate in the first steps.
        d0: Initial estimate, in (0, inf).
        growth_rate: Largest growth of the estimate per step, in [1, inf].
        maximize: Ascend.
        fused: No effect: the rule is not compiled.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices; for groups with
            different settings of the estimate; at a step, if nonzero rates differ between groups.

    Cost: 12 bytes of state per parameter; two walks: one for the estimate, one for the update.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = DAdaptAdam([weight])
        >>> for _ in range(200):
        ...     weight.grad = weight.detach().clone()  # of half the square
        ...     optimizer.step()
        >>> f"the rate went from 0.000001 to {optimizer.param_groups[0]['d']:.1f}, the weights to {weight.norm():.3f}"
        'the rate went from 0.000001 to 9.8, the weights to 0.000'
    """

    kept_entries = EstimatedRateOptimizer.kept_entries | {*_LEARNED, "d0"}
    _learned = _LEARNED
    _decay_flag = "decouple"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = False,
        use_bias_correction: bool = False,
        d0: float = 1e-6,
        growth_rate: float = math.inf,
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
            decoupled_weight_decay=decouple,
            use_bias_correction=use_bias_correction,
            d0=d0,
            growth_rate=growth_rate,
            d=d0,
            d_numerator=0.0,
            maximize=maximize,
            fused=fused,
        )
        super().__init__(params, defaults, **stages)

    @override
    @torch.no_grad()
    def _learn(self, observed: Tensor) -> None:
        group = self.param_groups[0]
        d, d_numerator, root = group["d"], group["d_numerator"], _root(group)
        numerator = d_numerator * root + (1 - root) * observed[0]
        found = numerator / ((1 - root) * observed[1])
        is_sound = found.isfinite()  # not finite if all gradients are zero, or the step was skipped
        grown = torch.minimum(found, d * float(group["growth_rate"]))
        d.copy_(torch.where(is_sound, torch.maximum(d, grown), d))
        d_numerator.copy_(torch.where(is_sound, numerator, d_numerator))

    @override
    def _rule(self, group: Group) -> Rule:
        return _RULE

    @override
    def _made_by(self, group: Group) -> Mapping[str, Any]:
        common = ("d0", "growth_rate", "use_bias_correction")
        return {"betas[1]": group["betas"][1], **{name: group[name] for name in common}}

    @override
    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        return "fused=False" if group["fused"] is False else "no kernel that estimates before it updates"

    @override
    def _check_learned(self, group: Group) -> None:
        check_number(self._owner, "d", group["d"], "(0, inf)")
        check_number(self._owner, "d_numerator", group["d_numerator"], "(-inf, inf)")

    @override
    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_betas(self._owner, group["betas"])
        check_number(self._owner, "eps", group["eps"], "(0, inf)")
        check_one_of(self._owner, "use_bias_correction", group["use_bias_correction"], (False, True))
        check_number(self._owner, "d0", group["d0"], "(0, inf)")
        check_number(self._owner, "growth_rate", group["growth_rate"], "[1, inf]")
