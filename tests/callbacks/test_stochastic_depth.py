# SPDX-License-Identifier: Apache-2.0
"""StochasticDepth on an unchanged residual net."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_optkit.callbacks import Fuse, StochasticDepth
from lightning_optkit.regularization import stochastic_depth

X = torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.rate = rate

    def forward(self, x):
        y = self.branch(x)
        return x + (stochastic_depth(y, self.rate) if self.training and self.rate else y)


class Residual(pl.LightningModule):
    """`rates`: dropped by itself."""

    def __init__(self, rates=(0.0, 0.0, 0.0), fail=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block(rate) for rate in rates)
        self.fail, self.validated = fail, []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.current_epoch + batch_idx)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def training_step(self, batch, batch_idx):
        if self.fail:
            raise KeyError("stop")
        return self(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(torch.equal(self(batch), self(batch)))


def trained(make_trainer, module, *callbacks):
    data = torch.utils.data.DataLoader(X, batch_size=None)
    make_trainer(*callbacks, epochs=2, limit_val_batches=1).fit(module, data, data)
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("callbacks", [[], [Fuse]], ids=["torch", "Fuse"])
def test_it_equals_a_net_that_drops_by_itself(make_trainer, callbacks):
    module, depth = Residual(), StochasticDepth("blocks.*.branch", p=0.6)
    actual = trained(make_trainer, module, *[c() for c in callbacks], depth)
    assert list(depth.rates) == [f"blocks.{i}.branch" for i in range(3)]
    assert list(depth.rates.values()) == pytest.approx([0.2, 0.4, 0.6])
    expected = trained(make_trainer, Residual(rates=tuple(depth.rates.values())))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)
    plain = trained(make_trainer, Residual())
    assert not torch.allclose(actual["blocks.2.branch.0.weight"], plain["blocks.2.branch.0.weight"])
    assert all(module.validated)


class Attention(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)

    configure_optimizers = Residual.configure_optimizers

    def training_step(self, batch, batch_idx):
        x = batch[:, None].expand(-1, 3, -1)  # time, batch, features
        out, weights = self.attention(x, x, x)
        assert weights.shape == (3, 8, 8)
        dropped = (out == 0).all(dim=(0, 2))
        self.seen = dropped if not hasattr(self, "seen") else torch.cat([self.seen, dropped])
        return out.sum()


def test_of_several_outputs_the_first_is_dropped_by_example(make_trainer):
    torch.manual_seed(0)
    module = Attention()
    module.attention.out_proj.bias.data += 1
    make_trainer(StochasticDepth("attention", p=0.5, batch_dim=1), epochs=4).fit(
        module, torch.utils.data.DataLoader(X, batch_size=None)
    )
    assert 0.3 < module.seen.float().mean() < 0.7


@pytest.mark.parametrize("fail", [False, True])
def test_the_module_is_left_as_it_was(make_trainer, fail):
    module = Residual(fail=fail)
    try:
        trained(make_trainer, module, StochasticDepth("blocks.*.branch"))
    except KeyError:
        assert fail
    assert not any(child._forward_hooks for child in module.modules())


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: StochasticDepth("x", p=1.0), r"^StochasticDepth\(p=1\.0\): p must be in \(0, 1\)\.$"),
        (lambda: StochasticDepth("x"), r"^StochasticDepth\(names='x'\): no module has such a name; there are blocks, "),
        (lambda: StochasticDepth("*.branch"), r"^StochasticDepth\(names='\*\.branch'\): no module has such a name"),
    ],
)
def test_bad_input_is_refused(make_trainer, callback, message):
    with pytest.raises(ValueError, match=message):
        trained(make_trainer, Residual(), callback())


def test_names_that_are_no_pattern_are_refused_at_once():
    with pytest.raises(TypeError, match=r"^StochasticDepth\(names=1\.2\): names must be a shell pattern of names"):
        StochasticDepth(1.2)
