# SPDX-License-Identifier: Apache-2.0
"""Fits data transforms on the training set, applies them in every stage, and saves them in checkpoints."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, check_callable, shown
from lightning_optkit.callbacks.seams.batch_fields import Field, check_field, field_of, with_field
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_private import before_batch_transfer, key_of_state
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.callbacks.seams.run import Run
from lightning_optkit.callbacks.seams.training_set import TrainingSet
from lightning_optkit.data import fit_in_order

__all__ = ["Preprocess"]


class Preprocess(FitCallback):
    """Replaces one field of every batch by its transform, which is fitted on the training set.

    The transform is fitted when a fit begins, only on the rows of `train_dataloader`, each read once per fitted stage:
    in order, by all ranks together, without the rows that a DistributedSampler repeats, and without using the run's
    random numbers. A resumed run uses the statistics in the checkpoint; an already fitted transform is used unchanged.
    Batches of every stage, including validation, test and prediction, are transformed on the device, after the hooks
    `on_before_batch_transfer` ... `on_after_batch_transfer`; in a stage whose batch is a bare tensor (a prediction
    loader), the tensor is the field. Several of these callbacks are applied in their order.

    With "bf16-true" and "16-true" the field is rounded after the transform, not before (unless a hook adds it to the
    batch): 1e6 in bfloat16 is too coarse to standardize. A float64 field stays float64; end with the stage
    `torch.Tensor.float` for a float32 model.

    To use the model without this callback, prepend the transform: `nn.Sequential(preprocess.transform, model)` can be
    saved and exported (`torch.export`) like any module. From a checkpoint alone:
    `preprocess.load_state_dict(torch.load(path)["callbacks"][preprocess.state_key])`. `inverse` undoes the transform.

    Args:
        transform: A transform of `lightning_optkit.data` (`Impute`, `Standardize`, `MinMaxScale`, `RobustScale`,
            `Whiten`, `OneHot`, `Vocabulary`), any module or function of the field, e.g. `functools.partial(resize,
            size=32)`, or several in order. Stages with `partial_fit` are fitted on the output of the previous stages.
        field: Position of the field in a batch: an index of a tuple or list, a name in a dict, dataclass or named
            tuple, or a list of these for nested batches.
        progress: Whether to show a progress bar if fitting takes longer than a second.

    Raises:
        TypeError: for a transform that is not callable, or a field that is neither an index nor a name.
        ValueError: when fitting, if a batch lacks the field, or the transform cannot be fitted.
        RuntimeError: if a run resumes from a checkpoint without this callback's statistics.

    Cost: one pass over the training set per fitted stage, before the first epoch; the transform per batch.

    Example:
        >>> from lightning_optkit.data import Impute, Standardize
        >>> inputs, target = Preprocess([Impute("median"), Standardize()]), Preprocess(Standardize(), field=1)
        >>> trainer = pl.Trainer(callbacks=[inputs, target], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        transform: Sequence[nn.Module | Callable[[Any], Any]] | nn.Module | Callable[[Any], Any],
        field: Field = 0,
        progress: bool = True,
    ) -> None:
        self.transform = nn.Sequential(*(_as_module(type(self).__name__, stage) for stage in _stages(transform))).eval()
        self.field, self._path = field, check_field(type(self).__name__, "field", field)
        check_bools(type(self).__name__, progress=progress)
        self._progress = progress
        self._inner: Callable[..., Any] | None = None  # the strategy's `batch_to_device` without this callback

    def inverse(self, x: Any) -> Any:
        """Undoes `transform` as far as every stage has an inverse, e.g. for predictions of a scaled target.

        Raises:
            ValueError: naming the first stage without an inverse.
        """
        stages: list[Any] = [*self.transform]
        for stage in reversed(stages):
            if not hasattr(stage, "inverse"):
                raise ValueError(f"{type(self).__name__}.inverse(x): {_name(stage)} has no inverse.")
            x = stage.inverse(x)
        return x

    @property
    def state_key(self) -> str:
        """Separate states for different fields, or different transforms of one field."""
        return key_of_state(self, field=self.field, transform=[_name(stage) for stage in self.transform])

    def state_dict(self) -> dict[str, Any]:
        """The statistics, on the CPU."""
        state = self.transform.state_dict()
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the statistics."""
        self.transform.load_state_dict(state_dict)

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        refuse_listed_twice(self, trainer)
        self.transform.to(trainer.strategy.root_device)
        self._at_end(self.transform.cpu)
        inner = self._inner = trainer.strategy.batch_to_device

        def batch_to_device(batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
            return self._apply(trainer, inner(batch, device=device, dataloader_idx=dataloader_idx))

        convert = trainer.precision_plugin.convert_input

        def convert_input(batch: Any) -> Any:
            return self._with_whole_field(batch, convert(batch))

        self._override(trainer.strategy, "batch_to_device", batch_to_device)
        self._override(trainer.precision_plugin, "convert_input", convert_input)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not Run(trainer).is_resuming:
            self._fit(trainer)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._require_fitted()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._require_fitted()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._undo()  # validation, test and prediction are preprocessed too

    # --- implementation ---

    @torch.no_grad()
    def _apply(self, trainer: pl.Trainer, batch: Any) -> Any:
        if not self._is_fitted() and trainer.state.fn == "fit" and not Run(trainer).is_resuming:
            self._fit(trainer)  # another callback reads a batch before the fit starts
        self._require_fitted()
        value = field_of(type(self).__name__, "field", batch, self._path)
        if value is None:  # one of several parallel loaders has ended
            return batch
        value = self.transform(value)
        plugin = trainer.precision_plugin
        value = type(plugin).convert_input(plugin, value)  # the instance's own keeps the field whole
        if isinstance(value, Tensor):
            value = value.to(trainer.strategy.root_device)
        return with_field(batch, self._path, value)

    def _with_whole_field(self, batch: Any, converted: Any) -> Any:
        """`converted` with the field of `batch`, since the transform needs the full precision."""
        try:
            value = field_of(type(self).__name__, "field", batch, self._path)
        except ValueError:  # a hook adds it later
            return converted
        return converted if value is None else with_field(converted, self._path, value)

    def _fit(self, trainer: pl.Trainer) -> None:
        unfitted = [_name(stage) for stage in self.transform if not getattr(stage, "fitted", True)]
        if not unfitted:
            return
        batches = TrainingSet(
            type(self).__name__, trainer, lambda batch: self._field(trainer, batch), progress=self._progress
        )
        fit_in_order(self.transform, _Present(batches), across_ranks=trainer.world_size > 1, keep_fitted=True)
        rank_zero_info(f"Preprocess: fitted {', '.join(unfitted)} for field {self.field!r} on the training set.")

    def _field(self, trainer: pl.Trainer, batch: Any) -> Any:
        """The field in a training batch, before this callback changes it."""
        assert self._inner is not None
        batch = trainer.precision_plugin.convert_input(batch)
        batch = before_batch_transfer(trainer.lightning_module, batch)
        return field_of(type(self).__name__, "field", self._inner(batch, device=None, dataloader_idx=0), self._path)

    def _is_fitted(self) -> bool:
        return all(getattr(stage, "fitted", True) for stage in self.transform)

    def _require_fitted(self) -> None:
        if not self._is_fitted():
            unfitted = next(_name(stage) for stage in self.transform if not getattr(stage, "fitted", True))
            raise RuntimeError(
                f"{type(self).__name__}(field={self.field!r}): {unfitted} is not fitted; fit without ckpt_path, or "
                "pass a checkpoint of a run with this callback, or a transform that is fitted."
            )

    def _forget(self) -> None:
        self._inner = None


class _Present:
    """The batches that have the field: of parallel loaders, one may end before the other."""

    def __init__(self, fields: TrainingSet) -> None:
        self._fields = fields

    def __iter__(self) -> Iterator[Any]:
        return (value for value in self._fields if value is not None)


class _Function(nn.Module):
    """A function as a stage."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


def _stages(transform: Any) -> list[Any]:
    if isinstance(transform, nn.Sequential | Sequence) and len(transform) and not isinstance(transform, str):
        return [stage for part in transform for stage in _stages(part)]
    return [transform]


def _as_module(owner: str, stage: Any) -> nn.Module:
    if isinstance(stage, nn.Module):
        return stage
    if not callable(stage) or (isinstance(stage, type) and issubclass(stage, nn.Module)):
        raise TypeError(
            f"{owner}(transform={shown(stage)}): transform must be a module, a function, or several of them, such as "
            "Standardize()."
        )
    return _Function(check_callable(owner, "transform", stage, "transform(x)"))


def _name(stage: nn.Module) -> str:
    if not isinstance(stage, _Function):
        return type(stage).__name__
    function = getattr(stage.function, "func", stage.function)  # for a functools.partial
    return getattr(function, "__name__", type(function).__name__)
