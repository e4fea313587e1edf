# SPDX-License-Identifier: Apache-2.0
"""Weights of `precision="64-true"` are loaded in fp64; Lightning loads them into fp32, and then casts the module."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies import Strategy

from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.overrides import override_once

__all__ = ["cast_before_loading"]


def cast_before_loading(strategy: Strategy) -> None:
    """Overrides how a strategy with this precision loads weights, once. 16-bit weights lose nothing in fp32."""
    if is_a(strategy.precision_plugin, DoublePrecision):
        override_once(strategy, "load_model_state_dict", _load)


def _load(strategy: Strategy, load: Callable[..., None], checkpoint: Mapping[str, Any], strict: bool = True) -> None:
    assert strategy.lightning_module is not None
    strategy.precision_plugin.convert_module(strategy.lightning_module)
    load(checkpoint, strict=strict)
