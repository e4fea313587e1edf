# SPDX-License-Identifier: Apache-2.0
"""Signum: the sign of the momentum; in one pass.

Source: Bernstein et al. 2018, "signSGD: compressed optimisation for non-convex problems", arXiv:1802.04434, Algorithm
2, without the exchange of signs between workers.
"""

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_number
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["Signum", "signum_update"]


def signum_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Signum subtracts from `param`, as in csrc/rules/signum.h. Updates `state` in place."""
    exp_avg = state["exp_avg"].lerp_(grad, float(1 - group["momentum"]))  # m_{k+1}
    sign = exp_avg.sign().where(~exp_avg.isnan(), exp_avg)  # torch's sign of NaN is 0
    update: Tensor = sign * float(group["lr"])
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    return {"momentum": float(group["momentum"])}


_RULE = Rule("signum", (StateSpec("exp_avg"),), _hyperparameters, signum_update)


class Signum(OnePassOptimizer):
    """Signum, with decoupled decay and every stage of the one-pass step. Lion also mixes the newest gradient in.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Length of every update per element, in [0, inf), or a 1-element tensor.
        momentum: Decay rate of the average whose sign is taken, in [0, 1). 0: signSGD, Algorithm 1.
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 4 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Signum([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            maximize=maximize,
            fused=fused,
            decoupled_weight_decay=True,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _check_group(self, group: Group) -> None:
        check_number(self._owner, "momentum", group["momentum"], "[0, 1)")
