# SPDX-License-Identifier: Apache-2.0
"""Prodigy: Adam that estimates its own rate, the distance to the solution; in one pass.

Source: Mishchenko & Defazio 2024, "Prodigy: an expeditiously adaptive parameter-free learner", arXiv:2306.06101,
Prodigy (Adam version), with the options of the authors' package prodigyopt 1.1.2. As in the paper, a step uses the
estimate from before it; the package multiplies eps by the next one, and the whole step if betas[0] is 0. Also unlike
the package, the moments and both sums are updated at a rate of 0, and every parameter has its own step count for the
bias correction.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import check_int, check_one_of
from lightning_optkit.optimizers._estimated_rate import EstimatedRateOptimizer, adam_rate
from lightning_optkit.step import Rule
from lightning_optkit.step.arguments import check_betas, check_number
from lightning_optkit.step.rule import Estimate, Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["Prodigy", "prodigy_update"]

_LEARNED = ("d", "d_max", "d_numerator")
_COMMON = ("d0", "d_coef", "growth_rate", "use_bias_correction", "safeguard_warmup")


def prodigy_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Prodigy subtracts from `param`, as in csrc/rules/prodigy.h; `lr` includes the estimate."""
    beta1, beta2 = group["betas"]
    d, lr = float(group["d"]), float(group["lr"])
    if step == 1:
        state["p0"].copy_(_sliced(param, state, group))
    scaled = grad * d
    state["exp_avg"].lerp_(scaled, float(1 - beta1))  # m_{k+1}
    state["exp_avg_sq"].mul_(beta2).add_((1 - beta2) * scaled * scaled)  # v_{k+1}
    weight = d / group["d0"] * (d if group["safeguard_warmup"] and lr != 0 else lr)
    state["s"].mul_(_beta3(group)).add_(weight * _sliced(grad, state, group))  # s_{k+1}
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + d * float(group["eps"])) * lr


def _observe(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> tuple[float, float]:
    """<g_k, x_0 - x_k>, weighted, and |s_{k+1}|_1."""
    weight = float(group["d"]) / group["d0"] * float(group["lr"]) * adam_rate(group, step)
    way = state["p0"] - _sliced(param, state, group)
    seen = _sliced(grad, state, group) * weight
    return float((seen.double() * way.double()).sum()), float(state["s"].double().abs().sum())


def _beta3(group: Group) -> float:
    return math.sqrt(group["betas"][1]) if group["beta3"] is None else float(group["beta3"])


def _sliced(t: Tensor, state: State, group: Group) -> Tensor:
    """Every `slice_p`-th element; complex numbers are pairs here."""
    return t if group["slice_p"] == 1 else t.reshape(-1, *state["s"].shape[1:])[:: group["slice_p"]]


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    is_known = not (isinstance(group["d"], Tensor) and group["d"].is_cuda)  # on CUDA, reading it would synchronize
    return {
        "beta1": float(beta1),
        "beta2": float(beta2),
        "beta3": _beta3(group),
        "eps": float(group["eps"]),
        "use_bias_correction": float(group["use_bias_correction"]),
        "safeguard_warmup": float(group["safeguard_warmup"]),
        "d0": float(group["d0"]),
        "d": float(group["d"]) if is_known else math.nan,
    }


@cache
def _rule_of(slice_p: int) -> Rule:
    def every(of_param: torch.Size) -> torch.Size:
        return of_param if slice_p == 1 else torch.Size([-(-of_param.numel() // slice_p)])

    moments = (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True))
    started_at = StateSpec("p0", full_precision=True, written_once=True, shape=every)
    return Rule(
        "prodigy",
        (*moments, StateSpec("s", shape=every), started_at),
        _hyperparameters,
        prodigy_update,
        needs_whole="keep every slice_p-th element" if slice_p > 1 else None,
        estimate=Estimate(lambda group: group["d"], adam_rate, _observe),
    )


class Prodigy(EstimatedRateOptimizer):
    """Prodigy, with the arguments of the authors' package: leave `lr` at 1 and use a cosine schedule.

    The rate is `lr * d`. `d` estimates the distance from the initial parameters to the solution; it starts at `d0`, is
    shared by all groups, and can be read (but not set per group) as `param_groups[i]["d"]`, a 0-d tensor. Weight decay
    and `l1` are also multiplied by `lr * d`. To tune the rate, change `d_coef`.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Factor of the estimate, in [0, inf), or a 1-element tensor; the same in every group, or 0: frozen.
        betas: Decay rates of the two moments, each in [0, 1).
        beta3: Decay rate of the sums for the estimate, in [0, 1); None: the square root of `betas[1]`.
        eps: Added to the denominator, times `d`; in [0, inf).
        weight_decay: Share of each parameter removed per step, times `lr * d`; in [0, inf).
        decouple: False: decay is L2, added to the gradient.
        use_bias_correction: Correct the bias of the moments as Adam does, which lowers the rate in the first steps.
        safeguard_warmup: Remove `lr` from the denominator of the estimate, which avoids overestimation during warmup.
        d0: Initial estimate, in (0, inf).
        d_coef: Factor of the estimate, in (0, inf).
        growth_rate: Largest growth of the estimate per step, except the first time; in [1, inf].
        slice_p: Compute the estimate from every `slice_p`-th element, at least 1. Above 1 it needs less memory, and
            runs in PyTorch.
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        state_dtype: Dtype of the state except `p0`, which is fp32; state of fp64 parameters is fp64; "int8" for one
            byte.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices; for groups with
            different settings of the estimate; at a step, if nonzero rates differ between groups.

    Cost: 16 bytes of state per parameter (`slice_p`: 8 + 8 / slice_p); one pass, two with a clip by norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = Prodigy([weight])
        >>> for _ in range(30):
        ...     weight.grad = weight.detach().sign()  # of the sum of the magnitudes
        ...     optimizer.step()
        >>> f"the rate went from 0.000001 to {optimizer.param_groups[0]['d']:.1f}"
        'the rate went from 0.000001 to 1.1'
    """

    kept_entries = EstimatedRateOptimizer.kept_entries | {*_LEARNED, "d0", "slice_p"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        slice_p: int = 1,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            beta3=beta3,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decouple,
            use_bias_correction=use_bias_correction,
            safeguard_warmup=safeguard_warmup,
            d0=d0,
            d_coef=d_coef,
            growth_rate=growth_rate,
            slice_p=slice_p,
            d=d0,
            d_max=d0,
            d_numerator=0.0,
            maximize=maximize,
            fused=fused,
        )
        super().__init__(params, defaults, **stages)

    # --- the estimate ---

    @torch.no_grad()
    def _learn(self, observed: Tensor) -> None:
        """Computes d_{k+1} from the sums, in place, so that kernels read the new value on the device."""
        group = self.param_groups[0]
        d, d_max, d_numerator = (group[name] for name in _LEARNED)
        numerator = d_numerator * _beta3(group) + observed[0]
        found = numerator * float(group["d_coef"]) / observed[1]
        is_sound = found.isfinite()  # not finite if all gradients are zero, or the step was skipped
        largest = torch.maximum(d_max, found)
        grown = torch.where(d == float(group["d0"]), torch.maximum(d, found), d) * float(group["growth_rate"])
        d.copy_(torch.where(is_sound, torch.minimum(largest, grown), d))
        d_max.copy_(torch.where(is_sound, largest, d_max))
        d_numerator.copy_(torch.where(is_sound, numerator, d_numerator))

    # --- called by the engine ---

    def _rule(self, group: Group) -> Rule:
        return _rule_of(group["slice_p"])

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        if group["slice_p"] > 1:
            return f"slice_p={group['slice_p']} leaves elements out"
        return super()._why_reference(param, group)

    _learned = _LEARNED

    def _made_by(self, group: Group) -> Mapping[str, Any]:
        return {"beta3": _beta3(group), **{name: group[name] for name in _COMMON}}

    def _check_learned(self, group: Group) -> None:
        check_number(self._owner, "d", group["d"], "(0, inf)")
        check_number(self._owner, "d_max", group["d_max"], "(0, inf)")
        check_number(self._owner, "d_numerator", group["d_numerator"], "(-inf, inf)")

    _decay_flag = "decouple"

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_betas(self._owner, group["betas"])
        if group["beta3"] is not None:
            check_number(self._owner, "beta3", group["beta3"], "[0, 1)")
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
        check_one_of(self._owner, "use_bias_correction", group["use_bias_correction"], (False, True))
        check_one_of(self._owner, "safeguard_warmup", group["safeguard_warmup"], (False, True))
        check_number(self._owner, "d0", group["d0"], "(0, inf)")
        check_number(self._owner, "d_coef", group["d_coef"], "(0, inf)")
        check_number(self._owner, "growth_rate", group["growth_rate"], "[1, inf]")
        check_int(self._owner, "slice_p", group["slice_p"], minimum=1)
