# SPDX-License-Identifier: Apache-2.0
"""The negative control of exact resume: each part of a checkpoint is left out in turn, and the comparison sees it."""

import copy
import os
import random
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import whole_run

from lightning_optkit.callbacks.seams.random_state import get_random_state, set_random_state
from lightning_optkit.clipping import AutoClip

pytestmark = pytest.mark.filterwarnings("ignore")
WHERE = (1, 6)  # epoch and batch after which it is saved, within a window of accumulation


def with_generator():
    return DataLoader(
        whole_run.Augmented(), 2, shuffle=True, generator=torch.Generator().manual_seed(random.getrandbits(9))
    )


def with_distributed_sampler():
    seed = int(os.environ["PL_GLOBAL_SEED"])  # as Lightning does
    return DataLoader(whole_run.Augmented(), 2, sampler=DistributedSampler(whole_run.Augmented(), 1, 0, seed=seed))


RUNS = {
    "workers": dict(num_workers=1),
    "scaled": dict(scaled=True),
    "own generator": dict(make_loader=with_generator),
    "distributed sampler": dict(make_loader=with_distributed_sampler),
}


class SaveAt(pl.Callback):
    def __init__(self, path, where=WHERE):
        self.path, self.where = path, where

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.where:
            trainer.save_checkpoint(self.path)


def run(name, seed, *callbacks, **kwargs):
    return whole_run.run("one", 1, seed, *callbacks, window=whole_run.WINDOW, epochs=2, **RUNS[name], **kwargs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The state at the end of each run, and its checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
            patch.setenv(variable, "0")
        folder, made = tmp_path_factory.mktemp("whole"), {}
        for name in RUNS:
            state = run(name, 1, SaveAt(folder / f"{name}.ckpt"))
            made[name] = state, torch.load(folder / f"{name}.ckpt", weights_only=False)
        yield made


def drawn(checkpoint):
    return checkpoint["callbacks"]["ExactResume"]["ranks"][0]


def callback(checkpoint, name):
    return next(key for key in checkpoint["callbacks"] if key.startswith(name))


def without(name):
    def leave_out(checkpoint):
        checkpoint["callbacks"].pop(callback(checkpoint, name))

    return leave_out


def other_numbers():
    """Random states of another seed."""
    device = torch.device("cpu")
    before = get_random_state([], device)
    random.seed(77), np.random.seed(77), torch.manual_seed(77)
    other = get_random_state([], device)
    set_random_state(before, [], device)
    return other


def fill(name, value):
    def leave_out(checkpoint):
        for state in checkpoint["optimizer_states"][0]["state"].values():
            assert name in state, state.keys()
            state[name] = torch.full_like(state[name], value) if torch.is_tensor(state[name]) else value

    return leave_out


def weights(checkpoint):
    torch.manual_seed(0)
    checkpoint["current_model_state"].update(copy.deepcopy(whole_run.Net().state_dict()))


def now(name):
    def leave_out(checkpoint):
        drawn(checkpoint)["now"][name] = other_numbers()[name]

    return leave_out


def loop(checkpoint):
    return checkpoint["loops"]["fit_loop"]


def position(checkpoint):
    names = "ready", "started", "processed", "completed"
    loop(checkpoint)["epoch_loop.batch_progress"]["current"] = dict.fromkeys(names, 0)


def steps(checkpoint):
    progress = loop(checkpoint)["epoch_loop.automatic_optimization.optim_progress"]
    progress["optimizer"]["step"]["total"].update(ready=0, completed=0)


def epochs(checkpoint):
    for counts in loop(checkpoint)["epoch_progress"].values():
        counts.update({name: number - 1 for name, number in counts.items()})


def seeds(checkpoint):
    mine = drawn(checkpoint)
    for state in (mine["now"], mine["epoch"]["iter"], *mine["epoch"]["fetches"].values()):
        state["seeds"] = []


def generators(checkpoint):
    mine = drawn(checkpoint)
    for state in (mine["epoch"]["iter"], *mine["epoch"]["fetches"].values()):
        state["loaders"] = [torch.Generator().get_state()]


def learned_in_the_step(checkpoint):
    checkpoint["callbacks"].pop(callback(checkpoint, "GradientClipping"))
    checkpoint["optimizer_states"][0]["clip"] = AutoClip().state_dict()


LEFT_OUT = {  # of which run, how, and a part of the state that then differs
    "weights": ("workers", weights, "weights"),
    "moments of the optimizer": ("workers", fill("exp_avg", 0.0), "optimizer"),
    "averages": ("workers", fill("ema", 0.0), "averages"),
    "number of averaged weights": ("workers", fill("num_averaged", 0), "optimizer"),
    "scheduler": ("workers", lambda checkpoint: checkpoint["lr_schedulers"].clear(), "scheduler"),
    "scaler of the loss": ("scaled", lambda checkpoint: checkpoint.pop("MixedPrecision"), "scaler"),
    "norms that a clip has seen": ("scaled", without("GradientClipping"), "clipping"),
    "norms that a clip in the step has seen": ("workers", learned_in_the_step, "clipping"),
    "state of a callback": ("workers", without("Losses"), "losses"),
    "random numbers of Python": ("scaled", now("python"), "python"),
    "random numbers of NumPy": ("scaled", now("numpy"), "numpy"),
    "random numbers of torch": ("scaled", now("torch"), "torch"),
    "random numbers of workers": ("workers", lambda c: drawn(c)["epoch"].update(iter=other_numbers()), "losses"),
    "order of the epoch": ("scaled", lambda c: drawn(c)["epoch"]["fetches"].update({0: other_numbers()}), "losses"),
    "generator of the loader": ("own generator", generators, "losses"),
    "seed of the sampler": ("distributed sampler", seeds, "losses"),
    "position in the epoch": ("workers", position, "losses"),
    "gradients of the window": ("workers", lambda c: drawn(c).update(gradients={}), "weights"),
    "steps so far": ("workers", steps, "steps"),
    "epochs so far": ("workers", epochs, "losses"),
}


@pytest.mark.parametrize("name", RUNS)
def test_with_every_part_it_is_the_run_that_was_not_stopped(runs, tmp_path, name):
    whole, checkpoint = runs[name]
    torch.save(checkpoint, tmp_path / "saved.ckpt")
    assert whole_run.differing(whole, run(name, 2, ckpt_path=tmp_path / "saved.ckpt")) == []


@pytest.mark.parametrize("part", LEFT_OUT)
def test_without_it_the_run_is_another(runs, tmp_path, part):
    name, leave_out, expected = LEFT_OUT[part]
    whole, checkpoint = runs[name]
    checkpoint = copy.deepcopy(checkpoint)
    leave_out(checkpoint)
    torch.save(checkpoint, tmp_path / "saved.ckpt")
    assert expected in whole_run.differing(whole, run(name, 2, ckpt_path=tmp_path / "saved.ckpt"))
