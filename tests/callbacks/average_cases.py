# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of WeightAveraging: both implementations of an average, and the expected values."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_optkit.callbacks import Fuse, WeightAveraging

PATHS = ["folded", "own pass"]
TOLERANCE = 1e-6  # six steps on numbers of size 1 in fp32

folded_and_own = pytest.mark.parametrize("path", PATHS)
resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*ModelCheckpoint")


def fuse(path):
    return [Fuse(verbose=False)] if path == "folded" else []


def callbacks_of(path, average, *more):
    return [*fuse(path), WeightAveraging(average), *more]


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def whole_state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def hooks_of(optimizer):
    return [hook for name, hooks in vars(optimizer).items() if name.endswith("_hooks") for hook in hooks]


def assert_equal(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class Trace(Callback):
    """The trained state after every optimizer step, and the state in every validation step, by step.

    Args:
        of: Reads a module: `weights` or `whole_state`.
    """

    def __init__(self, of=weights):
        self.of, self.trained, self.validated, self.last_step = of, {}, {}, 0

    def on_train_start(self, trainer, pl_module):
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            self.trained[self.last_step] = self.of(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.setdefault(trainer.global_step, []).append(self.of(pl_module))


def averages(trained, average):
    """An EMA after each step from the first that is averaged, from the trained weights."""
    result, current = {}, None
    for step, now in trained.items():
        if step >= average.start and (step - average.start) % average.every == 0:
            if current is None:
                current = {name: value.clone() for name, value in now.items()}
            else:
                current = {name: value + (1 - average.decay) * (now[name] - value) for name, value in current.items()}
        if current is not None:
            result[step] = current
    return result


def ema(states, decay):
    current = states[0]
    for state in states[1:]:
        current = {name: value + (1 - decay) * (state[name] - value) for name, value in current.items()}
    return current


def mean(states):
    return {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
