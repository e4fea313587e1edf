# SPDX-License-Identifier: Apache-2.0
"""MaxNorm after every step, with any optimizer, before any average."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, MaxNorm, WeightAveraging
from lightning_optkit.optimizers import AdamW

LIMIT = 0.5


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05)


class Trace(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2 == 1:
            self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


class Expected(Trace):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2 == 1:
            for p in pl_module.parameters():
                if p.dim() == 2:
                    p.data = torch.renorm(p.data, 2, 0, LIMIT)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


@pytest.mark.parametrize("callbacks", [[], [Fuse]], ids=["torch", "Fuse"])
@pytest.mark.parametrize("configure", [adamw, lambda m: AdamW(m.parameters(), lr=0.05)], ids=["torch's", "ours"])
def test_every_step_ends_within_the_ball(regression, fit, callbacks, configure):
    trace, expected = Trace(), Expected()
    fit(regression(configure), *[callback() for callback in callbacks], MaxNorm(LIMIT), trace)
    fit(regression(adamw), expected)
    torch.testing.assert_close(trace.seen, expected.seen, rtol=0, atol=1e-5)
    assert len(trace.seen) == 6


def test_only_the_named_weights(regression, fit):
    module = regression(adamw)
    fit(module, MaxNorm(0.1, names="net.2.*"), MaxNorm(0.2, names="net.0.*"))
    assert module.net[2].weight.norm(dim=1).max() <= 0.1 + 1e-6
    assert module.net[0].weight.detach().norm(dim=1).max() == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_an_average_sees_the_projected_weights(regression, fit, order):
    module, trace = regression(adamw), Trace()
    fit(module, *[MaxNorm(LIMIT), WeightAveraging(EMA(0.5))][::order], trace)
    average = trace.seen[0]
    for now in trace.seen[1:]:
        average = {name: 0.5 * (average[name] + now[name]) for name in now}
    torch.testing.assert_close(dict(module.named_parameters()), average, rtol=0, atol=1e-6)


def test_a_transposed_convolution_has_its_units_in_the_second_dimension(regression, fit):
    class Transposed(regression):
        def __init__(self):
            super().__init__(adamw)
            self.up = torch.nn.ConvTranspose1d(4, 3, 1)

        def loss(self, batch):
            return self.up(batch[0][..., None]).square().mean()

    module = Transposed()
    fit(module, MaxNorm(0.1, names="up.*"))
    assert module.up.weight.norm(dim=(0, 2)).max() <= 0.1 + 1e-6


def test_the_optimizer_is_left_as_it_was(regression, fit):
    assert not fit(regression(adamw), MaxNorm(LIMIT)).optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([MaxNorm(names="head")], r"^MaxNorm\(names='head'\): no weight of the module has such a name\.$"),
        ([MaxNorm(), MaxNorm()], r"^MaxNorm\(\.\.\.\): given twice"),
        (
            [Fuse(), MaxNorm(), WeightAveraging(EMA(0.9))],
            r"^MaxNorm\(\.\.\.\): changes the weights after the step of Ad",
        ),
    ],
)
def test_what_would_not_work_is_refused(regression, fit, callbacks, message):
    with pytest.raises(ValueError, match=message):
        fit(regression(adamw), *callbacks)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^MaxNorm\(max_norm=0\.0\): max_norm must be in \(0, inf\)\.$"):
        MaxNorm(0.0)
    with pytest.raises(TypeError, match=r"^MaxNorm\(names=None\): names must be a shell pattern of names"):
        MaxNorm(names=None)
