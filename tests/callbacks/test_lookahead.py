# SPDX-License-Identifier: Apache-2.0
"""Lookahead in real Trainers against an explicit loop, resumed, and around several rules."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from two_gradient_cases import RATE, Classifier, SeedEachBatch, assert_close, batches, trained

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, Lookahead, WeightAveraging
from lightning_optkit.optimizers import Lion

RULES = {
    "SGD": lambda params: torch.optim.SGD(params, lr=RATE, momentum=0.8),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=RATE, betas=(0.8, 0.9)),
    "Lion": lambda params: Lion(params, lr=1e-3),
}


def without_noise(net):
    """Its parameters but the bias before BatchNorm, whose gradient is rounding alone."""
    return [p for name, p in net.named_parameters() if name != "0.bias"]


class With(Classifier):
    def __init__(self, rule):
        super().__init__()
        self.rule = rule

    def configure_optimizers(self):
        return self.rule(without_noise(self.net))


def written_out(rule, k, alpha, steps, dtype, accumulate=1):
    """Algorithm 1: phi and theta."""
    net = Classifier().net.to(dtype)
    params = without_noise(net)
    optimizer, phi = rule(params), [p.detach().clone() for p in params]
    for batch, (x, y) in enumerate(batches(steps)):
        torch.manual_seed(batch)
        (nn.functional.cross_entropy(net(x.to(dtype)), y) / accumulate).backward()
        if (batch + 1) % accumulate:
            continue
        optimizer.step()
        optimizer.zero_grad()
        if (batch + 1) // accumulate % k == 0:
            for p, theta in zip(phi, params, strict=True):
                p += alpha * (theta.detach() - p)
                theta.data.copy_(p)
    return net.state_dict()


@pytest.mark.parametrize("fuse", [[], [Fuse(verbose=False)]], ids=["torch", "Fuse"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_it_equals_the_loop_that_is_written_out_over_200_steps(make_trainer, rule, dtype, tolerance, fuse):
    module = With(RULES[rule])
    callback = Lookahead(k=7, alpha=0.3)
    precision = "64-true" if dtype == torch.float64 else "32-true"
    trainer = make_trainer(*fuse, callback, SeedEachBatch(), epochs=1, accumulate_grad_batches=1, precision=precision)
    trainer.fit(module, torch.utils.data.DataLoader(batches(200), batch_size=None))
    assert_close(module.net.state_dict(), written_out(RULES[rule], 7, 0.3, 200, dtype), tolerance)


def test_steps_are_counted_not_batches(make_trainer):
    found = trained(make_trainer, Lookahead(k=3), accumulate=2, steps=30, module=With(RULES["SGD"]))
    assert_close(found, written_out(RULES["SGD"], 3, 0.5, 30, torch.float32, accumulate=2), 1e-5)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_continues_with_its_slow_weights_and_its_count(make_trainer, tmp_path):
    data = torch.utils.data.DataLoader(batches(4), batch_size=None)
    straight, found = Classifier(), Classifier()
    make_trainer(Lookahead(k=3), SeedEachBatch(), epochs=3).fit(straight, data)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    make_trainer(Lookahead(k=3), SeedEachBatch(), saving, epochs=1, enable_checkpointing=True).fit(Classifier(), data)
    path = str(tmp_path / "epoch=0.ckpt")
    make_trainer(Lookahead(k=3), SeedEachBatch(), epochs=3).fit(found, data, ckpt_path=path, weights_only=False)
    assert_close(found.net.state_dict(), straight.net.state_dict(), 0)


def test_an_average_inside_the_step_is_refused_and_one_beside_it_sees_the_pulled_weights(make_trainer):
    data = torch.utils.data.DataLoader(batches(6), batch_size=None)
    with pytest.raises(ValueError, match=r"^Lookahead\(\.\.\.\): changes the weights after the step of SGD"):
        make_trainer(Fuse(verbose=False), WeightAveraging(EMA(0.5)), Lookahead()).fit(Classifier(), data)
    module = With(RULES["SGD"])
    callbacks = [WeightAveraging(EMA(0.0)), Lookahead(k=1, alpha=0.1), SeedEachBatch()]
    make_trainer(*callbacks, epochs=1, accumulate_grad_batches=1).fit(module, data)
    assert_close(module.net.state_dict(), written_out(RULES["SGD"], 1, 0.1, 6, torch.float32), 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(k=0), r"^Lookahead\(k=0\): k must be an integer >= 1\.$"),
        (dict(alpha=1.5), r"^Lookahead\(alpha=1\.5\): alpha must be in \(0, 1\]\.$"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Lookahead(**arguments)
