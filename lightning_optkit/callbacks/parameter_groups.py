# SPDX-License-Identifier: Apache-2.0
"""Parameter groups for the optimizers of an unchanged LightningModule."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lightning_optkit._checks import check_bools
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.configured import optimizers_in, schedulers_in
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.parameter_numbers import number_by_module
from lightning_optkit.optimizers._group_rules import GroupRules, NoDecay
from lightning_optkit.optimizers._regroup import regroup_
from lightning_optkit.optimizers.groups import NO_DECAY, GroupTable

__all__ = ["ParameterGroups"]


class ParameterGroups(FitCallback):
    """Groups for weight decay and layer-wise rates: splits those of any optimizer that `configure_optimizers` returns.

    That is done before the optimizer has state. It remains the same object, and a group keeps all other entries: the
    user's own groups are split further, layer-wise learning rates are relative to that of their group, and the base
    values of its schedulers are split too. Works before and after `Fuse`, and with the single unnamed group that
    LightningCLI builds. A checkpoint contains the groups it was written with, so resume it with the same callback.

    Args:
        weight_decay: Weight decay of the parameters that decay, in [0, inf). Default: that of their group.
        no_decay: Parameters without weight decay: module classes, and any of "norm", "bias", "embedding", "vector",
            "model" (listed by `no_weight_decay()` of a module), see `lightning_optkit.optimizers.parameter_groups`.
        layer_decay: Ratio of the rates of a layer and the next one toward the output, in (0, 1].
        layers: fnmatch patterns of names, from input to output. Default: found as in `parameter_groups`.
        overrides: Group entries by pattern of the parameter's name, see `parameter_groups`.
        verbose: Print the groups as a table when the fit starts.

    Raises:
        ValueError: for an argument out of range; when the optimizer is built, for a pattern that matches nothing or an
            entry that the optimizer does not have.

    Example:
        >>> groups = ParameterGroups(weight_decay=0.05, layer_decay=0.75, overrides={"head.*": {"lr": 1e-3}})
        >>> trainer = pl.Trainer(callbacks=[groups], logger=False)
    """

    def __init__(
        self,
        weight_decay: float | None = None,
        *,
        no_decay: NoDecay = NO_DECAY,
        layer_decay: float | None = None,
        layers: Sequence[str] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        verbose: bool = True,
    ) -> None:
        self._rules = GroupRules(type(self).__name__, weight_decay, no_decay, layer_decay, layers, overrides)
        check_bools(type(self).__name__, verbose=verbose)
        self._verbose = verbose
        self._arguments = dict(
            weight_decay=weight_decay, no_decay=no_decay, layer_decay=layer_decay, layers=layers, overrides=overrides
        )
        self._tables: list[GroupTable] = []

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if callbacks_of(trainer, ParameterGroups, but=self):
            raise ValueError(f"{type(self).__name__}(...): given twice; one groups every optimizer.")
        number_by_module(trainer)
        self._tables = []
        original = pl_module.configure_optimizers

        def configure_optimizers() -> Any:
            configured = original()
            for optimizer in optimizers_in(configured):
                table = regroup_(optimizer, pl_module, self._rules, schedulers_in(configured))
                self._tables += [table] if table is not None else []
            return configured

        self._override(pl_module, "configure_optimizers", configure_optimizers)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for table in self._tables if self._verbose else ():
            rank_zero_info(f"ParameterGroups:\n{table}")

    def _forget(self) -> None:
        self._tables = []
