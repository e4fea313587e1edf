# SPDX-License-Identifier: Apache-2.0
"""Values of curves, of which those on an accelerator are fetched together."""

import torch
from torch import Tensor

from lightning_optkit.diagnostics.report import Curve

__all__ = ["PendingValues", "curve_of"]

_MOST = 512  # that wait on an accelerator


class PendingValues:
    """Appends values to curves: at once, or a few hundred together, since each transfer waits for the device."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Curve, int, Tensor]] = []

    def append(self, curve: Curve, step: int, value: float | Tensor | None) -> None:
        """Appends a value to a curve now, or later if it is on an accelerator; None is no value."""
        if isinstance(value, Tensor) and value.device.type != "cpu":
            self._waiting.append((curve, step, value.detach().clone()))
            if len(self._waiting) >= _MOST:
                self.fetch()
        elif value is not None:
            curve.append(step, float(value))

    def fetch(self) -> None:
        """Fetches all that wait in one transfer."""
        if not self._waiting:
            return
        device = self._waiting[0][2].device
        values = torch.stack([value.float().reshape(()).to(device) for _, _, value in self._waiting]).tolist()
        for (curve, step, _), value in zip(self._waiting, values, strict=True):
            curve.append(step, value)
        self._waiting = []

    def drop(self) -> None:
        """Forgets those that wait."""
        self._waiting = []


def curve_of(curves: dict[str, Curve], name: str) -> Curve:
    """The curve of this name, which is created if there is none."""
    return curves.setdefault(name, Curve())
