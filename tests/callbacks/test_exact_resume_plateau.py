# SPDX-License-Identifier: Apache-2.0
"""torch's ReduceLROnPlateau is stepped once per epoch, wherever the run was saved and whatever it monitors."""

import warnings
from itertools import product

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume, PlateauSchedule

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = 6


class Reduced(pl.LightningModule):
    def __init__(self, scheduler):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.scheduler, self.validated = nn.Linear(2, 1), scheduler, []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0] + torch.rand(1)).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", (self.net(batch[0]) + self.global_step % 5).square().mean())
        self.validated.append(self.global_step)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.03)
        if self.scheduler is None:
            return optimizer
        scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.scheduler}}


class SaveIn(pl.callbacks.Checkpoint):
    """Saves in a hook of an epoch, as often as it is called; the last file counts."""

    def __init__(self, path, hook, when):
        self.path, self.when = path, when
        setattr(self, hook, self.save)

    def save(self, trainer, *args):
        if not trainer.sanity_checking and self.when in (None, (trainer.current_epoch, trainer.fit_loop.batch_idx)):
            trainer.save_checkpoint(self.path)
            self.when = ()


def fit(scheduler, ckpt_path=None, callbacks=(), path=None, make=Reduced, **kwargs):
    torch.manual_seed(1 if ckpt_path is None else 2)
    data = TensorDataset(torch.linspace(-1, 1, 4 * BATCHES).view(-1, 2))
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        callbacks=[ExactResume(), *callbacks],
        **{"max_epochs": 4, **kwargs},
    )
    module = make(scheduler)
    trainer.fit(module, DataLoader(data, 2, shuffle=True), DataLoader(data, 6), ckpt_path=ckpt_path)
    if path is not None:
        trainer.save_checkpoint(path)
    steps = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    return module.net.weight.tolist(), rates, steps, module.validated


HOOKS = [
    ("on_train_batch_end", (1, 2)),
    ("on_train_batch_end", (1, 3)),
    ("on_train_batch_end", (1, BATCHES - 1)),
    ("on_validation_end", (1, BATCHES - 1)),
    ("on_train_epoch_end", (1, BATCHES - 1)),
    ("on_train_batch_start", (1, 3)),
]
SCHEDULERS = {
    "validation": (dict(monitor="val"), {}),
    "epoch": (dict(monitor="loss_epoch"), {}),
    "every second epoch": (dict(monitor="val", frequency=2), {}),
    "validation within the epoch": (dict(monitor="val"), dict(val_check_interval=3)),
    "windows": (dict(monitor="val"), dict(accumulate_grad_batches=4)),
    "by steps": (dict(monitor="loss_step", interval="step", frequency=3), {}),
    "validation by steps": (
        dict(monitor="val", interval="step", frequency=3, strict=False),
        dict(val_check_interval=3),
    ),
    "so many steps": (dict(monitor="val"), dict(max_steps=20)),
}


@pytest.mark.parametrize("hook", HOOKS, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_is_stepped_as_without_the_interruption(tmp_path, name, hook):
    scheduler, kwargs = SCHEDULERS[name]
    save = SaveIn(tmp_path / "saved.ckpt", *hook)
    whole = fit(scheduler, callbacks=[save], **kwargs)
    if not (tmp_path / "saved.ckpt").exists():
        pytest.fail(f"nothing was saved in {hook}")
    resumed = fit(scheduler, tmp_path / "saved.ckpt", **kwargs)
    assert resumed[:3] == whole[:3]
    assert resumed[3] == whole[3][-len(resumed[3]) :]


class Counted(Reduced):
    """Logs the number of batches of the epoch, and notes what was measured in each epoch."""

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self.measured = {}

    def training_step(self, batch, batch_idx):
        self.log("batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        return super().training_step(batch, batch_idx)

    def on_train_epoch_start(self):
        self.note(self.current_epoch - 1)

    def on_train_end(self):
        self.note(self.trainer.max_epochs - 1)

    def note(self, epoch):
        metrics = self.trainer.callback_metrics
        self.measured[epoch] = {name: float(metrics[name]) for name in ("loss_epoch", "batches") if name in metrics}


@pytest.mark.parametrize("hook", [*HOOKS, ("on_train_epoch_end", (0, BATCHES - 1))], ids=str)
def test_what_is_measured_in_an_epoch_is_of_its_batches_alone(tmp_path, hook):
    made = []

    def make(scheduler):
        made.append(Counted(scheduler))
        return made[-1]

    fit(None, callbacks=[SaveIn(tmp_path / "saved.ckpt", *hook)], make=make)
    fit(None, tmp_path / "saved.ckpt", make=make)
    whole, resumed = (module.measured for module in made)
    assert all(whole[epoch]["batches"] == BATCHES for epoch in range(4))
    assert {epoch: resumed[epoch] for epoch in range(2, 4)} == {epoch: whole[epoch] for epoch in range(2, 4)}
    assert all(resumed[epoch] == whole[epoch] for epoch in resumed if epoch >= hook[1][0])


class Extremes(Counted):
    """Logs by each kind of reduction, before what may fail."""

    def training_step(self, batch, batch_idx):
        for kind in ("mean", "max", "min", "sum"):
            self.log(kind, batch[0].mean() * (1 + batch_idx), on_step=False, on_epoch=True, reduce_fx=kind)
        return super().training_step(batch, batch_idx)

    def note(self, epoch):
        metrics = self.trainer.callback_metrics
        names = ("loss_epoch", "batches", "mean", "max", "min", "sum")
        self.measured[epoch] = {name: float(metrics[name]) for name in names if name in metrics}


class Fails(pl.Callback):
    """In a hook of a batch, once."""

    def __init__(self, hook, when):
        self.when = when
        setattr(self, hook, self.fail)

    def fail(self, trainer, *args):
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.when:
            raise RuntimeError("fails")


@pytest.mark.parametrize("when", [(0, 0), (1, 0), (1, 2), (1, BATCHES - 1)], ids=str)
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step"])
def test_a_batch_that_failed_and_is_repeated_counts_once_in_what_is_measured(tmp_path, hook, when):
    made = []

    def make(scheduler):
        made.append(Extremes(scheduler))
        return made[-1]

    fit(None, make=make)
    with pytest.raises(RuntimeError, match="fails"):
        fit(None, callbacks=[Fails(hook, when), OnExceptionCheckpoint(tmp_path, "x")], make=make)
    with pytest.raises(RuntimeError, match="fails"):  # once more, in the first batch after a resume
        fit(None, tmp_path / "x.ckpt", [Fails(hook, when), OnExceptionCheckpoint(tmp_path, "y")], make=make)
    for name in "xy":
        fit(None, tmp_path / f"{name}.ckpt", make=make)
    whole, *_, once, twice = (module.measured for module in made)
    for resumed in (once, twice):
        assert len(resumed[when[0]]) == 6
        assert {epoch: resumed[epoch] for epoch in range(when[0], 4)} == {n: whole[n] for n in range(when[0], 4)}


class Rarely(Reduced):
    """Logs in two batches of each epoch, in another hook too, and notes what the Trainer has after each batch."""

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self.seen = {}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx in (1, 2):
            for reduction in ("mean", "max", "sum"):
                self.log(reduction, loss.detach(), on_step=False, on_epoch=True, reduce_fx=reduction)
            self.log("both", loss.detach(), on_step=True, on_epoch=True)
            self.log("step", loss.detach(), on_step=True, on_epoch=False)
        return loss

    def on_before_zero_grad(self, optimizer):
        if self.trainer.fit_loop.batch_idx == 1:
            self.log("elsewhere", self.net.weight.detach().sum(), on_step=False, on_epoch=True)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        metrics = self.trainer._results.metrics(on_step=True)["log"]
        self.seen[self.global_step] = {name: float(value) for name, value in metrics.items()}

    def on_train_epoch_end(self):
        metrics = self.trainer._results.metrics(on_step=False)["callback"]
        self.seen[f"epoch {self.current_epoch}"] = {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize("batch", [0, 1, 2, 3, 4], ids=str)
def test_what_is_logged_in_some_batches_alone_is_not_lost(tmp_path, batch):
    made = []

    def make(scheduler):
        made.append(Rarely(scheduler))
        return made[-1]

    fit(None, callbacks=[SaveIn(tmp_path / "saved.ckpt", "on_train_batch_start", (1, batch))], make=make)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*was called before the ``update`` method")
        fit(None, tmp_path / "saved.ckpt", make=make)
    whole, resumed = (module.seen for module in made)
    assert {"mean", "max", "sum", "both_epoch", "elsewhere"} <= resumed["epoch 1"].keys()
    assert resumed == {when: whole[when] for when in resumed}


@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_a_schedule_of_this_package(tmp_path, hook):
    make = lambda: PlateauSchedule("val", factor=0.5, patience=0, threshold=0.3, verbose=False)  # noqa: E731
    whole = fit(None, callbacks=[make(), SaveIn(tmp_path / "saved.ckpt", *hook)])
    assert fit(None, tmp_path / "saved.ckpt", [make()])[:2] == whole[:2]


class Stop(pl.Callback):
    def __init__(self, when):
        self.when = when

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.when:
            trainer.should_stop, self.when = True, None


def judges():
    """A schedule and a criterion that judge each validation, and one that judges each epoch."""
    at_end = EarlyStopping("loss_epoch", patience=1, check_on_train_epoch_end=True, check_finite=False)
    at_end.verbose = False
    schedule = PlateauSchedule("val", factor=0.5, patience=0, threshold=0.3, verbose=False)
    return [schedule, EarlyStopping("val", patience=9, check_on_train_epoch_end=False), at_end]


def states(callbacks):
    return [callback.state_dict() for callback in callbacks]


def cuts():
    """How an epoch is cut, after which batch, when it is validated, and where the run is saved."""
    for when, saved, interval in product([(0, 2), (1, 1), (1, 3), (2, 0)], ["fit", "epoch", "validation"], [None, 2]):
        is_due = interval is not None and when[1] % interval == 1
        yield "should_stop", when, saved, interval
        if saved != "validation" or is_due:
            yield "max_steps", when, saved, interval


@pytest.mark.parametrize(("how", "when", "saved", "interval"), list(cuts()), ids=str)
def test_a_cut_epoch_is_judged_once(tmp_path, how, when, saved, interval):
    path = tmp_path / "saved.ckpt"
    kwargs = {} if interval is None else dict(val_check_interval=interval)
    stop = dict(max_steps=BATCHES * when[0] + when[1] + 1) if how == "max_steps" else {}
    hook = {"epoch": "on_train_epoch_end", "validation": "on_validation_end"}.get(saved)
    first = [*judges(), *([] if stop else [Stop(when)]), *([SaveIn(path, hook, when)] if hook else [])]
    fit(None, callbacks=first, path=None if hook else path, **kwargs, **stop)
    resumed, whole = judges(), judges()
    assert fit(None, path, resumed, **kwargs)[:2] == fit(None, callbacks=whole, **kwargs)[:2]
    assert str(states(resumed)) == str(states(whole))


class Late(Reduced):
    def on_train_epoch_end(self):
        self.log("late", self.net.weight.detach().square().mean())


@pytest.mark.parametrize("kind", [pl.Callback, pl.callbacks.Checkpoint])
def test_a_metric_that_is_logged_after_the_save_is_said(tmp_path, kind):
    class Save(kind):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "saved.ckpt")

    whole = fit(dict(monitor="late"), callbacks=[Save()], make=Late)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        resumed = fit(dict(monitor="late"), tmp_path / "saved.ckpt", make=Late)
    lines = [str(each.message) for each in said if "misses the step of that epoch" in str(each.message)]
    assert len(lines) == (kind is pl.Callback)
    assert (resumed[:3] == whole[:3]) == (not lines)


def test_a_step_after_the_last_batch_of_a_cut_epoch_is_not_taken_twice(tmp_path):
    scheduler, kwargs = SCHEDULERS["validation by steps"]
    fit(scheduler, path=tmp_path / "saved.ckpt", max_steps=BATCHES + 3, **kwargs)
    assert fit(scheduler, tmp_path / "saved.ckpt", **kwargs)[:3] == fit(scheduler, **kwargs)[:3]


LATE = {"by epochs": dict(monitor="val", strict=False), "by steps": dict(monitor="val", strict=False, interval="step")}


@pytest.mark.parametrize("saved", ["fit", "on_train_epoch_end", "on_validation_end"])
@pytest.mark.parametrize("name", [None, *LATE])
@pytest.mark.parametrize("batch", [BATCHES - 1, BATCHES - 2], ids=["last batch", "within"])
def test_a_validation_that_only_the_stop_has_made_is_judged_by_nothing(tmp_path, batch, name, saved):
    """No validation is due after the last batch of an epoch, nor after the one before; the run stops there."""
    scheduler, path, kwargs = LATE.get(name), tmp_path / "saved.ckpt", dict(val_check_interval=4)
    hook = None if saved == "fit" else saved
    first = [*judges(), Stop((1, batch)), *([SaveIn(path, hook, (1, batch))] if hook else [])]
    schedules = slice(1, None) if name else slice(None)  # one schedule alone
    first, resumed, whole = first[schedules], judges()[schedules], judges()[schedules]
    fit(scheduler, callbacks=first, path=None if hook else path, **kwargs)
    expected = fit(scheduler, callbacks=whole, **kwargs)
    assert fit(scheduler, path, resumed, **kwargs)[:3] == expected[:3]
    assert str(states(resumed)) == str(states(whole))


def test_the_metrics_of_that_validation_are_shown(tmp_path):
    class Show(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            self.last = float(trainer.callback_metrics["val"])

        def on_train_end(self, trainer, pl_module):
            self.shown = float(trainer.callback_metrics["val"])

    show = Show()
    fit(None, callbacks=[Stop((1, BATCHES - 1)), show], val_check_interval=4)
    assert show.shown == show.last
