# SPDX-License-Identifier: Apache-2.0
"""Learning rates that are lowered for a single step, behind the back of every scheduler."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["LoweredRates"]


class LoweredRates:
    """Lowers the rates of an optimizer between its gradients and its update, and restores them after the step.

    Schedulers that compute a rate from the last one never see the lowered ones.
    """

    def __init__(self) -> None:
        self._before: list[tuple[dict[str, Any], Any]] = []

    def lower(self, optimizer: Optimizer, factor: float) -> None:
        """Multiplies the rates of the step that follows."""
        for group in optimizer.param_groups:
            rate = group["lr"]
            self._before.append((group, rate.clone() if isinstance(rate, Tensor) else rate))
            _set_rate(group, float(rate) * factor)

    def restore(self) -> None:
        """Restores them; no-op if they are not lowered."""
        before, self._before = self._before, []
        for group, rate in before:
            _set_rate(group, rate)

    def restored_after(self, optimizer_step: Callable[..., Any]) -> Callable[..., Any]:
        """The `optimizer_step` of a strategy, after which the rates are restored, whether a step was taken or not."""

        @wraps(optimizer_step)
        def then_restored(*args: Any, **kwargs: Any) -> Any:
            try:
                return optimizer_step(*args, **kwargs)
            finally:
                self.restore()

        return then_restored


def _set_rate(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(float(rate))
    else:
        group["lr"] = rate
