# SPDX-License-Identifier: Apache-2.0
"""BatchSizeSchedule in a run that is resumed."""

from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
from batch_size_schedule_cases import GROWS, SHRINKS, flat, schedule, sgd, training, twelve

from lightning_optkit.callbacks import ExactResume, LRSchedule
from lightning_optkit.schedules import linear

pytestmark = pytest.mark.filterwarnings("ignore")

train = pytest.fixture(training)


class SaveAt(pl.Callback):
    def __init__(self, path, where):
        self.path, self.where = path, where

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.where:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if (trainer.current_epoch, "end") == self.where:
            trainer.save_checkpoint(self.path)


def asks_for_the_length(module):
    module.trainer.estimated_stepping_batches  # noqa: B018
    return sgd(module)


@pytest.mark.parametrize("where", [(0, 1), (1, 1), (0, "last"), (0, "end"), (1, "end")], ids=str)
@pytest.mark.parametrize("sizes", [GROWS, SHRINKS], ids=["grows", "shrinks"])
@pytest.mark.parametrize(
    "kwargs", [{}, dict(configure=asks_for_the_length), dict(max_steps=10)], ids=["plain", "asked", "max_steps"]
)
def test_resumed_is_bit_identical(train, tmp_path, where, sizes, kwargs):
    path = tmp_path / "saved.ckpt"
    place = (where[0], 12 // sizes.get(0, 2) - 1) if where[1] == "last" else where
    results = []
    for ckpt_path in (None, path):
        callback, save = schedule(sizes, "linear"), [] if ckpt_path else [SaveAt(path, place)]
        lr = LRSchedule(linear(), "sample", total=36, verbose=False)
        module, _, seen = train(
            callback, ExactResume(), lr, *save, loader=twelve(shuffle=True), ckpt_path=ckpt_path, **kwargs
        )
        results.append((flat(module), callback.samples_seen, callback.batch_size, seen.batches[2]))
    (whole, *rest), (resumed, *same) = results
    assert torch.equal(resumed, whole)
    assert same == rest
    assert rest[:2] == [36 if "max_steps" not in kwargs else rest[0], sizes[2]]


# With max_steps, Lightning itself repeats a batch of an epoch whose end was saved.
@pytest.mark.parametrize(
    "where, kwargs", [((0, 5), {}), ((0, "end"), {}), ((0, 5), {"max_steps": 10})], ids=["last", "end", "max_steps"]
)
@pytest.mark.parametrize("workers", [0, 1])  # which have fetched ahead
def test_sizes_after_resuming_without_exact_resume(train, tmp_path, where, kwargs, workers):
    path = tmp_path / "saved.ckpt"
    _, _, whole = train(schedule(), SaveAt(path, where), **kwargs)
    _, _, resumed = train(schedule(), loader=twelve(num_workers=workers), ckpt_path=path, **kwargs)
    assert list(chain(*resumed.sizes())) == list(chain(*whole.sizes()[1:]))


def test_a_change_of_mind_is_told(train, tmp_path):
    path = tmp_path / "saved.ckpt"
    _, trainer, _ = train(schedule(GROWS, "linear"), SaveAt(path, (1, "end")))
    with pytest.warns(UserWarning, match="resumed with lr_scaling none in place of linear"):
        _, trainer, _ = train(schedule(), ckpt_path=path)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1
