# SPDX-License-Identifier: Apache-2.0
"""Fuse swaps norms for the length of a fit: the same losses, the same state dict, the same classes afterwards."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import ExactResume, Fuse
from lightning_optkit.layers import LayerNorm, RMSNorm

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")


class Normed(pl.LightningModule):
    """Creates its norms in __init__, setup or configure_model."""

    def __init__(self, where="init"):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.where, self.losses, self.seen = nn.Linear(4, 64), where, [], []
        self.norm = None
        if where == "init":
            self.make()

    def make(self):
        if self.norm is None:
            torch.manual_seed(0)
            self.norm = nn.Sequential(nn.LayerNorm(64), nn.RMSNorm(64), nn.Linear(64, 2))

    def setup(self, stage):
        if self.where == "setup":
            self.make()

    def training_step(self, batch, batch_idx):
        self.seen.append([type(norm) for norm in self.norm[:2]])
        loss = nn.functional.mse_loss(self.norm(self.net(batch[0])), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Configured(Normed):
    def configure_model(self):
        self.make()


def make(where, **kwargs):
    return Configured(where, **kwargs) if where == "configure_model" else Normed(where, **kwargs)


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_norms_are_fused_wherever_they_are_made_and_torchs_afterwards(where, fit, printed):
    plain, fused = make(where), make(where)
    fit(plain)
    fit(fused, Fuse())
    assert plain.losses == pytest.approx(fused.losses, abs=1e-5)
    assert all(types == [LayerNorm, RMSNorm] for types in fused.seen)
    assert [type(norm) for norm in fused.norm] == [nn.LayerNorm, nn.RMSNorm, nn.Linear]
    assert "setup" not in vars(fused) and "configure_model" not in vars(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert "Fuse norms: 1 LayerNorm -> layers.LayerNorm: same mathematics." in printed()
    plain.load_state_dict(fused.state_dict())


class TheirNorm(nn.LayerNorm):
    """A norm of another package."""


class Failing(Normed):
    """Raises `OnPurpose` in the method or hook `where`, with norms of all kinds."""

    def __init__(self, fails_in):
        super().__init__()
        self.norm.insert(2, TheirNorm(64))
        self.fails_in = fails_in

    def maybe_fail(self, where):
        self.seen.append([type(norm).__name__ for norm in self.norm[:3]])
        if where == self.fails_in:
            raise OnPurpose

    def setup(self, stage):
        self.maybe_fail("setup")

    def configure_model(self):
        self.maybe_fail("configure_model")

    def configure_optimizers(self):
        self.maybe_fail("configure_optimizers")
        return super().configure_optimizers()

    def training_step(self, batch, batch_idx):
        self.maybe_fail("training_step")
        return nn.functional.mse_loss(self.norm(self.net(batch[0])), batch[1])

    def validation_step(self, batch, batch_idx):
        self.maybe_fail("validation_step")

    def on_train_end(self):
        self.maybe_fail("on_train_end")


class OnPurpose(Exception):
    pass


FUSED, TORCHS = ["LayerNorm", "RMSNorm", "FusedTheirNorm"], [nn.LayerNorm, nn.RMSNorm, TheirNorm]


@pytest.mark.parametrize(
    "fails_in", ["setup", "configure_model", "configure_optimizers", "training_step", "validation_step", "on_train_end"]
)
def test_every_norm_is_what_it_was_after_an_exception(fails_in, fit):
    module = Failing(fails_in)
    with pytest.raises(OnPurpose):
        fit(module, Fuse(), limit_val_batches=1, num_sanity_val_steps=0)
    assert module.seen[-1] == (FUSED if fails_in != "setup" else ["LayerNorm", "RMSNorm", "TheirNorm"])
    assert [type(norm) for norm in module.norm[:3]] == TORCHS
    assert not {"setup", "configure_model", "configure_optimizers"} & set(vars(module))


class Sequences(Normed):
    """Enough rows for the kernels, and dropout, so that a resumed run must draw the same numbers."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.norm.insert(1, nn.Dropout(dropout))
        self.gradients = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = x[:, None] * torch.linspace(-1, 1, 300)[:, None]
        return nn.functional.mse_loss(self.norm(self.net(x)), y[:, None].expand(-1, 300, -1))

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([p.grad.clone() for p in self.parameters()])


@pytest.mark.parametrize("other", ["torch's norms", "whole batches"])
def test_accumulated_gradients_are_those_of_torchs_norms_and_of_whole_batches(other, make_trainer, data):
    fused, expected = Sequences(), Sequences()
    make_trainer(Fuse()).fit(fused, data())
    if other == "whole batches":
        make_trainer(Fuse(), accumulate_grad_batches=1).fit(expected, data(4))
    else:
        make_trainer(Fuse(norms=False)).fit(expected, data())
    assert len(fused.gradients) == len(expected.gradients) == 6  # two steps in each of three epochs
    torch.testing.assert_close(fused.gradients, expected.gradients, rtol=0, atol=1e-5)


class SaveInTheMiddle(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_resumed_in_mid_epoch_equals_uninterrupted_bit_for_bit(make_trainer, data, tmp_path):
    path, states = tmp_path / "middle.ckpt", []
    for saves in (True, False):
        torch.manual_seed(1 if saves else 99)
        module = Sequences(dropout=0.5)
        torch.manual_seed(2 if saves else 98)
        trainer = make_trainer(Fuse(), ExactResume(), *([SaveInTheMiddle(path)] if saves else []))
        shuffled = DataLoader(data().dataset, batch_size=2, shuffle=True)
        trainer.fit(module, shuffled, ckpt_path=None if saves else path)
        states.append((module.state_dict(), trainer.optimizers[0].state_dict(), module.gradients[-3:]))
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    assert trainer.global_step == 6


def test_norms_stay_when_told_so(fit):
    module = Normed()
    fit(module, Fuse(norms=False))
    assert module.seen[0] == [nn.LayerNorm, nn.RMSNorm]


class Tokens(pl.LightningModule):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.losses = kind, []
        if kind == "gpt2":
            transformers = pytest.importorskip("transformers")
            rates = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            self.model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, **rates)
            )
        else:
            from lightning.pytorch.demos import Transformer

            self.model = Transformer(vocab_size=50, ninp=32, nhead=2, nhid=64, nlayers=2, dropout=0.0)

    def training_step(self, batch, batch_idx):
        if self.kind == "gpt2":
            loss = self.model(input_ids=batch, labels=batch).loss
        else:
            loss = nn.functional.nll_loss(self.model(batch, batch).flatten(0, -2), batch.flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "demo"])
def test_50_steps_of_a_transformer_have_the_same_losses(kind, make_trainer):
    data = torch.randint(0, 50, (200, 16), generator=torch.Generator().manual_seed(1))
    losses = []
    for callbacks in ([], [Fuse(verbose=False)]):
        module = Tokens(kind)
        make_trainer(*callbacks, epochs=1, accumulate_grad_batches=1).fit(module, DataLoader(data, batch_size=4))
        losses.append(module.losses)
    assert len(losses[0]) == 50 and losses[0] == pytest.approx(losses[1], abs=1e-5)
