# SPDX-License-Identifier: Apache-2.0
"""Adafactor: a second moment stored as row and column means, and steps proportional to the parameter.

Source: Shazeer & Stern 2018, "Adafactor: adaptive learning rates with sublinear memory cost", arXiv:1804.04235. As in
`torch.optim.Adafactor`: `lr` bounds the relative step and multiplies decoupled decay, eps[0] bounds the denominator
instead of being added to the squares, and means replace sums.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit._norms import norm
from lightning_optkit.optimizers._factored_moment import shape_by_column, shape_by_element, shape_by_row
from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_number, pair, with_listed_params
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.split_weights import CORRECTIONS, part_kept
from lightning_optkit.step.stages import Stages

__all__ = ["Adafactor", "adafactor_update"]


def adafactor_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Adafactor subtracts from `param`. Updates `state` in place."""
    if param.numel() == 0:
        return torch.zeros_like(param)
    eps1, eps2 = (float(eps) for eps in group["eps"])
    share = step ** float(group["beta2_decay"])
    rate = max(eps2, _rms(param)) * min(float(group["lr"]), 1 / step**0.5)
    variance = _factored(grad, state, share, eps1) if grad.ndim > 1 else _of_elements(grad, state, share)
    update = variance.clamp_(min=eps1 * eps1).rsqrt_().mul_(grad)
    return update.mul_(rate / max(1.0, _rms(update) / float(group["d"])))


def _factored(grad: Tensor, state: State, share: float, eps1: float) -> Tensor:
    """The second moment of each matrix (last two dimensions): row means times column means, over the mean."""
    row_var, col_var = state["row_var"], state["col_var"]
    row_var.lerp_(_mean_square(grad, -1), share)
    col_var.lerp_(_mean_square(grad, -2), share)
    product: Tensor = row_var @ col_var
    return product.div_(row_var.mean(dim=-2, keepdim=True).clamp_(min=eps1))


def _of_elements(grad: Tensor, state: State, share: float) -> Tensor:
    return state["variance"].lerp_(grad * grad, share).clone()


def _mean_square(grad: Tensor, dim: int) -> Tensor:
    # Computed by norms, to avoid a temporary of the squares.
    squares: Tensor = torch.linalg.vector_norm(grad, dim=dim, keepdim=True).square_()
    return squares.div_(grad.size(dim))


def _rms(t: Tensor) -> float:
    return float(norm(t)) / math.sqrt(t.numel())


def _resolve(group: Group, param: Tensor) -> Group:
    """eps[0]=None is the eps of the stored dtype, although 16-bit parameters are updated in fp32.

    Weights that are split are stored in fp32.
    """
    eps1, eps2 = group["eps"]
    dtype = torch.float32 if part_kept(group["rounding"], param) in CORRECTIONS else param.dtype
    return {**group, "eps": (torch.finfo(dtype).eps if eps1 is None else eps1, eps2)}


def _hyperparameters(group: Group) -> Hyperparameters:
    """As in csrc/rules/adafactor.h, where eps[0] < 0 stands for the eps of the stored dtype."""
    eps1, eps2 = group["eps"]
    return {
        "beta2_decay": float(group["beta2_decay"]),
        "eps1": -1.0 if eps1 is None else float(eps1),
        "eps2": float(eps2),
        "d": float(group["d"]),
    }


_RULE = Rule(
    "adafactor",
    (
        StateSpec("variance", nonnegative=True, shape=shape_by_element),
        StateSpec("row_var", nonnegative=True, full_precision=True, shape=shape_by_row),
        StateSpec("col_var", nonnegative=True, full_precision=True, shape=shape_by_column),
    ),
    _hyperparameters,
    adafactor_update,
    needs_whole="factor the second moment",
    resolve=_resolve,
    num_rereads=3,  # the gradient for the norm of the update and for the update, the parameter for its norm
)


class Adafactor(OnePassOptimizer, torch.optim.Adafactor):
    """Adafactor with the arguments of `torch.optim.Adafactor`, and every stage of the one-pass step.

    A parameter of two dimensions or more has state per row and column of its last two dimensions (the mean squares);
    any other has one number per element. The RMS of a step is `max(eps[1], rms(param)) * min(lr, 1 / sqrt(t))`, so `lr`
    is relative to the parameter. On CPU the rule is compiled, except for non-contiguous matrices; on CUDA it runs in
    PyTorch. `explain()` shows which. Row and column state is fp32; other state has `state_dtype`.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`; all real.
        lr: Largest relative step, in [0, inf), or a 1-element tensor; from 1 on it has no effect as a bound.
        beta2_decay: The weight of new squares in the second moment is t ** beta2_decay; in (-inf, 0].
        eps: Lower bound of the square root in the denominator, in [0, inf), or None for the eps of the parameter's
            dtype (torch: of the first parameter of its group); and lower bound of a parameter's RMS, in [0, inf).
        d: Largest RMS of an update before the rate, in [1, inf].
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        foreach: As in torch; kept for state dicts. No effect, since there is only one implementation.
        maximize: Ascend.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.
        RuntimeError: for a complex parameter, as in torch.

    Cost: 4 bytes of state per row and per column of a matrix, 4 per element of a vector; three walks: for the second
    moment, for the norms, and for the update.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(3, 4))
        >>> optimizer = Adafactor([weight], lr=0.1)
        >>> weight.grad = torch.full((3, 4), 5.0)
        >>> optimizer.step()  # by 0.1 times the RMS of the weight
        >>> weight.data[0], [tuple(optimizer.state[weight][name].shape) for name in ("row_var", "col_var")]
        (tensor([0.9000, 0.9000, 0.9000, 0.9000]), [(3, 1), (1, 4)])
    """

    _torch_class: ClassVar[type[Optimizer] | None] = torch.optim.Adafactor

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            beta2_decay=beta2_decay,
            eps=eps,
            d=d,
            weight_decay=weight_decay,
            foreach=foreach,
            maximize=maximize,
            fused=None,
            differentiable=False,
            decoupled_weight_decay=True,
        )
        super().__init__(params, defaults, **stages)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; nothing is changed if it does not fit."""
        param_group = with_listed_params(f"{self._owner}.add_param_group", "param_group", param_group)
        given = param_group["params"]
        members = [m[1] if isinstance(m, tuple) else m for m in ([given] if isinstance(given, Tensor) else given)]
        if any(isinstance(member, Tensor) and member.is_complex() for member in members):
            raise RuntimeError(f"{self._owner}(params=...): every parameter must be real, not complex.")
        super().add_param_group(param_group)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        reason = super()._why_reference(param, group)
        if reason is not None:
            return reason
        if param.is_cuda:
            return "no CUDA kernel whose rate follows the norms of an update by a factored second moment"
        if param.ndim < 2:
            return None
        return None if param.is_contiguous() else "its rows do not lie one behind another in memory"

    def _check_group(self, group: Group) -> None:
        check_number(self._owner, "beta2_decay", group["beta2_decay"], "(-inf, 0]")
        eps1, eps2 = pair(self._owner, "eps", group["eps"])
        if eps1 is not None:
            check_number(self._owner, "eps[0]", eps1, "[0, inf)")
        check_number(self._owner, "eps[1]", eps2, "[0, inf)")
        check_number(self._owner, "d", group["d"], "[1, inf]")
