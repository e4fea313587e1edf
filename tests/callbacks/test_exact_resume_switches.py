# SPDX-License-Identifier: Apache-2.0
"""A run that goes on has the layers in evaluation, and the frozen parameters, of the run that was saved."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from runs_saved_once import Saves, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore")
PLACES = (
    (1, 2),
    (1,),
)  # in the second epoch: at the end of its third batch or in the validation after it, and at its end


class Net(pl.LightningModule):
    """In its second epoch the statistics do not move, and the first layer is not trained; None: another trains it."""

    def __init__(self, switches=True):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.switches = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), switches

    def on_train_epoch_start(self):
        if self.switches:
            self.net[1].train(self.current_epoch != 1)
            self.net[0].requires_grad_(self.current_epoch != 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(batch[0])

    def configure_optimizers(self):
        trained = [param for param in self.parameters() if self.switches is not None or param.requires_grad]
        return torch.optim.SGD(trained, lr=0.1)


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[0], train_bn=False)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


def fit(module, *callbacks, ckpt_path=None):
    data = TensorDataset(torch.randn(24, 2, generator=torch.Generator().manual_seed(1)))
    trainer(*callbacks).fit(module, DataLoader(data, 4, shuffle=True), DataLoader(data, 24), ckpt_path=ckpt_path)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize("callbacks", [(), (Thaws,)], ids=["by the module", "by BaseFinetuning"])
def test_what_a_run_has_switched_is_so_when_it_goes_on(tmp_path, hook, callbacks):
    path, switches = tmp_path / "saved.ckpt", None if callbacks else True
    whole = fit(Net(switches), Saves(path, hook, *PLACES), *(each() for each in callbacks))
    resumed = fit(Net(switches), *(each() for each in callbacks), ckpt_path=path)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_a_module_that_was_switched_before_says_so_again_in_its_next_file(tmp_path):
    first, second, module = tmp_path / "first.ckpt", tmp_path / "second.ckpt", Net()
    whole = fit(module, Saves(first, "on_train_batch_end", *PLACES))
    module.net[1].eval(), module.net[0].requires_grad_(False)  # as an exception leaves it
    fit(module, Saves(second, "on_validation_end", *PLACES), ckpt_path=first)
    torch.testing.assert_close(fit(Net(), ckpt_path=second), whole, rtol=0, atol=0)


def test_what_the_program_has_switched_is_its_own(tmp_path):
    frozen = Net(switches=False)
    frozen.net[0].requires_grad_(False)
    fit(frozen, Saves(tmp_path / "frozen.ckpt", "on_train_batch_end", *PLACES))
    thawed = Net(switches=False)
    fit(thawed, ckpt_path=tmp_path / "frozen.ckpt")
    assert thawed.net[0].weight.requires_grad
    assert not torch.equal(thawed.net[0].weight, frozen.net[0].weight)
