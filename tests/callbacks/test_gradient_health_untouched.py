# SPDX-License-Identifier: Apache-2.0
"""What a watched step computes, copies and saves is what it would without the watch."""

import copy
import io

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import GradientHealth, Report

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = dict(limit_val_batches=None, num_sanity_val_steps=0, accumulate_grad_batches=1)


def loader():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(64, 4, 16, generator=generator), torch.randint(4, (64,), generator=generator)
    return DataLoader(TensorDataset(inputs, targets), 16)


class Padded(pl.LightningModule):
    """The mean over all places of an encoder with a mask: its fast path, and no other, gives zeros where that pads."""

    def __init__(self, frozen):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2).requires_grad_(not frozen)
        self.head, self.frozen, self.validated = nn.Linear(16, 4), frozen, []

    def loss(self, batch):
        inputs, targets = batch
        mask = torch.zeros(inputs.shape[:2], dtype=torch.bool)
        mask[1::2, 2:] = True
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features = self.encoder(inputs, src_key_padding_mask=mask).mean(1)
        return F.cross_entropy(self.head(features), targets)

    def training_step(self, batch, batch_idx):
        if self.frozen:
            self.encoder.eval()
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.validated.append(float(self.loss(batch)))

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


WATCHES = {
    "GradientHealth": lambda folder: GradientHealth(check_every=1, verbose=False),
    "without probes": lambda folder: GradientHealth(check_every=1, verbose=False, probe=False),
    "Report": lambda folder: Report(folder / "report.html"),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("watch", WATCHES)
def test_an_encoder_with_a_mask_gives_the_same_in_training_and_validation(make_trainer, tmp_path, watch, frozen):
    modules = []
    for callbacks in ([], [WATCHES[watch](tmp_path)]):
        module = Padded(frozen)
        torch.manual_seed(1)  # of the dropout
        make_trainer(*callbacks, epochs=3, **ALL).fit(module, loader(), loader())
        modules.append(module)
    assert len(modules[0].validated) == 12 and modules[0].validated == modules[1].validated
    assert all(map(torch.equal, modules[0].state_dict().values(), modules[1].state_dict().values()))


class Keeping(pl.LightningModule):
    """Copies and saves a part of itself, then all of it, in every step."""

    def __init__(self):
        super().__init__()
        self.net, self.copies, self.saved = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)), (), ()

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0].flatten(1)), batch[1])
        self.copies = self.saved = ()  # not those of the step before, each within the next
        copies, saved = (copy.deepcopy(self.net), copy.deepcopy(self)), (io.BytesIO(), io.BytesIO())
        torch.save(self.net, saved[0])
        torch.save(self, saved[1])
        object.__setattr__(self, "copies", copies)  # no submodules
        self.saved = saved
        return loss

    def validation_step(self, batch, batch_idx):
        self.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("watch", WATCHES)
def test_copies_and_files_of_a_watched_step_have_nothing_of_it(make_trainer, tmp_path, watch):
    module = Keeping()
    found = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args):
            (net, whole), files = module.copies, module.saved
            for file in files:
                file.seek(0)
            found.append((net, whole, *(torch.load(file, weights_only=False) for file in files)))

        on_validation_batch_end = on_train_batch_end

    make_trainer(WATCHES[watch](tmp_path), Look(), epochs=1, **ALL).fit(module, loader(), loader())
    assert len(found) == 8
    for kept in found:
        for each in kept:
            assert not any(part._forward_hooks or part._forward_pre_hooks for part in each.modules())
        for whole in kept[1::2]:
            assert whole.training_step.__func__ is Keeping.training_step and whole.training_step.__self__ is whole
            assert whole.validation_step.__func__ is Keeping.validation_step
            whole.training_step(next(iter(loader())), 0)
