# SPDX-License-Identifier: Apache-2.0
"""HyperparameterSchedule beside something that writes the entry too: it is overwritten, and said once."""

import lightning.pytorch as pl
import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, HyperparameterSchedule, WeightAveraging
from lightning_optkit.schedules import constant, linear

pytestmark = pytest.mark.filterwarnings("ignore:You (defined|passed in) a .*Skipping val loop")
TEXT = "the schedule writes it"


class Writes(pl.Callback):
    """Sets an entry of every group after each batch."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def on_train_batch_end(self, trainer, *_):
        for group in trainer.optimizers[0].param_groups:
            group[self.name] = self.value


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.1)


def one_cycle(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=1_000)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


@pytest.mark.parametrize(
    ("name", "entry", "value", "said"),
    [
        ("weight_decay", "weight_decay", 0.3, "weight_decay of a group of AdamW to 0.3, and it is 0.1 again"),
        ("beta1", "betas", (0.5, 0.999), "betas[0] of a group of AdamW to 0.5, and it is 0.9 again"),
    ],
)
@pytest.mark.parametrize("is_first", [False, True], ids=["behind the schedule", "before it"])
def test_an_entry_that_something_else_writes_is_said_once(regression, warned, name, entry, value, said, is_first):
    callbacks = [HyperparameterSchedule(name, constant(), verbose=False), Writes(entry, value)]
    for _ in range(2):  # once in each fit
        assert warned(TEXT, regression(adamw), *(reversed(callbacks) if is_first else callbacks)) == [
            f"HyperparameterSchedule: something else has set the {said}: the schedule writes it at every step. "
            "Keep one of the two."
        ]


def test_the_momentum_of_one_cycle_is_said_with_its_name(regression, warned):
    (said,) = warned(TEXT, regression(one_cycle), HyperparameterSchedule("momentum", linear(), verbose=False))
    assert "something else (OneCycleLR?) has set the momentum of a group of SGD to 0.95, and" in said


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [HyperparameterSchedule("weight_decay", linear(), verbose=False), Writes("eps", 1e-6)],
        lambda: [HyperparameterSchedule("weight_decay", linear(), base=0.5, verbose=False), Fuse(verbose=False)],
        lambda: [
            HyperparameterSchedule("average_decay", linear(), verbose=False),
            WeightAveraging(EMA(0.9)),
            Fuse(verbose=False),
        ],
        lambda: [
            HyperparameterSchedule("average_decay", linear(), verbose=False),
            WeightAveraging(EMA(0.9)),
        ],
    ],
    ids=["another entry", "base", "the average of a fused step", "an average beside the step"],
)
def test_what_the_schedule_alone_writes_is_not_said(regression, warned, callbacks):
    assert warned(TEXT, regression(adamw), *callbacks()) == []
