# SPDX-License-Identifier: Apache-2.0
"""ActivationRegularization against the same terms inside the module."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_optkit.callbacks import SAM, ActivationRegularization, Fuse, RDrop

X = torch.randn(6, 3, 5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (6, 3), generator=torch.Generator().manual_seed(1))


class Reader(pl.LightningModule):
    """`extra(h, dropped)` is added to its loss."""

    def __init__(self, batch_first=True, extra=None, fail=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.lstm, self.drop, self.head = nn.LSTM(4, 6, batch_first=batch_first), nn.Dropout(0.3), nn.Linear(6, 3)
        self.extra, self.fail = extra, fail

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.current_epoch + batch_idx)

    def training_step(self, batch, batch_idx):
        x, y = batch
        h, _ = self.lstm(x if self.lstm.batch_first else x.transpose(0, 1))
        dropped = self.drop(h)
        loss = nn.functional.cross_entropy(self.head(dropped.mean(int(self.lstm.batch_first))), y)
        if self.fail:
            raise KeyError("stop")
        return loss if self.extra is None else loss + self.extra(h, dropped)


def trained(make_trainer, module, *callbacks):
    make_trainer(*callbacks, epochs=2).fit(
        module, torch.utils.data.DataLoader(list(zip(X, Y, strict=True)), batch_size=None)
    )
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def both(h, dropped):
    return 2.0 * dropped.square().mean() + 3.0 * (h[:, 1:] - h[:, :-1]).square().mean()


@pytest.mark.parametrize("callbacks", [[], [Fuse]], ids=["torch", "Fuse"])
def test_it_equals_the_terms_in_the_module(make_trainer, callbacks):
    callback = ActivationRegularization("drop", "lstm", alpha=2.0, beta=3.0)
    actual = trained(make_trainer, Reader(), *[c() for c in callbacks], callback)
    expected = trained(make_trainer, Reader(extra=both))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_a_recurrent_layer_says_where_time_is(make_trainer):
    callback = ActivationRegularization("lstm", alpha=0.0, beta=3.0)
    actual = trained(make_trainer, Reader(batch_first=False), callback)
    expected = trained(
        make_trainer, Reader(batch_first=False, extra=lambda h, _: 3.0 * (h[1:] - h[:-1]).square().mean())
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("other", [SAM, RDrop])
def test_it_belongs_to_every_run_of_training_step(make_trainer, order, other):
    callback = ActivationRegularization("drop", "lstm", alpha=2.0, beta=3.0)
    actual = trained(make_trainer, Reader(), *[callback, other()][::order])
    expected = trained(make_trainer, Reader(extra=both), other())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fail", [False, True])
def test_the_module_is_left_as_it_was(make_trainer, fail):
    module = Reader(fail=fail)
    try:
        trained(make_trainer, module, ActivationRegularization("lstm"))
    except KeyError:
        assert fail
    assert "training_step" not in vars(module) and not module.lstm._forward_hooks


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: ActivationRegularization("x", alpha=-1.0), r"^Act.*\(alpha=-1\.0\): alpha must be in \[0, inf\)\.$"),
        (lambda: ActivationRegularization("x", beta=-1.0), r"^Act.*\(beta=-1\.0\): beta must be in \[0, inf\)\.$"),
        (lambda: ActivationRegularization("x", alpha=0, beta=0), r"^Act.*\(alpha=0, beta=0\): one of them must be"),
        (lambda: ActivationRegularization("gru"), r"^Act.*\(names='gru'\): no module has such a name; there are lstm,"),
        (lambda: ActivationRegularization("lstm", "gru"), r"^Act.*\(temporal_names='gru'\): no module has such a name"),
    ],
)
def test_bad_input_is_refused(make_trainer, callback, message):
    with pytest.raises(ValueError, match=message):
        trained(make_trainer, Reader(), callback())


@pytest.mark.parametrize(("names", "which"), [((1.2,), "names"), (("lstm", 1.2), "temporal_names")])
def test_names_that_are_no_pattern_are_refused_at_once(names, which):
    with pytest.raises(TypeError, match=rf"^ActivationRegularization\({which}=1\.2\): {which} must be a shell pattern"):
        ActivationRegularization(*names)
