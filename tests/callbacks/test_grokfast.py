# SPDX-License-Identifier: Apache-2.0
"""Grokfast in real Trainers against an explicit loop, with a loss scale, and resumed."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from two_gradient_cases import MOMENTUM, RATE, Classifier, SeedEachBatch, assert_close, batches, trained

from lightning_optkit.callbacks import Fuse, Grokfast


def written_out(alpha, lamb, steps, dtype, accumulate=1):
    net = Classifier().net.to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    averages = {}
    for batch, (x, y) in enumerate(batches(steps)):
        torch.manual_seed(batch)
        (nn.functional.cross_entropy(net(x.to(dtype)), y) / accumulate).backward()
        if (batch + 1) % accumulate:
            continue
        for p in net.parameters():
            averages[p] = alpha * averages[p] + (1 - alpha) * p.grad if p in averages else p.grad.clone()
            p.grad += lamb * averages[p]
        optimizer.step()
        optimizer.zero_grad()
    return net.state_dict()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_equals_the_loop_that_is_written_out_over_200_batches(make_trainer, accumulate, dtype, tolerance):
    found = trained(make_trainer, Grokfast(alpha=0.9, lamb=0.7), accumulate=accumulate, dtype=dtype)
    assert_close(found, written_out(0.9, 0.7, 200, dtype, accumulate), tolerance)


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_it_does_not_depend_on_who_unscales(make_trainer, precision):
    results = []
    for fuse in ([], [Fuse(verbose=False)]):
        module = Classifier()
        trainer = make_trainer(*fuse, Grokfast(0.9), SeedEachBatch(), epochs=1, precision=precision)
        trainer.fit(module, torch.utils.data.DataLoader(batches(20), batch_size=None))
        results.append(module.net.state_dict())
    assert_close(*results, 1e-5 if precision == "32-true" else 1e-3)


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_a_gradient_that_overflows_leaves_no_trace(make_trainer):
    class FirstHuge(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 1e38 if batch_idx == 2 else loss

    callback = Grokfast()
    found = trained(make_trainer, callback, steps=6, module=FirstHuge(), precision="16-mixed")
    averages = callback.state_dict()["averages"]
    assert len(averages) == 6 and all(average.isfinite().all() for average in averages.values())
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_continues_with_its_averages(make_trainer, tmp_path):
    data = torch.utils.data.DataLoader(batches(4), batch_size=None)
    straight, found = Classifier(), Classifier()
    make_trainer(Grokfast(0.9), SeedEachBatch(), epochs=3).fit(straight, data)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    make_trainer(Grokfast(0.9), SeedEachBatch(), saving, epochs=1, enable_checkpointing=True).fit(Classifier(), data)
    path = str(tmp_path / "epoch=0.ckpt")
    make_trainer(Grokfast(0.9), SeedEachBatch(), epochs=3).fit(found, data, ckpt_path=path, weights_only=False)
    assert_close(found.net.state_dict(), straight.net.state_dict(), 0)


def test_a_sparse_gradient_is_refused(make_trainer):
    class Embedded(Classifier):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 6, sparse=True)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x.float() + self.table(y)), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    with pytest.raises(ValueError, match=r"^Grokfast\(\.\.\.\): the gradient of 'table\.weight' is sparse"):
        trained(make_trainer, Grokfast(), steps=2, module=Embedded())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(alpha=1.0), r"^Grokfast\(alpha=1\.0\): alpha must be in \[0, 1\)\.$"),
        (dict(lamb=1e308), r"^Grokfast\(lamb=1e\+308\): lamb must be a number that fp32 can hold\.$"),
        (dict(lamb=-1.0), r"^Grokfast\(lamb=-1\.0\): lamb must be in \[0, inf\)\.$"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Grokfast(**arguments)
