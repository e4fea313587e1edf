# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped within an epoch goes on within it, and Lightning's warning is silent where that is exact."""

import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1]))
from lightning_optkit.callbacks import ExactResume
from tests.workers import launch

pytestmark = pytest.mark.filterwarnings("ignore")
LINE = "You're resuming from a checkpoint that ended before the epoch ended and your dataloader is not resumable."
BATCHES = 10


class Seeing(pl.LightningModule):
    def __init__(self, stops_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.seen, self.stops_at = nn.Linear(1, 1), [], stops_at

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, *batch[0].flatten().tolist()))
        if self.seen[-1][:2] == self.stops_at:
            self.trainer.should_stop = True
        return self.net(batch[0] + torch.rand(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Fetches(Seeing):
    def training_step(self, dataloader_iter):
        batch, batch_idx, _ = next(dataloader_iter)
        return super().training_step(batch, batch_idx)


class SaveAtEnd(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def fit(
    ckpt_path=None,
    path=None,
    stops_at=None,
    exact=True,
    by_epoch=True,
    batch_size=2,
    callbacks=(),
    kind=Seeing,
    **kwargs,
):
    """What was seen, the weight, and what was said of resuming; with a sampler whose order depends on the epoch."""
    torch.manual_seed(1 if ckpt_path is None else 2)
    data = TensorDataset(torch.arange(2.0 * BATCHES)[:, None])
    order = dict(sampler=DistributedSampler(data, 1, 0)) if by_epoch else dict(shuffle=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        callbacks=[*([ExactResume()] if exact else []), *callbacks],
        **{"max_epochs": 4, **kwargs},
    )
    module = kind(stops_at)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(data, batch_size, **order), ckpt_path=ckpt_path)
    if path is not None:
        trainer.save_checkpoint(path)
    said = [str(record.message) for record in records]
    return module.seen, module.net.weight.item(), [each for each in said if LINE in each or "ExactResume" in each]


STOPS = {  # how a run is stopped, and how it goes on
    "more steps": (dict(max_steps=13), dict(max_steps=26)),
    "by epochs": (dict(max_steps=13), dict()),
    "as many epochs": (dict(max_steps=13, max_epochs=2), dict(max_epochs=2)),
    "should_stop": (dict(stops_at=(1, 2)), dict()),
    "windows": (dict(max_steps=7, accumulate_grad_batches=2), dict(max_steps=12, accumulate_grad_batches=2)),
    "in the first epoch": (dict(max_steps=3), dict(max_steps=4)),
}


@pytest.mark.parametrize("by_epoch", [False, True])
@pytest.mark.parametrize("saved", ["after the fit", "at the end of the epoch"])
@pytest.mark.parametrize("case", STOPS)
def test_it_goes_on_where_it_was_stopped(tmp_path, case, saved, by_epoch):
    path, (first, second) = tmp_path / "stopped.ckpt", STOPS[case]
    where = {"path": path} if saved == "after the fit" else {"callbacks": [SaveAtEnd(path)]}
    fit(by_epoch=by_epoch, **where, **first)
    seen, weight, said = fit(path, by_epoch=by_epoch, **second)
    whole, expected, _ = fit(by_epoch=by_epoch, **second)
    assert seen and seen == whole[-len(seen) :] and weight == expected
    assert said == []


def test_lightning_alone_goes_on_with_the_next_epoch(tmp_path):
    path = tmp_path / "stopped.ckpt"
    fit(path=path, exact=False, max_steps=13)
    seen, _, said = fit(path, exact=False, max_steps=26)
    assert seen[0][0] == 2 and len(said) == 1 and LINE in said[0]


class SaveOnce(pl.Callback):
    def __init__(self, path, epoch, batch):
        self.path, self.place = path, (epoch, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("place", [(1, 2), (1, 9)], ids=str)
def test_a_step_that_fetches_its_batch(tmp_path, place):
    whole, weight, _ = fit(callbacks=[SaveOnce(tmp_path / "saved.ckpt", *place)], kind=Fetches, by_epoch=False)
    resumed, same, _ = fit(tmp_path / "saved.ckpt", kind=Fetches, by_epoch=False)
    assert resumed == whole[place[0] * BATCHES + place[1] + 1 :] and same == weight


@pytest.mark.parametrize("least", [dict(min_epochs=3), dict(min_steps=27)], ids=str)
@pytest.mark.parametrize("place", [(0, 1), (1, 2), (1, 9), (2, 1)], ids=str)
def test_what_was_told_to_stop_stops_when_it_may(tmp_path, least, place):
    whole, weight, _ = fit(stops_at=(1, 1), callbacks=[SaveOnce(tmp_path / "saved.ckpt", *place)], **least)
    assert len(whole) == least.get("min_steps", 30)
    resumed, same, _ = fit(tmp_path / "saved.ckpt", stops_at=(1, 1), **least)
    assert resumed == whole[place[0] * BATCHES + place[1] + 1 :] and same == weight


class StopsAtOnce(pl.Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.should_stop = True


@pytest.mark.parametrize("nothing", [dict(max_steps=1), dict(callbacks=[StopsAtOnce()])], ids=["max_steps", "stops"])
@pytest.mark.parametrize("place", [(1, 2), (1, 9)], ids=str)
def test_a_fit_that_trains_nothing_saves_what_it_was_given(tmp_path, nothing, place):
    first, second, window = tmp_path / "first.ckpt", tmp_path / "second.ckpt", dict(accumulate_grad_batches=4)
    whole, weight, _ = fit(callbacks=[SaveOnce(first, *place)], by_epoch=False, **window)
    assert fit(first, second, by_epoch=False, **window, **nothing)[0] == []
    resumed, same, _ = fit(second, by_epoch=False, **window)
    assert resumed == whole[place[0] * BATCHES + place[1] + 1 :] and same == weight


def test_with_less_to_wait_for_the_run_goes_on_as_if_stopped(tmp_path):
    fit(stops_at=(1, 1), callbacks=[SaveOnce(tmp_path / "saved.ckpt", 1, 2)], min_epochs=3)
    seen, _, _ = fit(tmp_path / "saved.ckpt")
    assert [*seen[0][:2], len(seen)] == [1, 3, 27]


def test_a_checkpoint_without_a_state_is_said(tmp_path):
    path = tmp_path / "stopped.ckpt"
    fit(path=path, exact=False, max_steps=13)
    _, _, said = fit(path, max_steps=26)
    assert [LINE in each for each in said] == [False, True]
    assert said[0].endswith("the run goes on with the next epoch, and is not exact.")


def test_a_finished_epoch_is_left(tmp_path):
    path = tmp_path / "finished.ckpt"
    fit(path=path, max_steps=2 * BATCHES)
    seen, _, said = fit(path, max_steps=26)
    assert seen[0][:2] == (2, 0) and said == []


def test_the_warning_stays_where_it_is_not_exact(tmp_path):
    path = tmp_path / "stopped.ckpt"
    fit(path=path, max_steps=13)
    _, _, said = fit(path, batch_size=4, max_steps=16)
    assert sum(LINE in each for each in said) == 1 and sum("it is not exact." in each for each in said) == 1


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_fsdp2_goes_on_within_the_window_in_which_it_was_stopped(two_processes, kind):
    for results in two_processes:
        whole, resumed = results[kind]
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    launch(Path(__file__).with_name("cut_epoch_worker.py"), folder, processes=2, timeout=100)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
