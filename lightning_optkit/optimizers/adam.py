# SPDX-License-Identifier: Apache-2.0
"""Adam, in one pass.

Source: Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1; AMSGrad, Reddi et al. 2018, arXiv:1904.09237, Algorithm 2.
Differs from the papers as `torch.optim.Adam` does: AMSGrad keeps the maximum before the bias correction.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_flag, check_number, pair
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["Adam", "adam_update"]


def adam_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Adam subtracts from `param`, as in csrc/rules/adam.h. Updates `state` in place."""
    beta1, beta2 = group["betas"]
    exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
    exp_avg.lerp_(grad, float(1 - beta1))  # m_t
    exp_avg_sq.mul_(beta2).add_((1 - beta2) * grad * grad)  # v_t
    second = exp_avg_sq
    if "max_exp_avg_sq" in state:
        second = torch.maximum(state["max_exp_avg_sq"], exp_avg_sq, out=state["max_exp_avg_sq"])
    denom = second.sqrt() * (1 - beta2**step) ** -0.5 + group["eps"]
    step_size = float(group["lr"]) / float(1 - beta1**step)
    update: Tensor = exp_avg * step_size / denom
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["betas"]
    return {"beta1": float(beta1), "beta2": float(beta2), "eps": float(group["eps"])}


_MOMENTS = (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True))
_MAX = StateSpec("max_exp_avg_sq", nonnegative=True, kept=lambda group: bool(group["amsgrad"]))
_ADAM = Rule("adam", _MOMENTS, _hyperparameters, adam_update)
_ADAM_AMSGRAD = Rule("adam_amsgrad", (*_MOMENTS, _MAX), _hyperparameters, adam_update)


class Adam(OnePassOptimizer, torch.optim.Adam):
    """Adam with the arguments of `torch.optim.Adam`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate (parameter units per step), in [0, inf), or a 1-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the denominator after the square root, in [0, inf).
        weight_decay: L2 coefficient, added to the gradient (decoupled: share of the parameter removed per step, times
            `lr`); in [0, inf).
        amsgrad: Use the largest second moment so far.
        foreach: As in torch; kept for state dicts. No effect, since there is only one implementation.
        maximize: Ascend.
        capturable: As in torch; kept for state dicts.
        differentiable: Must be False: the step writes in place.
        fused: None: the compiled path where possible. False: plain PyTorch.
        decoupled_weight_decay: True makes it AdamW.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.
        RuntimeError: for `fused=True` with `foreach=True`, as in torch.

    Cost: 8 bytes of state per parameter (amsgrad 12); one pass, two with a clip.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = Adam([weight], lr=0.1)
        >>> weight.grad = torch.tensor([1.0, -2.0, 0.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000, 1.0000])
    """

    _torch_class: ClassVar[type[Optimizer] | None] = torch.optim.Adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            amsgrad=amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        super().__init__(params, defaults, **stages)

    def _rule(self, group: Group) -> Rule:
        return _ADAM_AMSGRAD if group["amsgrad"] else _ADAM

    def _check_group(self, group: Group) -> None:
        check_flag(self._owner, "amsgrad", group["amsgrad"])
        beta1, beta2 = pair(self._owner, "betas", group["betas"])
        self._check_tensors(group, {"lr": group["lr"], "betas[0]": beta1, "betas[1]": beta2})
        check_number(self._owner, "betas[0]", beta1, "[0, 1)")
        check_number(self._owner, "betas[1]", beta2, "[0, 1)")
        check_number(self._owner, "eps", group["eps"], "[0, inf)")

    def _check_tensors(self, group: Group, values: dict[str, object]) -> None:
        """Raises where torch does: torch's foreach implementation accepts tensors only if it is capturable."""
        for name, value in values.items():
            if isinstance(value, Tensor) and group["foreach"] and not group["capturable"]:
                raise ValueError(
                    f"{self._owner}({name}=<Tensor>, foreach=True): needs capturable=True or foreach=None."
                )
        if isinstance(values["betas[0]"], Tensor) != isinstance(values["betas[1]"], Tensor):
            raise ValueError(f"{self._owner}(betas={group['betas']!r}): betas must be two floats or two tensors.")
