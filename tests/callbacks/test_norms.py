# SPDX-License-Identifier: Apache-2.0
"""Fuse swaps norms for the length of a fit: the same losses, the same state dict, the same classes afterwards."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import Fuse
from lightning_optkit.layers import LayerNorm, RMSNorm

pytestmark = pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")


class Normed(pl.LightningModule):
    """Makes its norms in __init__, setup or configure_model."""

    def __init__(self, where="init", fails=False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.where, self.fails, self.losses, self.seen = nn.Linear(4, 64), where, fails, [], []
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
        if self.fails:
            raise RuntimeError("on purpose")
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


def test_norms_come_back_after_an_exception(fit):
    module = Normed(fails=True)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, Fuse())
    assert module.seen == [[LayerNorm, RMSNorm]] and type(module.norm[0]) is nn.LayerNorm


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
