# SPDX-License-Identifier: Apache-2.0
"""What a run has switched in its module: layers in or out of training mode, parameters frozen or not.

No checkpoint has it, and a run that goes on within an epoch does not call `on_train_epoch_start`, where it is switched.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning_utilities.core.rank_zero import rank_zero_info

__all__ = ["Switches"]

_SHOWN = 3  # names in a message


class Switches:
    """Compares the switches of a module with those it had as the fit began: only changes are a part of the run.

    Args:
        pl_module: The module, before the hooks of its first epoch.
    """

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._module = pl_module
        self._at_start = _switches_of(pl_module)
        self._before_validation: dict[str, dict[str, bool]] | None = None  # in which all layers evaluate

    def validate(self, run: Callable[[], Any]) -> Any:
        """Runs a validation; within it the switches are those before."""
        self._before_validation = self._changed()
        result = run()
        self._before_validation = None
        return result

    def changed(self) -> dict[str, dict[str, bool]]:
        """By kind and name, in plain types."""
        return self._changed() if self._before_validation is None else self._before_validation

    def give_back(self, saved: dict[str, dict[str, bool]]) -> None:
        """Switches what the run that was saved had switched, and says so; names that are not here are left out."""
        modules, params = dict(self._module.named_modules()), dict(self._module.named_parameters())
        names = []
        for kind, each in saved.items():  # the module may be that of the fit before, which has switched them already
            self._at_start[kind] |= {name: not value for name, value in each.items()}
        for name, is_training in saved.get("training", {}).items():
            if name in modules and modules[name].training != is_training:
                modules[name].training = is_training
                names.append(name or type(self._module).__name__)
        for name, trains in saved.get("requires_grad", {}).items():
            if name in params and params[name].requires_grad != trains:
                params[name].requires_grad_(trains)
                names.append(name)
        if names:
            more = f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
            rank_zero_info(
                f"ExactResume: {', '.join(names[:_SHOWN])}{more}: training mode or requires_grad as the run that was "
                "saved had set it."
            )

    def _changed(self) -> dict[str, dict[str, bool]]:
        now = _switches_of(self._module)
        return {
            kind: {name: value for name, value in now[kind].items() if self._at_start[kind].get(name, value) != value}
            for kind in now
        }


def _switches_of(pl_module: Any) -> dict[str, dict[str, bool]]:
    return {
        "training": {name: module.training for name, module in pl_module.named_modules()},
        "requires_grad": {name: param.requires_grad for name, param in pl_module.named_parameters()},
    }
