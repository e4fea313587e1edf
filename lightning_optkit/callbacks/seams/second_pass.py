# SPDX-License-Identifier: Apache-2.0
"""A second run of `training_step` on the same batch, without effect on statistics, metrics and logs."""

from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from torch import Tensor
from torchmetrics import Metric

from lightning_optkit.callbacks.seams.dry_run import without_trace
from lightning_optkit.callbacks.seams.module_state import Buffers
from lightning_optkit.callbacks.seams.torchmetrics_private import state_names

__all__ = ["SecondPass", "finish_second_passes", "loss_of", "restore_metrics", "states_of_metrics", "with_loss"]


class SecondPass:
    """A context manager: inside, nothing is logged, and metrics and attributes of modules are restored on exit.

    Buffers (running statistics of BatchNorm, power iterations) may still be needed by the backward pass, so they are
    restored by `finish_second_passes`, which must be called after it.

    Args:
        pl_module: The module whose `training_step` runs again.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._module = pl_module
        self._buffers = Buffers(pl_module)
        _PENDING.setdefault(pl_module, []).append(self)
        self._metrics = states_of_metrics(pl_module)

    def __enter__(self) -> None:
        self._trace = without_trace(self._module)
        self._trace.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trace.__exit__(kind, error, trace)
        restore_metrics(self._metrics)

    def restore_buffers(self) -> None:
        """Restores the buffers."""
        self._buffers.restore()


_PENDING: WeakKeyDictionary[pl.LightningModule, list[SecondPass]] = WeakKeyDictionary()


def finish_second_passes(pl_module: pl.LightningModule) -> None:
    """Restores the buffers of every second pass whose gradients have been taken, in reverse order."""
    for second in reversed(_PENDING.pop(pl_module, [])):
        second.restore_buffers()


def states_of_metrics(pl_module: pl.LightningModule) -> list[tuple[Metric, dict[str, Any]]]:
    """Copies of the states of all metrics."""
    return [
        (metric, {name: _copy(getattr(metric, name)) for name in state_names(metric)})
        for metric in pl_module.modules()
        if isinstance(metric, Metric)
    ]


def restore_metrics(states: list[tuple[Metric, dict[str, Any]]]) -> None:
    """Puts them back."""
    for metric, values in states:
        for name, value in values.items():
            setattr(metric, name, value)


def _copy(value: Any) -> Any:
    """A copy, since metrics change their tensors in place, and append to their lists."""
    return value.clone() if isinstance(value, Tensor) else list(value) if isinstance(value, list) else value


def loss_of(output: Any) -> Tensor | None:
    """The loss in the result of a `training_step`."""
    loss = output if isinstance(output, Tensor) or output is None else output.get("loss")
    assert loss is None or isinstance(loss, Tensor)
    return loss


def with_loss(output: Any, loss: Tensor) -> Any:
    """The same result with another loss."""
    return loss if isinstance(output, Tensor) else {**output, "loss": loss}
