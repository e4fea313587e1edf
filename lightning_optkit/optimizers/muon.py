# SPDX-License-Identifier: Apache-2.0
"""Muon: orthogonalized momentum for matrices, AdamW for everything else; in one optimizer.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks",
kellerjordan.github.io/posts/muon; `match_rms_adamw`, Liu et al. 2025, arXiv:2502.16982. As in `torch.optim.Muon`, the
momentum is an average. Polar Express: see `_newton_schulz_coefficients.py`; NorMuon, AdaMuon: see `_muon_variants.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import (
    check_bools,
    check_int,
    check_listed,
    check_one_of,
    check_text,
    shown,
)
from lightning_optkit.optimizers._muon_variants import SECOND_MOMENT, of_rows, of_rows_in_stacks
from lightning_optkit.optimizers._newton_schulz import MatrixSegment, is_stack, muon_update
from lightning_optkit.optimizers._newton_schulz_coefficients import Coefficients, check_coefficients
from lightning_optkit.optimizers.adam import adam_update
from lightning_optkit.step import OnePassOptimizer, Rule
from lightning_optkit.step.arguments import check_number, listed, pair, with_listed_params
from lightning_optkit.step.reference_segment import ReferenceSegment
from lightning_optkit.step.rule import Group, Hyperparameters, StateSpec
from lightning_optkit.step.stages import Stages

__all__ = ["OWN_KEYS", "Muon"]

OWN_KEYS = ("use_muon", "adamw_lr", "adamw_betas", "adamw_eps", "adamw_weight_decay", "stacked", "variant", "beta2")
"""Group entries that torch.optim.Muon does not have."""


def _adamw_hyperparameters(group: Group) -> Hyperparameters:
    beta1, beta2 = group["adamw_betas"]
    return {"beta1": float(beta1), "beta2": float(beta2), "eps": float(group["adamw_eps"])}


def _adamw_update(param: Tensor, grad: Tensor, state: dict[str, Tensor], group: Group, step: float) -> Tensor:
    return adam_update(param, grad, state, {**group, "betas": group["adamw_betas"], "eps": group["adamw_eps"]}, step)


_MUON = Rule(
    "muon",
    (StateSpec("momentum_buffer"),),
    lambda group: {},
    muon_update,
    counts_steps=False,
    needs_whole="orthogonalize it",
)
_ADAMUON = replace(_MUON, name="adamuon", states=(*_MUON.states, StateSpec(SECOND_MOMENT, nonnegative=True)))
_NORMUON, _NORMUON_OF_STACKS = (
    replace(
        _MUON,
        name="normuon",
        states=(*_MUON.states, StateSpec(SECOND_MOMENT, nonnegative=True, full_precision=True, shape=shape)),
    )
    for shape in (of_rows, of_rows_in_stacks)
)
_ADAMW = Rule(
    "adam", (StateSpec("exp_avg"), StateSpec("exp_avg_sq", nonnegative=True)), _adamw_hyperparameters, _adamw_update
)


class Muon(OnePassOptimizer, torch.optim.Muon):
    """Muon for matrices and AdamW for the rest, with the arguments of `torch.optim.Muon`.

    A matrix is a real parameter of two dimensions or more; with more than two it counts as one matrix [first, rest],
    which suits a convolution: [out, in * kernel]. A stack of matrices, such as (experts, rows, columns), belongs into a
    group with `stacked=True`, so that each matrix is orthogonalized by itself.

    Each given group is split in two: matrices use the group's `lr` and `weight_decay`, the rest uses the `adamw_`
    arguments. Embeddings and output heads are matrices too, but work better with AdamW: put them into a group with
    `use_muon=False` (which then uses its own `lr` and `weight_decay`), or name them in `adamw_params`.

    AdamW parameters take the compiled path. Matrices run in PyTorch, with iterations batched over equal shapes.

    Args:
        params: Parameters, named parameters or groups, as in `torch.optim`.
        lr: Learning rate of the matrices, in [0, inf), or a 1-element tensor.
        weight_decay: Share of each matrix removed per step, times `lr`; in [0, inf).
        momentum: Weight of the old momentum in the new one, in [0, inf).
        nesterov: Use Nesterov momentum.
        ns_coefficients: Coefficients of the quintic polynomial; a list of triples, one per iteration (the last one is
            repeated); or "polar_express": the optimal ones of each iteration, by Amsel et al. 2025.
        eps: Lower bound of the norm that a matrix is divided by, in [0, inf).
        ns_steps: Number of iterations, in 0..99.
        adjust_lr_fn: "original" (or None): `lr` times sqrt(max(1, rows / columns)). "match_rms_adamw": times 0.2 *
            sqrt(max(rows, columns)), so that AdamW's learning rates can be reused. Both are of the matrix that is
            orthogonalized; the author's code takes the last two dimensions of a convolution, so that its factor is 1.
        variant: "normuon": divide each row of the orthogonal matrix by its root mean square over time, and keep the
            norm of the matrix (Li et al. 2025). "adamuon": orthogonalize the signs of the momentum, divide each element
            by its root mean square over time, and scale as "match_rms_adamw" (Si et al. 2025; there without Nesterov).
        beta2: Decay rate of the second moment of a variant, in [0, 1).
        stacked: Whether parameters of three dimensions are stacks of matrices, as in the author's code. Conv1d weights
            have three dimensions too: put them into another group.
        adamw_lr: Learning rate of the rest, in [0, inf). None: `lr`.
        adamw_betas: Decay rates of the moments of the rest, each in [0, 1).
        adamw_eps: Added to the denominator of the rest, in [0, inf).
        adamw_weight_decay: Weight decay of the rest, in [0, inf). None: `weight_decay`.
        adamw_params: Regular expressions; a parameter whose name matches one anywhere uses AdamW. Needs named
            parameters: `Muon(model.named_parameters(), adamw_params=["embed", "head"])`.
        maximize: Ascend.
        fused: None: the compiled path for the rest where possible. False: plain PyTorch.
        state_dtype: Dtype of the state; that of fp64 parameters is fp64.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.

    Cost: 4 bytes of state per element of a matrix ("normuon": 4 more per row, "adamuon": 8 per element), 8 per other
    parameter; 3 * `ns_steps` matrix products per matrix.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> optimizer = Muon(model.parameters(), lr=0.02, adamw_lr=3e-4)
        >>> [(group["use_muon"], len(group["params"])) for group in optimizer.param_groups]
        [(True, 1), (False, 3)]
    """

    _torch_class: ClassVar[type[Optimizer] | None] = torch.optim.Muon
    kept_entries = OnePassOptimizer.kept_entries | {"ns_steps", "stacked", "variant"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None,
        *,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = None,
        adamw_params: Sequence[str] = (),
        stacked: bool = False,
        variant: Literal["normuon", "adamuon"] | None = None,
        beta2: float = 0.95,
        maximize: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        defaults = dict(
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
            use_muon=True,
            adamw_lr=adamw_lr,
            adamw_betas=adamw_betas,
            adamw_eps=adamw_eps,
            adamw_weight_decay=adamw_weight_decay,
            stacked=stacked,
            variant=variant,
            beta2=beta2,
            maximize=maximize,
            fused=fused,
            decoupled_weight_decay=True,
        )
        state_dtype = stages.get("state_dtype", torch.float32)
        check_one_of(self._owner, "state_dtype", state_dtype, (torch.float32, torch.bfloat16))
        super().__init__(
            self._split(listed(self._owner, params), adamw_params),
            defaults,
            **stages,
        )

    # --- which parameters are matrices ---

    def _split(self, given: list[Any], patterns: Sequence[str]) -> list[Group]:
        """Splits each group into its matrices and the rest."""
        such_as = 'a list of regular expressions, such as ["embed", "head"]'
        patterns = check_listed(self._owner, "adamw_params", patterns, such_as, empty=True)
        for pattern in patterns:
            check_text(self._owner, "adamw_params", pattern, such_as, expression=True)
        split: list[Group] = []
        for group in given if isinstance(given[0], dict) else [{"params": given}]:
            members: list[Any] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            if patterns and not all(isinstance(member, tuple) for member in members):
                raise ValueError(f"{self._owner}(adamw_params={shown(patterns)}): needs model.named_parameters().")
            if "use_muon" in group:
                split.append({**group, "params": members})
                continue
            chosen = [_is_matrix(_param(m)) and not any(re.search(p, m[0]) for p in patterns) for m in members]
            matrices = [member for member, is_chosen in zip(members, chosen, strict=True) if is_chosen]
            rest = [member for member, is_chosen in zip(members, chosen, strict=True) if not is_chosen]
            if matrices:
                split.append({**group, "params": matrices, "use_muon": True})
            if rest:
                own = {key: value for key, value in group.items() if key not in ("lr", "weight_decay")}
                split.append({**own, "params": rest, "use_muon": False})
        return split

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. Without `use_muon` it must contain only matrices, or none."""
        param_group = with_listed_params(f"{self._owner}.add_param_group", "param_group", param_group)
        params = param_group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        kinds = {_is_matrix(_param(member)) for member in members}
        if "use_muon" not in param_group and len(kinds) == 2:
            raise ValueError(f"{self._owner}(params=...): matrices and others need two groups.")
        group = {"use_muon": kinds == {True}, **param_group, "params": members}
        check_bools(self._owner, use_muon=group["use_muon"])
        if group["use_muon"] and kinds != {True}:
            raise ValueError(f"{self._owner}(use_muon=True): every parameter must be a real matrix.")
        if not group["use_muon"]:
            for name in ("lr", "weight_decay"):
                own = group.get(f"adamw_{name}", self.defaults[f"adamw_{name}"])
                if own is not None:
                    group.setdefault(name, own)
        super().add_param_group(group)

    # --- called by the engine ---

    def _rule(self, group: Group) -> Rule:
        if not group["use_muon"]:
            return _ADAMW
        by_rows = _NORMUON_OF_STACKS if group["stacked"] else _NORMUON
        return {None: _MUON, "normuon": by_rows, "adamuon": _ADAMUON}[group["variant"]]

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        if group["use_muon"]:
            return f"matrix products, batched over equal shapes{_taken_as(param, group)}"
        return super()._why_reference(param, group)

    def _reference_segment(self, rule: Rule) -> type[ReferenceSegment]:
        return ReferenceSegment if rule is _ADAMW else MatrixSegment

    def _check_group(self, group: Group) -> None:
        check_number(self._owner, "momentum", group["momentum"], "[0, inf)")
        check_one_of(self._owner, "nesterov", group["nesterov"], (False, True))
        check_number(self._owner, "eps", group["eps"], "[0, inf)")
        check_coefficients(self._owner, group["ns_coefficients"])
        check_int(self._owner, "ns_steps", group["ns_steps"], minimum=0)
        if group["ns_steps"] >= 100:
            raise ValueError(f"{self._owner}(ns_steps={group['ns_steps']}): ns_steps must be less than 100.")
        check_one_of(self._owner, "adjust_lr_fn", group["adjust_lr_fn"], (None, "original", "match_rms_adamw"))
        check_one_of(self._owner, "variant", group["variant"], (None, "normuon", "adamuon"))
        if group["variant"] == "adamuon" and group["adjust_lr_fn"] == "original":
            raise ValueError(f'{self._owner}(adjust_lr_fn="original"): adjust_lr_fn must be None for "adamuon".')
        check_number(self._owner, "beta2", group["beta2"], "[0, 1)")
        check_one_of(self._owner, "use_muon", group["use_muon"], (False, True))
        check_one_of(self._owner, "stacked", group["stacked"], (False, True))
        for name in ("adamw_lr", "adamw_weight_decay"):
            if group[name] is not None:
                check_number(self._owner, name, group[name], "[0, inf)")
        beta1, beta2 = pair(self._owner, "adamw_betas", group["adamw_betas"])
        check_number(self._owner, "adamw_betas[0]", beta1, "[0, 1)")
        check_number(self._owner, "adamw_betas[1]", beta2, "[0, 1)")
        check_number(self._owner, "adamw_eps", group["adamw_eps"], "[0, inf)")

    def _completed(self, saved: Group, group: Group) -> Group:
        """A group of `torch.optim.Muon` contains only matrices."""
        completed = {**{key: group[key] for key in OWN_KEYS}, **saved}
        if completed["use_muon"] is not group["use_muon"]:
            raise ValueError(f"{self._owner}.load_state_dict(state_dict=...): its matrices must be in the same groups.")
        return completed


def _param(member: Any) -> Tensor:
    """The parameter of a (name, parameter) pair, or the parameter itself."""
    param: Tensor = member[1] if isinstance(member, tuple) else member
    return param


def _taken_as(param: Tensor, group: Group) -> str:
    """Which matrices a parameter of more than two dimensions is, for an explanation."""
    if param.ndim == 2:
        return ""
    return "; each stack by its matrices" if is_stack(param, group) else "; flattened to [first, rest]"


def _is_matrix(param: Tensor) -> bool:
    return isinstance(param, Tensor) and param.ndim >= 2 and not torch.is_complex(param)
