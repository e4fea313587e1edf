# SPDX-License-Identifier: Apache-2.0
"""ScheduleFree in real Trainers: where the average is used, what a checkpoint contains, and that a run needs it."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, ScheduleFree, WeightAveraging
from lightning_optkit.optimizers import ScheduleFreeAdamW, ScheduleFreeSGD

TOLERANCE = 1e-6  # six steps on numbers of size 1 in fp32
with_either = pytest.mark.parametrize("switch", [ScheduleFree, Fuse])


def adamw(module):
    return ScheduleFreeAdamW(module.parameters(), lr=0.05, weight_decay=0.1, warmup_steps=3)


def sgd(module):
    return ScheduleFreeSGD(module.parameters(), lr=0.2)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_equal(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class Trace(Callback):
    """By optimizer step: the weights of gradients and of validation, and x computed from y and z."""

    def __init__(self):
        self.trained, self.validated, self.averages = {}, {}, {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained[trainer.global_step] = weights(pl_module)
        optimizer = trainer.optimizers[0]
        beta = optimizer.param_groups[0].get("momentum") or optimizer.param_groups[0]["betas"][0]
        self.averages[trainer.global_step] = {
            name: p.detach() + (1 - 1 / beta) * (optimizer.state[p]["z"] - p.detach())
            for name, p in pl_module.named_parameters()
            if p in optimizer.state
        }

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.setdefault(trainer.global_step, []).append(weights(pl_module))


@with_either
@pytest.mark.parametrize("configure", [adamw, sgd])
def test_validation_and_the_end_see_the_average_and_training_does_not_notice(regression, fit, switch, configure):
    plain, module = regression(configure), regression(configure)
    undisturbed, trace = Trace(), Trace()
    fit(plain, switch(), undisturbed)
    trainer = fit(module, switch(), trace, limit_val_batches=1.0, val_check_interval=2)
    assert sorted(trace.validated) == [0, 1, 2, 3, 4, 5, 6]  # 0: the sanity check
    for step in range(1, 7):
        for seen in trace.validated[step]:
            assert_equal(seen, trace.averages[step], TOLERANCE)
    assert_equal(trace.trained, undisturbed.trained)
    assert_equal(weights(module), weights(plain))
    assert_equal(weights(module), trace.averages[6], TOLERANCE)
    assert trainer.test(module, torch.utils.data.DataLoader([(torch.ones(4), torch.ones(2))]), verbose=False)
    assert_equal(weights(module), weights(plain))


class SaveEveryEpoch(Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_epoch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@with_either
@pytest.mark.parametrize("configure", [adamw, sgd])
def test_resumed_equals_uninterrupted(regression, fit, switch, configure, tmp_path):
    straight = regression(configure)
    fit(straight, switch(), SaveEveryEpoch(tmp_path), limit_val_batches=1.0)
    for step in (2, 4):
        resumed = regression(configure)
        trainer = fit(resumed, switch(), ckpt_path=tmp_path / f"{step}.ckpt", limit_val_batches=1.0)
        assert trainer.global_step == 6
        assert_equal(weights(resumed), weights(straight))


@with_either
@pytest.mark.parametrize("weights_only", [False, True])
def test_a_checkpoint_holds_the_average_wherever_it_is_taken(regression, fit, switch, weights_only, tmp_path):
    trace = Trace()
    settings = dict(every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only)
    in_training = ModelCheckpoint(tmp_path, filename="{step}", **settings)
    module = regression(sgd)
    trainer = fit(module, switch(), trace, in_training, enable_checkpointing=True, limit_val_batches=1.0)
    for step in range(1, 7):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert_equal(saved["state_dict"], trace.averages[step], TOLERANCE)
        if not weights_only:
            optimizer = saved["optimizer_states"][0]
            assert [group["train_mode"] for group in optimizer["param_groups"]] == [False]
            waiting = [state["y"] for state in optimizer["state"].values()]
            assert_equal(waiting, list(trace.trained[step].values()))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert_equal(torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"], weights(module))


def test_a_run_without_it_stops_at_the_first_step(regression, fit):
    module = regression(adamw)
    before = weights(module)
    with pytest.raises(RuntimeError, match=r"ScheduleFreeAdamW\.step: .* callbacks=\[ScheduleFree\(\)\]"):
        fit(module, limit_val_batches=1.0)
    assert_equal(weights(module), before)


class Failing(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            raise ZeroDivisionError


@with_either
def test_the_module_is_as_it_was_after_an_exception_and_holds_the_average(regression, make_trainer, data, switch):
    module, trace = regression(sgd), Trace()
    before = set(vars(module))
    callbacks = [switch(), trace, Failing()]
    trainer = make_trainer(*callbacks)
    with pytest.raises(ZeroDivisionError):
        trainer.fit(module, data(), data(4))
    assert "on_save_checkpoint" not in vars(module)
    assert set(vars(module)) - before <= {"_hparams", "_metric_attributes"}  # Lightning's own
    assert [type(callback) for callback in trainer.callbacks].count(ScheduleFree) == (switch is ScheduleFree)
    assert_equal(weights(module), trace.averages[3], TOLERANCE)


@with_either
def test_the_module_is_as_it_was_after_the_fit(regression, fit, switch):
    module = regression(sgd)
    before = set(vars(module))
    trainer = fit(module, switch())
    assert set(vars(module)) - before <= {"_hparams", "_metric_attributes"}  # Lightning's own
    assert [type(callback) for callback in trainer.callbacks].count(ScheduleFree) == (switch is ScheduleFree)


def test_beside_fuse_it_is_not_brought_along_again(regression, fit):
    alone, both = regression(sgd), regression(sgd)
    fit(alone, ScheduleFree())
    trainer = fit(both, Fuse(), ScheduleFree())
    assert [type(callback) for callback in trainer.callbacks].count(ScheduleFree) == 1
    assert_equal(weights(both), weights(alone))


@pytest.mark.parametrize(
    ("callbacks", "configure", "message"),
    [
        ([ScheduleFree, ScheduleFree], sgd, r"^ScheduleFree\(\): given twice; one switches every optimizer\.$"),
        (
            [ScheduleFree],
            lambda module: torch.optim.SGD(module.parameters()),
            r"^ScheduleFree\(\): needs ScheduleFreeSGD or ScheduleFreeAdamW; this run has SGD\.$",
        ),
        ([ScheduleFree, lambda: WeightAveraging(EMA(0.9))], sgd, r"the rule keeps an average itself\.$"),
    ],
    ids=["twice", "torch", "averaged"],
)
def test_what_makes_no_sense_is_refused(regression, fit, callbacks, configure, message):
    with pytest.raises(ValueError, match=message):
        fit(regression(configure), *(callback() for callback in callbacks))
