# SPDX-License-Identifier: Apache-2.0
"""The one loss function of torch that is called in each batch of several, for what is summed up over them."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lightning_optkit._torch_private import is_transformed
from lightning_optkit.diagnostics._guard import Guarding, unguarded
from lightning_optkit.diagnostics.measure.fast_paths import WatchingMode
from lightning_optkit.diagnostics.measure.losses import LOSSES, arguments_of

__all__ = ["CalledLoss"]


class CalledLoss(WatchingMode, ABC):
    """Gives the call to `_take` while it is entered, and holds the sums; unknown if a batch has several calls, or once
    it failed inside of `guard`.
    """

    def __init__(self, guard: Guarding = unguarded) -> None:
        super().__init__()
        self._guard = guard
        self._sums: list[Tensor] = []
        self._samples, self._is_known, self._calls = 0, True, 0

    def next_batch(self) -> None:
        """Begins another batch."""
        self._calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in LOSSES and isinstance(result, Tensor) and self._is_known:
            self._calls += 1
            self._is_known = False
            if not is_transformed():  # inside of vmap, say, a call is of a single sample
                with self._guard(f"the look at losses ({type(self).__name__})"):
                    self._is_known = self._calls == 1 and self._take(func, arguments_of(func, args, kwargs or {}))
        return result

    @abstractmethod
    def _take(self, function: Any, arguments: dict[str, Any]) -> bool:
        """Adds a call, with its arguments by name; whether it tells what is wanted."""

    def _add(self, sums: list[Tensor], num_samples: int) -> None:
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._samples += num_samples
