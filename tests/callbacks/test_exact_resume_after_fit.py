# SPDX-License-Identifier: Apache-2.0
"""A run that is saved after its fit, and goes on for longer, is as one run."""

import random

import numpy as np
import pytest
import torch
from exact_resume_cases import Dropping, Interrupt, Plain, augmented
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import ExactResume

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(make_trainer, path, make_loader, ckpt_path=None, saves=True, fails=False, **kwargs):
    """The weights after a fit; `path` is written after it."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(1 if ckpt_path is None else 99)
    module = Dropping()
    module.draws = False
    trainer = make_trainer(ExactResume(), *([Interrupt(path)] if fails else []), **kwargs)
    try:
        trainer.fit(module, make_loader(), DataLoader(Plain(), batch_size=5), ckpt_path=ckpt_path)
    except RuntimeError as error:
        assert fails and str(error) == "pulled the plug"
        path.unlink()
    torch.rand(5), random.random()  # what else is drawn before it is saved
    if saves:
        trainer.save_checkpoint(path)
    return torch.cat([p.detach().flatten() for p in module.parameters()])


AFTER = {
    "epochs": (dict(epochs=2), dict(epochs=4)),
    "accumulated": (dict(epochs=2, accumulate_grad_batches=2), dict(epochs=4, accumulate_grad_batches=2)),
    "steps inside an epoch": (dict(epochs=9, max_steps=7), dict(epochs=9, max_steps=12)),
    "steps at the end of one": (dict(epochs=9, max_steps=10), dict(epochs=9, max_steps=15)),
    "validated": (dict(epochs=2, limit_val_batches=1.0), dict(epochs=4, limit_val_batches=1.0)),
    "failed": (dict(epochs=4, fails=True), dict(epochs=4)),
}


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("case", AFTER)
def test_saved_after_the_fit_it_goes_on_as_one_run(make_trainer, tmp_path, case, shuffle):
    first, whole = ({"accumulate_grad_batches": 1, **kwargs} for kwargs in AFTER[case])
    path, make = tmp_path / "after.ckpt", augmented(shuffle=shuffle)
    trained(make_trainer, path, make, **first)
    resumed = trained(make_trainer, path, make, ckpt_path=path, saves=False, **whole)
    assert torch.equal(resumed, trained(make_trainer, path, make, saves=False, **whole))


def test_what_a_run_that_does_nothing_was_given_is_saved_again(make_trainer, tmp_path):
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    trained(make_trainer, first, augmented(), epochs=2)
    trained(make_trainer, second, augmented(), ckpt_path=first, epochs=2)
    states = [torch.load(path, weights_only=True)["callbacks"]["ExactResume"] for path in (first, second)]
    assert torch.equal(*(state["ranks"][0]["now"]["torch"] for state in states))
