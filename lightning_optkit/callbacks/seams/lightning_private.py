# SPDX-License-Identifier: Apache-2.0
"""Every private name of Lightning that this package uses, under a name of its own; no other file uses one.

Undocumented names of its loops count as private too. `tests/test_private_names.py` finds others, and missing ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import lightning.pytorch as pl
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import RestartStage
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_optkit._torch_private import is_compiled_part
from lightning_optkit.callbacks.seams.torchmetrics_private import count_update

DataFetcher: TypeAlias = _DataFetcher  # provides the batches of an epoch
Loop: TypeAlias = _Loop
HasState: TypeAlias = _Stateful  # a loader that Lightning saves and restores itself
set_sampler_epoch = _set_sampler_epoch  # Lightning calls it at each epoch

# --- callbacks and modules ---


def key_of_state(callback: pl.Callback, **values: object) -> str:
    """A `state_key` that includes these values, in Lightning's own format."""
    return callback._generate_state_key(**values)


def before_batch_transfer(pl_module: pl.LightningModule, batch: Any) -> Any:
    """The result of the module's or data module's `on_before_batch_transfer` for a batch of its first loader."""
    return pl_module._on_before_batch_transfer(batch, dataloader_idx=0)


def is_compiled(pl_module: pl.LightningModule) -> bool:
    """Whether the module, or a module in it, was passed through torch.compile."""
    return pl_module._compiler_ctx is not None or any(is_compiled_part(module) for module in pl_module.modules())


# --- the data of a fit ---

FETCHES = "iterator_wrapper"  # of the fetcher for `training_step(dataloader_iter)`: `next` of that fetches a batch
LOADER_IS_READY = "_load_combined_loader_states"  # method of the fit loop, called last before iter() of a new loader
BEFORE_FETCH = "_on_before_fetch"  # method of the epoch loop, called before each fetch, unlike any hook
BEFORE_EPOCH = "on_run_start"  # method of the epoch loop: hooks are called only after its iter()
RESET = "reset"  # method of the epoch loop, called before that; it warns of loaders that do not restore themselves
AFTER_BATCH = "on_advance_end"  # method of the epoch loop, after a batch's last hook: validation, schedulers, counts
AFTER_EPOCH = "on_advance_end"  # method of the fit loop: hooks of the epoch's end, schedulers, counts
SET_UP_DATA = "setup_data"  # method of the fit loop: called at its start, and before each epoch that reloads
# Methods of the fit loop; the second is called only if there is something to train.
TRAIN, BEFORE_TRAINING = "run", "on_run_start"
# Methods of the validation loop; both start its loader. The second replaces a validation that is skipped on resuming.
VALIDATIONS = ("run", "increment_progress_to_evaluation_end")
LAST_RELOADS = "_last_train_dl_reload_epoch", "_last_val_dl_reload_epoch"  # of the loops of training and validation
VALIDATION_ENDS = "_on_evaluation_end"  # method of the validation loop: its last hook, after its metrics are computed


def train_source(trainer: pl.Trainer) -> Any:
    """Lightning's source of the training loader: its `dataloader()` is the user's, unmodified."""
    return trainer.fit_loop._data_source


def train_loaders(trainer: pl.Trainer) -> CombinedLoader | None:
    """The training loaders as created by Lightning, or None before; `train_dataloader` has them in the user's form."""
    return trainer.fit_loop._combined_loader


def fetcher_of(trainer: pl.Trainer) -> _DataFetcher | None:
    """The source of training batches; None outside of training."""
    return trainer.fit_loop._data_fetcher


def loaders_of(fetcher: _DataFetcher) -> CombinedLoader:
    """The loaders of a fetcher."""
    return fetcher.combined_loader


def iterator_of(loaders: CombinedLoader) -> Any:
    """The current iterator over the loaders, or None; `iter(loaders)` would start a new one."""
    return loaders._iterator


def set_fetched(fetcher: _DataFetcher, batches: int) -> None:
    """Sets how many batches of the epoch a fetcher takes for fetched, from which it knows the last one."""
    fetcher.fetched = batches


def reads_in_turn(loaders: CombinedLoader) -> bool:
    """Whether it iterates over its loaders one after another."""
    return loaders._mode == "sequential"


def limited_batches(length: float, limit: float) -> float:
    """Batches of a training epoch over a loader of this length, after `limit_train_batches`."""
    return _parse_num_batches(RunningStage.TRAINING, length, limit)


def limit_epoch(trainer: pl.Trainer, loaders: CombinedLoader, batches: float) -> None:
    """Sets the number of batches of the starting epoch; Lightning computes it only when it creates the loaders."""
    loaders.limits, trainer.fit_loop.max_batches = [batches], batches


def replace_argument(loader: DataLoader[Any], name: str, value: object) -> None:
    """Changes a recorded constructor argument, from which Lightning recreates the loader with another sampler."""
    saved = vars(loader)
    if "__pl_saved_kwargs" not in saved:
        return
    names = saved["__pl_saved_arg_names"]
    if name in names:
        args = list(saved["__pl_saved_args"])
        args[names.index(name)] = value
        saved["__pl_saved_args"] = tuple(args)
    else:
        saved["__pl_saved_kwargs"] = {**saved["__pl_saved_kwargs"], name: value}


# --- position of a fit ---


def epoch_progress(trainer: pl.Trainer) -> Any:
    """Counters of epochs; `current_epoch` lags behind while a checkpoint is restored."""
    return trainer.fit_loop.epoch_progress


def batch_progress(trainer: pl.Trainer) -> Any:
    """Counters of batches, in this epoch and in total, saved in every checkpoint."""
    return trainer.fit_loop.epoch_loop.batch_progress


def validation_of(trainer: pl.Trainer) -> tuple[Any, Any]:
    """The loop of the validations of a fit, and its counters of batches."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    return loop, loop.batch_progress


def saved_progress(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The counters of batches, of epochs and of a validation's batches in a checkpoint; changes are those of it."""
    loop = checkpoint["loops"]["fit_loop"]
    return loop["epoch_loop.batch_progress"], loop["epoch_progress"], loop["epoch_loop.val_loop.batch_progress"]


def accumulates(trainer: pl.Trainer) -> bool:
    """Whether no optimizer step follows the current batch."""
    return trainer.fit_loop._should_accumulate()


def scheduler_progress(trainer: pl.Trainer) -> Any:
    """Counters of the steps of schedulers."""
    return trainer.fit_loop.epoch_loop.scheduler_progress


def logged_in_training_step(trainer: pl.Trainer) -> dict[str, Tensor]:
    """What `training_step` logged per step, by name, for this batch."""
    values = {item.meta.name: item._forward_cache for item in _training_results(trainer) if item.meta.on_step}
    return {name: value for name, value in values.items() if isinstance(value, Tensor) and value.numel() == 1}


def logged_per_epoch(trainer: pl.Trainer) -> list[str]:
    """Names of what `training_step` logs per epoch alone; `trainer.callback_metrics` has it in on_train_epoch_end."""
    return [item.meta.name for item in _training_results(trainer) if not item.meta.on_step]


def _training_results(trainer: pl.Trainer) -> list[Any]:
    results = trainer._results
    items = [] if results is None else [item for _, item in results.valid_items()]
    return [item for item in items if item.meta.fx.startswith("training_step")]


def last_metrics(trainer: pl.Trainer) -> dict[str, Tensor]:
    """`trainer.callback_metrics` as last computed; a dict that may be changed."""
    return trainer._logger_connector._callback_metrics


def training_results(trainer: pl.Trainer) -> dict[str, Any]:
    """What the hooks of training have logged in this epoch, by hook and name; logged by its `log`."""
    return trainer.fit_loop.epoch_loop._results


UPDATE_RESULT = "update_metrics"  # method of these results, called with the key of one that is logged
_META = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
_SUMS = ("value", "cumulated_batch_size", "_forward_cache")  # the last: that of a step, logged again until the next


def sums_of(result: Any, held: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What was logged and summed in an epoch, or `held`, in plain types; None for torchmetrics and own groups."""
    meta = result.meta
    if not result.is_tensor or result.has_reset or meta.sync.group is not None:
        return None
    facts = {name: getattr(meta, name) for name in _META}
    facts |= {"reduce_fx": meta.reduce_fx.__name__, "sync": [meta.sync.should, meta.sync.rank_zero_only]}
    held = held_by(result) if held is None else held
    return {"meta": facts, "sums": {name: value.detach().cpu() for name, value in held.items()}}


def held_by(result: Any) -> dict[str, Any]:
    """References to the sums of one: Lightning adds a value by a new tensor."""
    return {name: value for name in _SUMS if (value := getattr(result, name, None)) is not None}


def result_of(trainer: pl.Trainer, saved: dict[str, Any]) -> Any:
    """A result with the sums of `sums_of`."""
    facts = dict(saved["meta"])
    should, first_process_only = facts.pop("sync")
    meta = _Metadata(**facts)
    meta.sync = _Sync(_should=should, fn=trainer.strategy.reduce, rank_zero_only=first_process_only)
    result = _ResultMetric(meta, is_tensor=True)
    set_sums(result, saved)
    return result.to(trainer.strategy.root_device)


def set_sums(result: Any, saved: dict[str, Any]) -> None:
    """Gives a result the sums of `sums_of`."""
    for name, value in saved["sums"].items():
        setattr(result, name, value.to(result.value.device))
    count_update(result)
    result.has_reset = False


def logs_now(trainer: pl.Trainer) -> bool:
    """Whether this step is logged according to `log_every_n_steps`."""
    return trainer._logger_connector.should_update_logs


def resumes(trainer: pl.Trainer) -> bool:
    """Whether the starting epoch is the first after a checkpoint, including those of Lightning's own finders."""
    return trainer.fit_loop.is_resuming


def restarts_epoch(trainer: pl.Trainer) -> bool:
    """Whether the starting epoch continues from the position of a checkpoint."""
    return bool(trainer.fit_loop.epoch_loop.restarting)


def restarts(trainer: pl.Trainer) -> bool:
    """Whether the fit loop has not yet begun its first epoch after a checkpoint."""
    return bool(trainer.fit_loop.restarting)


def restarted_mid_epoch(trainer: pl.Trainer) -> bool:
    """Whether the fit continues from a checkpoint written within an epoch."""
    return trainer.fit_loop.restarted_mid_epoch


def is_in_last_hook(trainer: pl.Trainer) -> bool:
    """Whether the last hook of a batch is running, before what follows the batch."""
    current = batch_progress(trainer).current
    return bool(current.ready == current.processed == current.completed + 1)


def is_cut(trainer: pl.Trainer) -> bool:
    """Whether batches of the current epoch are left."""
    return not trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def stops_now(trainer: pl.Trainer, fetcher: _DataFetcher) -> bool:
    """Whether the run stops after this batch, within an epoch, or where it validates but for that would not."""
    loop: Any = trainer.fit_loop
    validates = loop.epoch_loop._should_check_val_fx
    if not (trainer.should_stop and loop._can_stop_early and (is_cut(trainer) or validates(fetcher))):
        return False
    trainer.should_stop = False
    try:
        return not validates(fetcher)
    finally:
        trainer.should_stop = True


def can_stop(trainer: pl.Trainer) -> bool:
    """Whether the run has its `min_epochs` and `min_steps`, until which it goes on though it was told to stop."""
    return trainer.fit_loop._can_stop_early


def has_all_but_no_validation(trainer: pl.Trainer, fetcher: _DataFetcher) -> bool:
    """Whether an epoch is restarted in a validation that a stop made after its last batch; Lightning would train on."""
    loop: Any = trainer.fit_loop.epoch_loop
    return bool(loop.restarting) and not is_cut(trainer) and not loop._should_check_val_fx(fetcher)


def end_restart_of_epoch(trainer: pl.Trainer) -> None:
    """The batches go on as if the run had not been interrupted; called after the epoch loop was reset."""
    trainer.fit_loop.epoch_loop.restarting = False


def end_restart(trainer: pl.Trainer) -> None:
    """The epoch ends as if the run had not been interrupted: Lightning steps no ReduceLROnPlateau otherwise."""
    trainer.fit_loop._restarting = False


def leave_finished_epoch(trainer: pl.Trainer) -> None:
    """Lets the next epoch begin as after one that was not interrupted.

    With `max_steps`, Lightning would run one more batch of an epoch that was saved at its end, or after the fit.
    It would leave out an epoch that was saved in its first hook. After one that was saved at the end of its last batch
    it does not count the next, and a save in that is taken for one between two epochs.
    """
    loop: Any = trainer.fit_loop
    epoch = loop.epoch_progress
    if loop.restarted_on_epoch_start:
        epoch.total.ready = epoch.current.ready = epoch.total.started  # it is counted again, its hooks are called again
    elif loop.restarted_on_epoch_end:
        epoch.increment_completed()
    elif loop.restarted_mid_epoch and epoch.total.processed == epoch.total.started:
        loop.reset_restart_stage()  # its progress was counted when the loop was reset
        return
    elif not loop.restarting or loop._restart_stage != RestartStage.NONE:
        return
    _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]  # the loop's own setter takes no False then
    for part in (loop, loop.epoch_loop):
        part.reset_restart_stage()


# --- signals ---

# Methods of the Trainer's signal connector: the handlers of SIGTERM, and of SLURM's signal before the end of its time.
ON_SIGTERM, ON_REQUEUE = "_sigterm_notifier_fn", "_slurm_sigusr_handler_fn"
ASK_FIRST_PROCESS = "_broadcast_sigterm_tensor"  # method of the epoch loop, called before each batch


def signals_of(trainer: pl.Trainer) -> Any:
    """The object that registers handlers of signals when the loops start."""
    return trainer._signal_connector


def stop_by_sigterm(trainer: pl.Trainer) -> None:
    """Makes `trainer.received_sigterm` true."""
    trainer._signal_connector.received_sigterm = True


# --- a run within a run ---


def nested_run(trainer: pl.Trainer, max_steps: int) -> None:
    """Runs the fit loop for up to `max_steps` more steps, over as many epochs as that takes.

    The caller restores the loops from a checkpoint that was saved before.
    """
    loop: Any = trainer.fit_loop
    limits = {name: getattr(loop, name) for name in ("max_epochs", "min_epochs")}
    steps = loop.epoch_loop.max_steps, loop.epoch_loop.min_steps
    loop.max_epochs, loop.min_epochs = -1, None
    loop.epoch_loop.max_steps, loop.epoch_loop.min_steps = trainer.global_step + max_steps, None
    forget_restart(trainer)
    try:
        loop.run()
    finally:
        loop.epoch_loop.max_steps, loop.epoch_loop.min_steps = steps
        for name, value in limits.items():
            setattr(loop, name, value)
        loop._combined_loader = loop.epoch_loop.val_loop._combined_loader = None  # the next run creates new ones


def forget_restart(trainer: pl.Trainer) -> None:
    """The next run of the fit loop begins afresh, although its state was loaded."""
    loop: Any = trainer.fit_loop
    loop.restarting = loop.epoch_loop.restarting = False


def whole_state(trainer: pl.Trainer) -> dict[str, Any]:
    """What a checkpoint of this moment would hold; not a copy."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def restore_whole_state(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Restores what `whole_state` returned, as from a checkpoint."""
    connector = trainer._checkpoint_connector
    connector._loaded_checkpoint = state
    connector.restore_datamodule()
    connector.restore_model()
    connector.restore_callbacks()
    connector.restore_training_state()
    connector._loaded_checkpoint = {}


# --- checkpoints ---

# Of ModelCheckpoint: the method that saves its state; the step at which it did last; whether it waits for a validation.
WRITES_FILE, SAVED_AT, WAITS = "_save_checkpoint", "_last_global_step_saved", "_defer_save_until_validation"

CLASS_OF_MODULE, BUILT_BY = "_class_path", "_instantiator"  # among the hyperparameters that LightningCLI saves


def saves_shards(strategy: ModelParallelStrategy) -> bool:
    """Whether each process writes its part of a checkpoint; `save_distributed_checkpoint` is stored privately."""
    return strategy._save_distributed_checkpoint


def set_loaded_path(trainer: pl.Trainer, path: Path) -> None:
    """Makes `trainer.ckpt_path` that of the checkpoint that is loaded; its setter would be for all later fits."""
    trainer._checkpoint_connector._ckpt_path = path
