# SPDX-License-Identifier: Apache-2.0
"""Whatever runs `training_step` again, or drops a batch, leaves no trace in buffers and attributes of modules."""

from collections import deque
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import SAM, GradientHealth, LRFinder, NoiseScale, SpikeGuard
from lightning_optkit.callbacks.seams.module_state import Attributes, Buffers

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = dict(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
SMALL |= dict(enable_model_summary=False)


class Counting(nn.Module):
    """A layer that counts in Python, and puts new tensors in the place of its buffers."""

    def __init__(self):
        super().__init__()
        self.net, self.calls, self._recent = nn.Linear(4, 3), 0, deque(maxlen=5)
        self.bank, self.sums = torch.zeros(3), np.zeros(3)
        self.record = SimpleNamespace(calls=0, classes={}, bank=torch.zeros(3))
        self.register_buffer("center", torch.zeros(3))
        self.register_buffer("first", None)
        self.register_buffer("spread", torch.ones(3), persistent=False)

    def forward(self, x):
        out = self.net(x)
        mean = out.detach().mean(0)
        self.center = 0.9 * self.center + 0.1 * mean
        self.spread.mul_(0.9).add_(0.1 * mean.square())
        self.first = mean if self.first is None else self.first
        self.calls += 1
        self._recent.append(float(mean[0]))
        self.bank.mul_(0.9).add_(mean)
        self.record.bank += self.bank
        self.sums += self.bank.numpy()
        self.record.calls += 1
        self.record.classes[self.record.calls % 4] = self.record.calls
        return (out - self.center) / (1 + self.spread + 1e-3 * self.bank.nan_to_num().abs())


class Net(pl.LightningModule):
    def __init__(self, nan_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.metric, self.nan_at = Counting(), torchmetrics.MeanMetric(), nan_at
        self._steps, self.losses = 0, {"train": []}

    def training_step(self, batch, batch_idx):
        x = batch[0] * float("nan") if self.nan_at == self._steps else batch[0]
        loss = nn.functional.cross_entropy(self.layer(x), batch[1])
        self.metric.update(loss.detach())
        self._steps += 1
        self.losses["train"].append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, *callbacks):
    pl.seed_everything(3, verbose=False)
    x = torch.randn(160, 4)
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    pl.Trainer(**SMALL, callbacks=list(callbacks)).fit(module, loader)
    return module


def trace(module):
    tensors = {name: value.tolist() for name, value in {**module.state_dict(), "spread": module.layer.spread}.items()}
    layer, record = module.layer, module.layer.record
    numbers = [module._steps, layer.calls, list(layer._recent), module.losses, module.metric.compute()]
    numbers += [layer.bank.tolist(), layer.sums.tolist(), record.calls, record.classes, record.bank.tolist()]
    return tensors, numbers


AGAIN = {
    "NoiseScale": lambda: NoiseScale(every=2, verbose=False),
    "GradientHealth": lambda: GradientHealth(check_every=4, verbose=False),
    "LRFinder": lambda: LRFinder(num_steps=30, apply=False, verbose=False),
    "SpikeGuard": lambda: SpikeGuard(verbose=False),
}


@pytest.mark.parametrize("name", AGAIN)
def test_the_run_is_the_one_without_it(name):
    assert trace(fit(Net(), AGAIN[name]())) == trace(fit(Net()))


def test_a_second_pass_is_not_counted():
    module = fit(Net(), SAM())
    assert module._steps == module.layer.calls == len(module.losses["train"]) == 40
    assert not torch.equal(module.layer.center, torch.zeros(3))


def test_a_dropped_batch_leaves_nothing_in_buffers_that_are_replaced():
    guard = SpikeGuard(verbose=False)
    module = fit(Net(nan_at=20), guard)
    assert [(event.step, event.action) for event in guard.events] == [(20, "skip")]
    assert module.layer.center.isfinite().all() and module.layer.spread.isfinite().all()


def test_buffers_of_other_shapes_and_lazy_ones():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.Module())
    model[1].register_buffer("cache", torch.arange(3.0))
    kept = Buffers(model)
    model[0](torch.randn(4, 2))
    model[1].cache.resize_(7).fill_(5.0)
    model[1].register_buffer("new", torch.ones(1))
    kept.restore()
    assert model[1].cache.tolist() == [0, 1, 2] and model[1].new == 1 and model[0].running_mean.shape == (2,)
    assert kept.value("1.cache", torch.ones(1)).tolist() == [0, 1, 2] and kept.value("1.new", torch.ones(1)) == 1


def test_containers_keep_what_they_hold():
    module, tensor = nn.Module(), torch.ones(2)
    module.held = {"a": [1, tensor], "b": {3}, "c": deque([1, 2], maxlen=2)}
    module.large = [[each] for each in range(1000)]  # a data set: only its outermost list is copied
    held, inner = module.held, module.held["a"]
    kept = Attributes(module)
    module.held["a"].append(5)
    module.held["b"].clear()
    module.held["c"].append(3)
    module.held = module.new = None
    module.large.pop()
    kept.restore()
    assert module.held is held and held["a"] is inner and inner == [1, tensor] and not hasattr(module, "new")
    assert held["b"] == {3} and list(held["c"]) == [1, 2] and len(module.large) == 1000


def test_tensors_arrays_and_plain_objects_keep_their_contents():
    module = nn.Module()
    module.bank, module.sums, module.fixed = torch.arange(3.0), np.arange(3), np.arange(3)
    module.fixed.flags.writeable = False
    module.record = SimpleNamespace(seen=[1], at={"mean": torch.ones(2)})
    module.other = SimpleNamespace(reader=iter([1]), count=1)  # has more than plain values
    module.outer = SimpleNamespace(inner=SimpleNamespace(count=1), act=torch.relu, net=nn.Linear(1, 1))
    module.data = torch.zeros(2**22 + 1)
    bank, sums, seen = module.bank, module.sums, module.record.seen
    kept = Attributes(module)
    module.bank.resize_(5).fill_(7)
    module.sums += 1
    module.record.seen.append(2)
    module.record.at["mean"].add_(1)
    module.record.at, module.record.new, module.other.count = None, 1, 2
    module.data += 1
    module.outer.inner.count, module.outer.act = 2, None
    kept.restore()
    assert module.bank is bank and bank.tolist() == [0, 1, 2] and module.sums is sums and sums.tolist() == [0, 1, 2]
    assert module.record.seen is seen == [1] and module.record.at["mean"].tolist() == [1, 1]
    assert module.outer.inner.count == 1 and module.outer.act is torch.relu
    assert vars(module.record).keys() == {"seen", "at"} and module.other.count == 2 and module.data[0] == 1
