# SPDX-License-Identifier: Apache-2.0
"""Shared by the rules that estimate their rate from all parameters: one estimate, in every group."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from lightning_optkit._checks import shown
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.arguments import with_listed_params
from lightning_optkit.step.rule import Group
from lightning_optkit.step.shards import local

__all__ = ["EstimatedRateOptimizer", "adam_rate"]


def adam_rate(group: Group, step: float) -> float:
    """The estimate, times Adam's correction of the bias of both moments if the group asks for it."""
    beta1, beta2 = group["betas"]
    correction = math.sqrt(1 - beta2**step) / (1 - beta1**step) if group["use_bias_correction"] else 1.0
    return float(group["d"]) * correction


class EstimatedRateOptimizer(OnePassOptimizer):
    """A rule whose groups share the tensors of its estimate, their rate, and the settings that determine it."""

    _learned: ClassVar[tuple[str, ...]]

    def _made_by(self, group: Group) -> Mapping[str, Any]:
        """The entries that determine the estimate."""
        raise NotImplementedError

    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter with a gradient.

        Raises:
            ValueError: if groups have different nonzero rates.
        """
        self._check_changed()
        rates = sorted({float(group["lr"]) for group in self.param_groups} - {0.0})
        if len(rates) > 1:
            raise ValueError(
                f"{self._owner}.step: groups have the rates {rates}; the estimate needs one lr for all, or 0 to freeze "
                "a group."
            )
        self._share()
        return super().step(closure)

    def _share(self) -> None:
        """Makes all groups share the tensors of the first one, on the device of the parameters."""
        first = self.param_groups[0]
        device = local(first["params"][0]).device if first["params"] else torch.device("cpu")
        for name in self._learned:
            value = first[name]
            is_ready = isinstance(value, Tensor) and value.device == device and value.dtype == torch.float64
            if not is_ready or value.dim() != 0:
                value = torch.as_tensor(value, dtype=torch.float64, device=device).detach().reshape(())
            for group in self.param_groups:
                group[name] = value

    @override
    def _check_together(self, groups: Sequence[Group]) -> None:
        common = self._made_by(groups[0]) if groups else {}
        for group in groups[1:]:
            for name, value in self._made_by(group).items():
                if value != common[name]:
                    raise ValueError(
                        f"{self._owner}({name}={shown(value)}): {name} must be {common[name]!r} in all groups."
                    )

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; an invalid group changes nothing."""
        param_group = with_listed_params(f"{self._owner}.add_param_group", "param_group", param_group)
        added = {**self.defaults, **param_group}
        self._check_all(added)
        self._check_together([*self.param_groups[:1], added])
        super().add_param_group(param_group)

    @override
    def _check_group(self, group: Group) -> None:
        if group["decouple_lr"]:
            raise ValueError(
                f"{self._owner}(decouple_lr=True): must be False; the rate is estimated, also that of decay."
            )
