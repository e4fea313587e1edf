# SPDX-License-Identifier: Apache-2.0
"""GradientNoise: the noise at each optimizer step, in every precision."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_optkit.callbacks import Fuse, GradientNoise
from lightning_optkit.regularization import gradient_noise_std

ETA, LR = 0.5, 1e-3


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=LR)


def fused(module):
    return torch.optim.SGD(module.parameters(), lr=LR, fused=True)


def vector(module):
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


class Trace(Callback):
    """Per optimizer step: the gradient of the step minus that of the backward passes."""

    def __init__(self):
        self.noise = []

    def on_after_backward(self, trainer, pl_module):
        self.grads = torch.cat([p.grad.flatten().clone() for p in pl_module.parameters()])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = vector(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2 == 1:
            self.noise.append((self.before - vector(pl_module)) / LR - self.grads)


def test_every_step_gets_noise_of_its_deviation_once(regression, fit):
    runs = []
    for seed in range(20):
        trace = Trace()
        fit(regression(sgd), GradientNoise(ETA, seed=seed), trace, epochs=3)
        runs.append(trace.noise)
    assert len(runs[0]) == 6
    for step in range(6):
        drawn = torch.cat([run[step] for run in runs])
        assert drawn.std() == pytest.approx(gradient_noise_std(step, ETA), rel=0.06)
        assert abs(drawn.mean()) < 0.06
    assert (runs[0][0] - runs[1][0]).abs().max() > 0.1 and (runs[0][0] - runs[0][1]).abs().max() > 0.1


@pytest.mark.parametrize("configure", [sgd, fused])
@pytest.mark.parametrize("callbacks", [[], [Fuse]], ids=["torch", "Fuse"])
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_the_noise_does_not_depend_on_who_unscales(regression, fit, configure, callbacks, precision):
    module, expected = regression(configure), regression(sgd)
    fit(module, *[callback() for callback in callbacks], GradientNoise(ETA), precision=precision)
    fit(expected, GradientNoise(ETA))
    # The gradients of fp16 differ by 2**-11 of themselves; six steps.
    torch.testing.assert_close(vector(module), vector(expected), rtol=0, atol=1e-6 if precision == "32-true" else 1e-4)


def test_it_leaves_torchs_random_numbers_alone(regression, fit):
    drawn = []
    for callbacks in ([], [GradientNoise(ETA)]):
        torch.manual_seed(0)
        fit(regression(sgd), *callbacks)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(eta=0.0), r"^GradientNoise\(eta=0\.0\): eta must be in \(0, inf\)\.$"),
        (dict(gamma=-1.0), r"^GradientNoise\(gamma=-1\.0\): gamma must be in \[0, inf\)\.$"),
        (dict(seed=-1), r"^GradientNoise\(seed=-1\): seed must be an integer >= 0\.$"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientNoise(**arguments)


def test_every_evaluation_of_a_step_of_lbfgs_gets_the_same_noise(regression, fit):
    seen = []

    class Before(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.before = torch.cat([p.grad.flatten().clone() for p in pl_module.parameters()])

    class After(Before):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            clean, step = before.before, trainer.callbacks[1]._steps[0]
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            seen.append((step, self.before - clean))

    before = Before()
    module = regression(lambda module: torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=3))
    fit(module, before, GradientNoise(), After(), accumulate_grad_batches=1, epochs=1)
    of_step = {step: [noise for other, noise in seen if other == step] for step, _ in seen}
    assert len(of_step) == 4 and all(len(noises) > 1 for noises in of_step.values())
    for noises in of_step.values():
        for noise in noises:
            torch.testing.assert_close(noise, noises[0], rtol=0, atol=1e-6)
    assert not torch.allclose(of_step[0][0], of_step[1][0], atol=1e-3)
