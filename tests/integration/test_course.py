# SPDX-License-Identifier: Apache-2.0
"""Schedules and parameter groups together: with every adaptive rule under one Trainer, and on two gloo processes."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import Fuse, HyperparameterSchedule, LRSchedule, ParameterGroups, PlateauSchedule
from lightning_optkit.optimizers import Lion, parameter_groups
from lightning_optkit.schedules import cosine, warmup_cosine
from lightning_optkit.step import OnePassOptimizer
from tests.workers import launch, load_worker

WORKER = Path(__file__).with_name("course_worker.py")


worker = load_worker(WORKER)

# --- two processes ---


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ranks[case]: what the two processes hold after it. All cases run in the same two processes, one after another."""
    folder = tmp_path_factory.mktemp("course")
    launch(WORKER, folder, *worker.CASES, processes=2, timeout=120)
    return {
        case: [torch.load(folder / f"{case} {rank}.pt") for rank in range(2)] for case in (*worker.CASES, "sharded")
    }


@pytest.mark.parametrize("case", worker.CASES)
def test_both_ranks_hold_the_same_bits(ranks, case):
    first, second = ranks[case]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", worker.CASES)
def test_two_processes_equal_one_with_the_same_global_batch(ranks, case):
    with torch.random.fork_rng():
        _, expected = worker.run(case)
    seen = ranks[case][0].pop("seen")
    assert seen == expected.pop("seen") and len(seen) == 6
    rates = [step[0][0] for step in seen]
    assert len(set(rates)) == 6
    torch.testing.assert_close(ranks[case][0], expected, rtol=0, atol=1e-6)


def test_a_sharded_run_resumed_equals_one_uninterrupted(ranks):
    for whole, resumed in ranks["sharded"]:
        torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=0, atol=0)
        assert resumed["groups"] == whole["groups"]
        names, rates, bases, _ = zip(*whole["groups"], strict=True)
        assert names == ("layer0_decay", "layer0_no_decay", "layer1_decay", "layer1_no_decay")
        assert bases == (0.01, 0.01, 0.02, 0.02) and rates == (0.0,) * 4


# --- every adaptive rule ---

RULES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.1, weight_decay=1e-3),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01, weight_decay=1e-3),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=1.0, rho=0.6, eps=1e-3, weight_decay=1e-3),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.02, weight_decay=1e-3),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=1e-3),
    "Adamax": lambda params: torch.optim.Adamax(params, lr=0.05, weight_decay=1e-3),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.02, weight_decay=1e-3),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.05, weight_decay=1e-3),
    "Lion": lambda params: Lion(params, lr=0.01, weight_decay=1e-3),
    "Rprop (no one-pass rule)": lambda params: torch.optim.Rprop(params, lr=0.01),
}
EPOCHS, STEPS = 6, 4


class Classifier(pl.LightningModule):
    """Which of two noisy clouds a point is from."""

    def __init__(self, configure):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2))
        self.configure = configure

    def configure_optimizers(self):
        return self.configure(self)

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(1)
        y = torch.arange(64) % 2
        x = torch.randn(64, 4, generator=generator) + 2.0 * (y[:, None] - 0.5)
        return DataLoader(TensorDataset(x, y), batch_size=64 // STEPS)

    val_dataloader = train_dataloader


def fitted(configure, *callbacks):
    module = Classifier(configure)
    trainer = pl.Trainer(
        callbacks=list(callbacks),
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return module, trainer


def course(has_decay):
    decay = [HyperparameterSchedule("weight_decay", cosine(0.5), verbose=False)] if has_decay else []
    return [
        *decay,
        LRSchedule(warmup_cosine(0.25), verbose=False),
        ParameterGroups(layer_decay=0.8, verbose=False),
        PlateauSchedule("val_loss", patience=100, verbose=False),
    ]


def by_hand(make, has_decay):
    """The same run in plain torch."""

    def configure(module):
        optimizer = make(list(parameter_groups(module, layer_decay=0.8, lr=make(module.parameters()).defaults["lr"])))
        total = EPOCHS * STEPS

        def rate(step):
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay * cosine(0.5)(step, total)
            return warmup_cosine(0.25)(step, total)

        decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}}

    return configure


@pytest.mark.parametrize("name", RULES)
def test_adaptive_learning_rates_under_one_trainer(name):
    make, has_decay = RULES[name], "Rprop" not in name
    kinds = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            kinds.append(isinstance(trainer.optimizers[0], OnePassOptimizer))

    with torch.random.fork_rng():
        before = Classifier(make)
        fused, _ = fitted(lambda m: make(m.parameters()), *course(has_decay), Fuse(verbose=False), Watch())
        plain, trainer = fitted(lambda m: make(m.parameters()), *course(has_decay))
        reference, _ = fitted(by_hand(make, has_decay))
    assert kinds == [has_decay]
    batch = next(iter(before.train_dataloader()))
    assert fused.loss(batch) < 0.6 * before.loss(batch)
    torch.testing.assert_close(plain.state_dict(), reference.state_dict(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 1e-6
