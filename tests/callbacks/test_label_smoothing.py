# SPDX-License-Identifier: Apache-2.0
"""LabelSmoothing on unchanged modules, against torch's own smoothing."""

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_optkit.callbacks import LabelSmoothing

LOGITS = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(0))
TARGET = torch.tensor([[0, 2], [1, -100], [1, 0], [2, 2], [-100, 1], [0, 0]])
SOFT = torch.rand(6, 3, 2, generator=torch.Generator().manual_seed(1))
WEIGHT = torch.tensor([1.0, 2.0, 0.5])


class Module(pl.LightningModule):
    def __init__(self, loss, target):
        super().__init__()
        self.loss, self.target = loss, target
        self.logits = nn.Parameter(LOGITS.clone())

    def training_step(self, batch, batch_idx):
        return self.loss(self.logits, self.target)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self.logits, self.target), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def gradients(make_trainer, module, *callbacks):
    """One step of SGD with rate 1."""
    trainer = make_trainer(*callbacks, epochs=1, accumulate_grad_batches=1, limit_val_batches=1)
    trainer.fit(module, [0], [0])
    return LOGITS - module.logits.detach(), trainer


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("target", [TARGET, SOFT], ids=["indices", "soft"])
def test_it_is_torchs_own_smoothing_with_weights_and_ignored_targets(make_trainer, reduction, weight, target):
    arguments = dict(weight=weight, reduction=reduction)
    module = Module(nn.CrossEntropyLoss(**arguments), target)
    expected = Module(nn.CrossEntropyLoss(**arguments, label_smoothing=0.2), target)
    actual, trainer = gradients(make_trainer, module, LabelSmoothing(0.2))
    expected, _ = gradients(make_trainer, expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0 if target is TARGET else 1e-6)
    plain = F.cross_entropy(module.logits, target, **arguments)  # validation is not smoothed
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], plain.detach())


def test_nll_loss_is_smoothed_as_cross_entropy(make_trainer):
    module = Module(lambda logits, target: F.nll_loss(logits.log_softmax(1), target, WEIGHT), TARGET)
    expected = Module(nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2), TARGET)
    actual, _ = gradients(make_trainer, module, LabelSmoothing(0.2))
    torch.testing.assert_close(actual, gradients(make_trainer, expected)[0])


@pytest.mark.parametrize(
    "loss", [nn.BCEWithLogitsLoss(), lambda logits, y: F.binary_cross_entropy(logits.sigmoid(), y)]
)
def test_binary_targets_move_toward_a_half(make_trainer, loss):
    hard = (SOFT > 0.5).float()
    actual, _ = gradients(make_trainer, Module(loss, hard), LabelSmoothing(0.2))
    expected, _ = gradients(make_trainer, Module(loss, hard * 0.8 + 0.1))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("loss", "target", "error", "message"),
    [
        (nn.MSELoss(), SOFT, RuntimeError, r"^LabelSmoothing\(\): needs .* computed mse_loss, a regression loss\.$"),
        (nn.CrossEntropyLoss(), SOFT + 1, ValueError, r"^label_smoothing\(target=1\.\d+\): probabilities must be in"),
        (nn.BCEWithLogitsLoss(), SOFT - 1, ValueError, r"^label_smoothing\(target=-0\.\d+\): probabilities must be in"),
        (
            nn.CrossEntropyLoss(label_smoothing=0.1),
            TARGET,
            ValueError,
            r"^LabelSmoothing\(smoothing=0\.2\): the module smooths already, by cross_entropy\(label_smoothing=0\.1\)",
        ),
    ],
)
def test_what_cannot_be_smoothed_is_refused_and_the_module_left_as_it_was(make_trainer, loss, target, error, message):
    module = Module(loss, target)

    with pytest.raises(error, match=message):
        gradients(make_trainer, module, LabelSmoothing(0.2))
    assert "training_step" not in vars(module)
    assert torch.equal(module.logits, LOGITS)


@pytest.mark.parametrize("smoothing", [1.0, -0.1, float("nan")])
def test_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"^LabelSmoothing\(smoothing=.*\): smoothing must be in \[0, 1\)\.$"):
        LabelSmoothing(smoothing)


def test_given_twice_is_refused(make_trainer):
    with pytest.raises(ValueError, match=r"^LabelSmoothing\(\.\.\.\): given twice"):
        gradients(make_trainer, Module(nn.CrossEntropyLoss(), TARGET), LabelSmoothing(), LabelSmoothing())
