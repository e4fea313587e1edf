# SPDX-License-Identifier: Apache-2.0
"""Sophia-G: momentum over an estimate of the Hessian's diagonal, clipped per element; in one pass.

Source: Liu et al. 2023, "Sophia: a scalable stochastic second-order optimizer for language model pre-training",
arXiv:2305.14342, Algorithm 3, with the Gauss-Newton-Bartlett estimator of Algorithm 2. The authors' implementation
multiplies by the batch size in the step, not in the estimate, and adds 1e-15 to the denominator where the paper has a
lower bound.
"""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import check_int
from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_betas, check_number
from lightning_optkit.step.gradient_reference import as_real, dense
from lightning_optkit.step.numbers import compute_dtype
from lightning_optkit.step.rule import Group, Hyperparameters, State, StateSpec
from lightning_optkit.step.shards import local
from lightning_optkit.step.stages import Stages

__all__ = ["SophiaG", "sophia_g_update"]


def sophia_g_update(param: Tensor, grad: Tensor, state: State, group: Group, step: float) -> Tensor:
    """The amount Sophia-G subtracts from `param`, as in csrc/rules/sophia_g.h. Updates `state` in place."""
    exp_avg = state["exp_avg"].lerp_(grad, float(1 - group["betas"][0]))  # m_t
    moved = exp_avg / (state["hessian"] * float(group["rho"])).clamp(min=float(group["eps"]))
    update: Tensor = moved.clamp(-1, 1) * float(group["lr"])
    return update


def _hyperparameters(group: Group) -> Hyperparameters:
    return {"beta1": float(group["betas"][0]), "rho": float(group["rho"]), "eps": float(group["eps"])}


_RULE = Rule(
    "sophia_g",
    (StateSpec("exp_avg"), StateSpec("hessian", nonnegative=True, full_precision=True, written_once=True)),
    _hyperparameters,
    sophia_g_update,
)


class SophiaG(OnePassOptimizer):
    """Sophia-G, with decoupled decay and every stage of the one-pass step; `update_hessian` every 10 steps or so.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Largest update per element, in [0, inf), or a 1-element tensor.
        betas: Decay rates of the momentum and of the estimates, each in [0, 1).
        rho: Factor of the estimate in the denominator, in (0, inf); the paper's gamma. It should leave 10 to 50 % of
            the elements unclipped.
        eps: Lower bound of the denominator, in (0, inf).
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        maximize: Ascend.
        fused: None: the compiled path where possible. False: plain PyTorch.
        state_dtype: Dtype of the momentum; the estimate is fp32, or fp64 beside fp64 parameters.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 8 bytes of state per parameter; one pass, two with a clip by norm.

    Example:
        >>> model = torch.nn.Linear(3, 4)
        >>> optimizer = SophiaG(model.parameters(), lr=0.01)
        >>> inputs, targets = torch.randn(8, 3), torch.arange(8) % 4
        >>> for step in range(20):
        ...     if step % 10 == 0:
        ...         logits = model(inputs)
        ...         drawn = torch.distributions.Categorical(logits=logits).sample()
        ...         torch.nn.functional.cross_entropy(logits, drawn).backward()
        ...         optimizer.update_hessian(len(inputs))
        ...         optimizer.zero_grad()
        ...     torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> bool((optimizer.state[model.weight]["hessian"] > 0).all())
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        eps: float = 1e-15,
        weight_decay: float = 0.1,
        *,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            fused=fused,
            decoupled_weight_decay=True,
        )
        super().__init__(params, defaults, **stages)

    @torch.no_grad()
    def update_hessian(self, num_samples: int) -> None:
        """Averages a new estimate into the state: `num_samples` times the squared gradients that the parameters have.

        They must be unscaled gradients of the mean loss over labels drawn from the model's own predictions, not of the
        targets, and be set to zero before the next step. Parameters without a gradient keep their estimate.

        Args:
            num_samples: Predictions in that mean, over all processes: sequences times tokens of a language model. At
                least 1.

        Raises:
            ValueError: if `num_samples` is below 1.
        """
        check_int(f"{self._owner}.update_hessian", "num_samples", num_samples, minimum=1)
        for group in self.param_groups:
            share = 1 - float(group["betas"][1])
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if "hessian" not in state:  # before the first step; a state is saved whole
                    dtype = param.dtype if param.dtype.is_complex else compute_dtype(param)
                    state.update({name: torch.zeros_like(param, dtype=dtype) for name in _RULE.state_names})
                    state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                hessian = as_real(local(state["hessian"]))
                grad = as_real(dense(local(param.grad))).to(hessian.dtype)
                hessian.lerp_(num_samples * grad * grad, share)

    def _rule(self, group: Group) -> Rule:
        return _RULE

    def _check_group(self, group: Group) -> None:
        check_betas(self._owner, group["betas"])
        check_number(self._owner, "rho", group["rho"], "(0, inf)")
        check_number(self._owner, "eps", group["eps"], "(0, inf)")
