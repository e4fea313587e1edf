# SPDX-License-Identifier: Apache-2.0
"""What measures by running `training_step` again, or trains on trial, leaves all that the step itself changes."""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import GradientHealth, LRFinder, NoiseScale, RDrop
from lightning_optkit.callbacks.seams import kept_parameters
from lightning_optkit.callbacks.seams.kept_parameters import KeptParameters

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = dict(max_epochs=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
SMALL |= dict(enable_model_summary=False, num_sanity_val_steps=0)


class Net(pl.LightningModule):
    """Learns so slowly that it is probed."""

    calls = 0  # of the class: no pass of another puts them back

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.build()

    def build(self):
        pass

    def output(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        Net.calls += 1
        return F.cross_entropy(self.output(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)]


class Generators(Net):
    def build(self):
        self.own, self.by_name = torch.Generator().manual_seed(1), {"noise": [np.random.default_rng(2)]}
        self.holder = SimpleNamespace(inner=SimpleNamespace(draw=torch.Generator().manual_seed(3)), act=torch.relu)

    def output(self, x):
        for generator in (self.own, self.holder.inner.draw):
            x = x + 0.1 * torch.randn(x.shape, generator=generator)
        return self.net(x + self.by_name["noise"][0].normal())


class Teacher(Net):
    """Follows the net, by writes that autograd sees and ones that it does not."""

    def build(self):
        self.teacher, self.other = (copy.deepcopy(self.net).requires_grad_(False) for _ in range(2))

    def output(self, x):
        with torch.no_grad():
            for own, one, other in zip(
                *(each.parameters() for each in (self.net, self.teacher, self.other)), strict=True
            ):
                one.mul_(0.9).add_(own, alpha=0.1)
                other.data = 0.9 * other.data + 0.1 * own.data
                other.data.add_(0.01)
        return self.net(x) + self.teacher(x) + self.other(x)


class Rates(Net):
    def output(self, x):
        self.optimizers().param_groups[0]["lr"] *= 0.99
        self.optimizers().param_groups[0]["seen"] = self.optimizers().param_groups[0].get("seen", 0) + 1
        self.lr_schedulers().step()
        return self.net(x)


class Stops(Net):
    """Ends the fit at any pass that is not one of the run's own."""

    def output(self, x):
        self.trainer.should_stop = not torch.is_grad_enabled() or len(x) < 8
        return self.net(x)


class Balances(Net):
    def build(self):
        self.balance = SimpleNamespace(state=SimpleNamespace(value=1.0, history=[]), of=F.cross_entropy, net=self.net)

    def output(self, x):
        out, state = self.net(x), self.balance.state
        state.value = 0.9 * state.value + 0.1 * float(out.detach().abs().mean())
        state.history.append(state.value)
        return out / state.value


class Renorms(Net):
    def build(self):
        self.net = nn.ModuleDict({"table": nn.Embedding(16, 3, max_norm=1.0)})

    def output(self, x):
        return self.net["table"]((x[:, :2].abs() * 8).long().clamp(max=15)).mean(1)


class Freezes(Net):
    def build(self):
        self.count, self.side = 0, nn.Parameter(torch.zeros(1))

    def output(self, x):
        self.count += 1
        self.side.requires_grad_(self.count % 3 > 0)
        with torch.enable_grad():  # gradients of an inner pass, which the run's own step clears
            self.net(x).sum().backward()
        return self.net(x)


NETS = [Generators, Teacher, Rates, Stops, Balances, Renorms, Freezes]


def fit(module, *callbacks):
    pl.seed_everything(3, verbose=False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 4, generator=generator)
    loader = DataLoader(TensorDataset(x, torch.randint(3, (128,), generator=generator)), batch_size=8, shuffle=True)
    trainer = pl.Trainer(**SMALL, callbacks=list(callbacks))
    trainer.fit(module, loader)
    state = {name: value.tolist() for name, value in module.state_dict().items()}
    groups = [{**group, "params": len(group["params"])} for group in trainer.optimizers[0].param_groups]
    return trainer.global_step, state, groups, torch.rand(1).item()


AGAIN = {
    "NoiseScale": lambda: NoiseScale(every=5, verbose=False),
    "GradientHealth": lambda: GradientHealth(check_every=10, verbose=False),
    "LRFinder": lambda: LRFinder(num_steps=20, apply=False, verbose=False),
}


@pytest.mark.parametrize("name", AGAIN)
@pytest.mark.parametrize("net", NETS)
def test_the_run_is_the_one_without_it(net, name):
    before = Net.calls
    assert fit(net(), AGAIN[name]()) == fit(net())
    assert Net.calls > before + 2 * 96  # it has run the step again


@pytest.mark.parametrize("name", ["NoiseScale", "GradientHealth"])
@pytest.mark.parametrize("net", [Teacher, Renorms, Freezes])
def test_parameters_of_a_large_module_are_those_without_it(monkeypatch, net, name):
    monkeypatch.setattr(kept_parameters, "_FEW", 0)
    assert fit(net(), AGAIN[name]()) == fit(net())


def test_a_second_pass_of_another_callback_is_over_before_the_step():
    class Norms(Net):
        def build(self):
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

    assert fit(Norms(), RDrop(1.0), NoiseScale(every=5, verbose=False)) == fit(Norms(), RDrop(1.0))


@pytest.mark.parametrize("is_large", [True, False])
def test_only_what_is_written_in_a_large_module_is_copied(monkeypatch, is_large):
    if is_large:
        monkeypatch.setattr(kept_parameters, "_FEW", 0)
    module = Net()
    module.frozen = nn.Linear(4, 4).requires_grad_(False)
    first, last = module.net[0].weight, module.net[2].weight
    last.grad = torch.ones_like(last)
    grad, tensor, before = last.grad, first.data, [p.detach().clone() for p in module.parameters()]
    kept = KeptParameters(module)
    with kept.watched(), torch.no_grad():
        module.net(torch.ones(2, 4))
        last.data.mul_(2)
        last.grad.mul_(3)
        first.data = torch.zeros(2, 2)
        torch._foreach_add_([module.net[0].bias, module.net[2].bias], 1.0)
        last.grad = None
    assert len(kept._copies) == (4 if is_large else 7)  # storages: six parameters, a gradient
    version = last._version
    kept.restore()
    assert all(torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)) and version == last._version
    assert last.grad is grad and grad.eq(1).all() and first.data_ptr() == tensor.data_ptr()


def test_a_compiled_function_runs_while_parameters_are_watched(monkeypatch):
    monkeypatch.setattr(kept_parameters, "_FEW", 0)
    double = torch.compile(lambda x: x * 2, backend="eager", fullgraph=True)
    with KeptParameters(Net()).watched():
        assert double(torch.ones(2)).tolist() == [2, 2]
