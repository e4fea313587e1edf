# SPDX-License-Identifier: Apache-2.0
"""A validation within which a run ends takes place whole in the run that goes on, and is judged once."""

import os
import signal
from itertools import cycle, product

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume, PlateauSchedule

pytestmark = pytest.mark.filterwarnings("ignore")
BATCHES = 6


class Ends(pl.LightningModule):
    """Ends itself at a place, of which `ended` tells; validation draws random numbers and has several loaders."""

    def __init__(self, ends=None, by=None, interval="epoch"):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.ends, self.by, self.interval = nn.Linear(2, 1), ends, by, interval
        self.measured, self.ended = {}, False

    def at(self, *place):
        if place == self.ends and not self.trainer.sanity_checking:
            self.ends, self.ended = None, True
            if self.by == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                raise self.by

    def training_step(self, batch, batch_idx):
        self.at("training", self.current_epoch, batch_idx)
        loss = self.net(batch[0] + torch.rand(1)).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_start(self):
        self.at("epoch", self.current_epoch)

    def on_validation_start(self):
        self.at("start", self.current_epoch, self.trainer.fit_loop.batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        place = (self.current_epoch, self.trainer.fit_loop.batch_idx)
        self.at("validation", *place, dataloader_idx, batch_idx)
        value = (self.net(batch[0] + torch.rand(1)) + self.global_step % 5).square().mean()
        self.log("val" if dataloader_idx == 0 else "other", value, add_dataloader_idx=False)

    def on_validation_epoch_end(self):
        self.at("epoch end", self.current_epoch, self.trainer.fit_loop.batch_idx)

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            metrics = self.trainer.callback_metrics
            self.measured[self.global_step] = {name: metrics[name].item() for name in ("val", "other")}

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.03)
        if self.interval is None:
            return optimizer
        scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, threshold=0.3)
        every = dict(interval=self.interval, frequency=3 if self.interval == "step" else 1, strict=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val", **every}}


class Logs(pl.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        self.rows.update({(name, step): value for name, value in metrics.items()})


def fit(folder, module, ckpt_path=None, callbacks=(), **kwargs):
    """What a run ends with: weights, rates, what judges, and the counts of validations; what it logs; its error."""
    torch.manual_seed(1 if ckpt_path is None else 2)
    data, logs = TensorDataset(torch.linspace(-1, 1, 4 * BATCHES).view(-1, 2)), Logs()
    best = ModelCheckpoint(folder, "{step}", monitor="val", save_top_k=2, enable_version_counter=False)
    judges = [
        EarlyStopping("val", patience=9, check_on_train_epoch_end=False),
        PlateauSchedule("val", factor=0.5, patience=0, threshold=0.3, verbose=False),
    ]
    if module.interval is not None:
        judges.pop()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=logs,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExactResume(), *callbacks, *judges, best, OnExceptionCheckpoint(folder, "left")],
        default_root_dir=folder,
        **{"max_epochs": 3, **kwargs},
    )
    loaders = [DataLoader(data, 4), DataLoader(data, 6, shuffle=True)]
    error = None
    try:
        trainer.fit(module, DataLoader(data, 2, shuffle=True), loaders, ckpt_path=ckpt_path)
    except (RuntimeError, SIGTERMException, SystemExit) as raised:  # Lightning makes an exit of Ctrl-C
        error = raised
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    scores = {os.path.basename(path): score.item() for path, score in best.best_k_models.items()}
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    steps = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    counts = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.state_dict()
    end = module.net.weight.tolist(), rates, steps, [judge.state_dict() for judge in judges], scores, counts
    return str(end), logs.rows, error


PLACES = [
    ("training", 1, BATCHES - 1),
    ("start", 1, BATCHES - 1),
    ("validation", 1, BATCHES - 1, 0, 0),
    ("validation", 1, BATCHES - 1, 0, 2),
    ("validation", 1, BATCHES - 1, 1, 1),
    ("epoch end", 1, BATCHES - 1),
]
WITHIN = [(place[0], 1, 2, *place[3:]) for place in PLACES]
ACROSS = [(place[0], 1, 1, *place[3:]) for place in PLACES]
TIMES = {
    "of an epoch": (PLACES, {}),
    "within an epoch": (WITHIN, dict(val_check_interval=3)),
    "in the first epoch": ([(place[0], 0, *place[2:]) for place in PLACES], dict(num_sanity_val_steps=0)),
    "in the last epoch": ([(place[0], 2, *place[2:]) for place in WITHIN], dict(val_check_interval=3)),
    "every second epoch": (PLACES, dict(check_val_every_n_epoch=2)),
    "across epochs": (ACROSS, dict(val_check_interval=4, check_val_every_n_epoch=None)),
    "within a batch": ([("training", *each) for each in [(0, 0), (1, 0), (1, 3)]], {}),
    "before an epoch": ([("epoch", 0), ("epoch", 1)], {}),
    "after each batch": ([("training", 0, 0), ("training", 1, 1), WITHIN[3]], dict(val_check_interval=1)),
    "epochs of one batch": ([("epoch", 1), ("training", 1, 0)], dict(limit_train_batches=1)),
    "of one batch": ([WITHIN[0], WITHIN[2]], dict(val_check_interval=3, limit_val_batches=1)),
    "in a window": (WITHIN, dict(val_check_interval=3, accumulate_grad_batches=2)),
}
CASES = [(name, *each) for name, (places, _) in TIMES.items() for each in product(places, ["SIGTERM", RuntimeError])]
CASES = [(*each, interval) for each, interval in zip(CASES, cycle(["epoch", "step", None]), strict=False)]
CASES.append(("within an epoch", WITHIN[3], KeyboardInterrupt, "epoch"))


@pytest.mark.parametrize(("name", "place", "by", "interval"), CASES, ids=str)
def test_it_takes_place_whole_when_the_run_goes_on(tmp_path, name, place, by, interval):
    kwargs = TIMES[name][1]
    whole, stopped, resumed = Ends(interval=interval), Ends(place, by, interval), Ends(interval=interval)
    end, logged, _ = fit(tmp_path / "whole", whole, **kwargs)
    _, logged_before, error = fit(tmp_path, stopped, **kwargs)
    assert stopped.ended and error is not None
    end_of_resumed, logged_after, error = fit(tmp_path, resumed, tmp_path / "left.ckpt", **kwargs)
    assert error is None
    assert stopped.measured | resumed.measured == whole.measured
    assert end_of_resumed == end
    assert logged_before | logged_after == logged


@pytest.mark.parametrize("again", [PLACES[2], PLACES[3], ("training", 2, 1)], ids=str)
def test_a_run_that_ends_again(tmp_path, again):
    """Within the same validation, and after it."""
    whole, first, second, last = Ends(), Ends(PLACES[3], RuntimeError), Ends(again, RuntimeError), Ends()
    end = fit(tmp_path / "whole", whole)[0]
    fit(tmp_path, first)
    left = tmp_path / "left.ckpt"
    assert fit(tmp_path, second, left.rename(tmp_path / "first.ckpt"))[2] is not None
    assert fit(tmp_path, last, left)[0] == end
    assert first.measured | second.measured | last.measured == whole.measured


HOOKS = ["on_train_batch_end", "on_validation_start", "on_validation_batch_end", "on_validation_epoch_end"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_file_that_a_hook_saves_before_the_validation_has_ended(tmp_path, hook):
    save = pl.Callback()
    path = tmp_path / "saved.ckpt"
    is_place = lambda trainer: trainer.current_epoch == 1 and not trainer.sanity_checking  # noqa: E731
    setattr(save, hook, lambda trainer, *_: is_place(trainer) and trainer.save_checkpoint(path))
    whole, resumed = Ends(), Ends()
    end = fit(tmp_path, whole, callbacks=[save])[0]
    assert fit(tmp_path, resumed, path)[0] == end
    assert resumed.measured == {step: each for step, each in whole.measured.items() if step > BATCHES}
