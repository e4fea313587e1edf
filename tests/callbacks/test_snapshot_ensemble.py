# SPDX-License-Identifier: Apache-2.0
"""SnapshotEnsemble in real Trainers: its steps, its weights, and their use."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.optim.lr_scheduler import LambdaLR

from lightning_optkit.averaging import EMA, ensemble_predict, greedy_soup
from lightning_optkit.callbacks import Fuse, SnapshotEnsemble, WeightAveraging
from lightning_optkit.schedules import cosine, sgdr


def scheduled(schedule, total):
    def configure(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        scheduler = LambdaLR(optimizer, lambda step: schedule(step, total))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return configure


class Trace(Callback):
    """Weights and rate after every optimizer step."""

    def __init__(self):
        self.weights, self.rates = {}, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates[trainer.global_step + 1] = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.weights[trainer.global_step] = {n: p.detach().clone() for n, p in pl_module.named_parameters()}


def steps_of(paths):
    return [torch.load(path, weights_only=True)["global_step"] for path in paths]


@pytest.mark.filterwarnings("ignore:SnapshotEnsemble.*the run ended at step 12")
@pytest.mark.parametrize("path", ["fused", "plain"])
@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        (sgdr(cycle=4), [4, 8, 12]),
        (sgdr(cycle=1 / 3), [4, 8, 12]),
        (sgdr(cycle=3, cycle_mult=2.0), [3, 9]),
        (sgdr(cycle=2.5 / 12), [3, 5, 8, 10]),
    ],
    ids=str,
)
def test_the_weights_at_the_end_of_every_cycle(regression, fit, tmp_path, path, schedule, ends):
    trace, ensemble = Trace(), SnapshotEnsemble(schedule, tmp_path / "snapshots")
    fuse = [Fuse(verbose=False)] if path == "fused" else []
    trainer = fit(regression(scheduled(schedule, 12)), *fuse, trace, ensemble, epochs=6)
    found = steps_of(ensemble.paths)
    assert found == ends
    for file, step in zip(ensemble.paths, found, strict=True):
        saved = torch.load(file, weights_only=True)["state_dict"]
        torch.testing.assert_close(dict(saved), trace.weights[step], rtol=0, atol=0)
        if step < trainer.global_step:
            assert trace.rates[step + 1] > trace.rates[step]  # a restart comes next, never in between
    rises = [step for step in trace.rates if step > 1 and trace.rates[step] > trace.rates[step - 1]]
    assert [step - 1 for step in rises] == [step for step in found if step < 12]


def test_a_length_and_a_start_instead_of_a_schedule(regression, fit, tmp_path):
    ensemble = SnapshotEnsemble(0.5, tmp_path, start=2)
    fit(regression(scheduled(cosine(), 6)), ensemble)
    assert steps_of(ensemble.paths) == [4, 6]
    ensemble = SnapshotEnsemble(2, tmp_path, cycle_mult=2.0, save_weights_only=True)
    fit(regression(scheduled(cosine(), 6)), ensemble)
    assert steps_of(ensemble.paths) == [2, 6]
    assert "optimizer_states" not in torch.load(ensemble.paths[0], weights_only=True)


def test_resumed_equals_uninterrupted(regression, fit, tmp_path):
    schedule = sgdr(cycle=3)
    whole, resumed = (SnapshotEnsemble(schedule, tmp_path / name) for name in ("whole", "resumed"))
    fit(regression(scheduled(schedule, 12)), whole, epochs=6)
    fit(regression(scheduled(schedule, 12)), resumed, epochs=6, ckpt_path=whole.paths[1])
    assert steps_of(resumed.paths) == steps_of(whole.paths) == [3, 6, 9, 12]
    assert resumed.paths[:2] == whole.paths[:2]
    for a, b in zip(resumed.paths[2:], whole.paths[2:], strict=True):
        states = [dict(torch.load(p, weights_only=True)["state_dict"]) for p in (a, b)]
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_predictions_and_soups_of_its_files(regression, fit, data, tmp_path):
    ensemble = SnapshotEnsemble(2, tmp_path)
    module = regression(scheduled(sgdr(cycle=2), 6))
    fit(module, ensemble, WeightAveraging(EMA(0.5)))
    predicted = ensemble_predict(module, ensemble.paths, data(), activation="identity")
    members = [torch.load(p, weights_only=True)["state_dict"] for p in ensemble.paths]
    inputs = torch.cat([x for x, _ in data()])
    outputs = torch.stack([torch.func.functional_call(module, m, (inputs,)) for m in members])
    torch.testing.assert_close(predicted.mean, outputs.mean(0).detach())
    assert "current_model_state" in torch.load(ensemble.paths[0], weights_only=True)  # it holds the average

    def score(weights):
        return -sum(
            float(torch.nn.functional.mse_loss(torch.func.functional_call(module, weights, (x,)), y)) for x, y in data()
        )

    assert greedy_soup(ensemble.paths, score).score >= max(map(score, members))


def test_a_run_that_ends_inside_a_cycle_says_so(regression, fit, tmp_path):
    with pytest.warns(UserWarning, match=r"^SnapshotEnsemble\(cycle=4\): the run ended at step 6, inside a cycle that"):
        fit(regression(scheduled(sgdr(cycle=4), 6)), SnapshotEnsemble(4, tmp_path))


def test_the_folder_is_beside_the_logs(regression, fit, tmp_path):
    ensemble = SnapshotEnsemble(6)
    fit(regression(scheduled(cosine(), 6)), ensemble, ModelCheckpoint(tmp_path), enable_checkpointing=True)
    assert ensemble.paths == [str(tmp_path / "snapshots" / "snapshot-1-step=6.ckpt")]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (dict(cycle=cosine()), ValueError, r"cycle must be schedules\.sgdr\(\.\.\.\) or the length of its first cycle"),
        (dict(cycle=0), ValueError, r"SnapshotEnsemble\(cycle=0\)"),
        (dict(cycle="3"), TypeError, r"SnapshotEnsemble\(cycle='3'\)"),
        (dict(cycle=3, cycle_mult=0.5), ValueError, r"SnapshotEnsemble\(cycle_mult=0\.5\)"),
        (dict(cycle=sgdr(), cycle_mult=2.0), ValueError, r"SnapshotEnsemble\(cycle_mult=2\.0\): the schedule has its"),
        (dict(cycle=3, start=-1), ValueError, r"SnapshotEnsemble\(start=-1\)"),
        (dict(cycle=3, save_weights_only=1), ValueError, r"SnapshotEnsemble\(save_weights_only=1\)"),
    ],
    ids=str,
)
def test_refuses_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        SnapshotEnsemble(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(cycle=7), r"^SnapshotEnsemble\(cycle=7\): cycle must not exceed total_steps=6"),
        (dict(cycle=1, start=6), r"^SnapshotEnsemble\(start=6\): start must be less than the run, of 6 steps\."),
    ],
)
def test_refuses_a_cycle_longer_than_the_run(regression, fit, tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit(regression(scheduled(cosine(), 6)), SnapshotEnsemble(dirpath=tmp_path, **kwargs))
