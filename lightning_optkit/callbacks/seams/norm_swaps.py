# SPDX-License-Identifier: Apache-2.0
"""Converts the norms of a module during a fit, wherever the module creates them."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.lightning_packages import is_overridden
from lightning_optkit.callbacks.seams.overrides import override, restore
from lightning_optkit.layers.swap_norms import NormSwaps, swap_norms

__all__ = ["FusedNorms"]


class FusedNorms:
    """The LayerNorm and RMSNorm layers of a module, converted after its `setup` and after its `configure_model`.

    Callbacks are set up before the module, and layers may be created in either method; both run before the strategy
    wraps or shards the module.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._module = pl_module
        self._swaps: list[NormSwaps] = []
        self._overrides: dict[str, Callable[..., Any]] = {}
        for name in ("setup", "configure_model"):
            # Lightning checks whether configure_model is overridden, so it must not be created here.
            if name == "setup" or is_overridden(name, pl_module):
                self._overrides[name] = self._swap_after(getattr(pl_module, name))
                override(pl_module, name, self._overrides[name])

    def lines(self) -> list[str]:
        """The converted and unconverted layers, one sentence per kind."""
        return [line for swaps in self._swaps for line in swaps.summary()]

    def undo(self) -> None:
        """Restores the class of every layer."""
        for name, function in self._overrides.items():
            restore(self._module, name, function)
        self._overrides = {}
        while self._swaps:
            self._swaps.pop().undo()

    def _swap_after(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def create(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            seen = {row.name for swaps in self._swaps for row in swaps.rows}
            for kind in ("layer", "rms"):
                self._swaps.append(swap_norms(self._module, kind, only=lambda name, _: name not in seen))
            return result

        return create
