# SPDX-License-Identifier: Apache-2.0
"""Adagrad: every element has its own learning rate, which only decreases; in one pass.

Source: Duchi, Hazan & Singer 2011, "Adaptive Subgradient Methods for Online Learning and Stochastic Optimization",
JMLR 12, Figure 1 (diagonal case).
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_number
from lightning_optkit.step.quantized_state import scale_name
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.segments import Entry
from lightning_optkit.step.shards import local
from lightning_optkit.step.stages import Stages
from lightning_optkit.step.state import Kept, StateLayout, prepare_state

__all__ = ["Adagrad", "adagrad_update"]


def adagrad_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Adagrad subtracts from `param`, as in csrc/rules/adagrad.h. Updates `state` in place."""
    state["sum"].add_(grad * grad)
    rate = float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])
    update: Tensor = grad * rate / (state["sum"].sqrt() + group["eps"])
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    return {"lr_decay": float(group["lr_decay"]), "eps": float(group["eps"])}


def _fresh(group: Group) -> float:
    return float(group["initial_accumulator_value"])


_RULE = Rule("adagrad", (StateSpec("sum", nonnegative=True, fresh=_fresh),), _hyperparameters, adagrad_update)


class Adagrad(OnePassOptimizer, torch.optim.Adagrad):
    """Adagrad with the arguments of `torch.optim.Adagrad`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate, in [0, inf), or a 1-element tensor.
        lr_decay: The rate is `lr / (1 + (step - 1) * lr_decay)`; in [0, inf).
        weight_decay: L2 coefficient, added to the gradient; in [0, inf).
        initial_accumulator_value: Initial value of the sum of squares, in [0, inf).
        eps: Added to the denominator, in [0, inf).
        foreach: As in torch; kept for state dicts. No effect, since there is only one implementation.
        maximize: Ascend.
        differentiable: Must be False: the step writes in place.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 4 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = Adagrad([weight], lr=0.1)
        >>> weight.grad = torch.tensor([2.0, -3.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])
    """

    _torch_class: ClassVar[type[Optimizer] | None] = torch.optim.Adagrad
    kept_entries = OnePassOptimizer.kept_entries | {"initial_accumulator_value"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            lr_decay=lr_decay,
            weight_decay=weight_decay,
            initial_accumulator_value=initial_accumulator_value,
            eps=eps,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=False,
        )
        super().__init__(params, defaults, **stages)

    def share_memory(self) -> None:
        """Moves the sums of squares into shared memory, as in torch, creating those that do not exist yet."""
        kept = [
            Kept(Entry(param, _RULE.state_names, group_index, 0), self.state[param], group, _RULE)
            for group_index, group in enumerate(self.param_groups)
            for param in group["params"]
        ]
        prepare_state(kept, StateLayout(self.average, self.state_dtype))
        for each in kept:
            for name in ("sum", scale_name("sum")):
                if name in each.state:
                    local(each.state[name]).share_memory_()  # type: ignore[no-untyped-call]
        self._engine.plan = None

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _check_group(self, group: Group) -> None:
        check_number(self._owner, "lr_decay", group["lr_decay"], "[0, inf)")
        check_number(self._owner, "initial_accumulator_value", group["initial_accumulator_value"], "[0, inf)")
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
