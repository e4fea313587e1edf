# SPDX-License-Identifier: Apache-2.0
"""Where Lightning's own averaging callbacks go wrong (2.6.6), and what ours do in the same place.

What takes two processes (parameters sharded by FSDP2) is in test_weight_averaging_sharded.py.
"""

import pickle

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optkit.averaging import EMA, SWA
from lightning_optkit.callbacks import WeightAveraging

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*before the first update; the module keeps its trained weights"),
    pytest.mark.filterwarnings("ignore:`.fit.ckpt_path=None.` was called without a model"),
    pytest.mark.filterwarnings('ignore:.fit.ckpt_path="last". is set'),
    pytest.mark.filterwarnings("ignore:.*SWA"),
    pytest.mark.filterwarnings("ignore:Swapping"),
    pytest.mark.filterwarnings("ignore:No .*average"),
]

both = pytest.mark.parametrize("ours", [False, True], ids=["Lightning's", "ours"])


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def scheduled(module):
    optimizer = sgd(module)
    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def are_equal(a, b, tolerance=0.0):
    return all(torch.allclose(a[name], b[name], rtol=0, atol=tolerance) for name in b)


class Trace(Callback):
    """The trained weights after the last step, the first weights that validation saw, and the batches trained on."""

    def __init__(self):
        self.trained, self.validated, self.batches, self.rates = {}, [], 0, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained = weights(pl_module)
        self.batches += 1
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_validation_start(self, trainer, pl_module):
        self.trained = weights(pl_module)

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append((trainer.global_step, weights(pl_module)))


@both
def test_an_average_that_has_not_started(regression, fit, ours):
    """Theirs validates the initial weights and leaves them in the module, so that the training is lost."""
    average = (
        WeightAveraging(EMA(0.9, start=100)) if ours else EMAWeightAveraging(decay=0.9, update_starting_at_step=100)
    )
    module, trace = regression(sgd), Trace()
    initial = weights(module)
    fit(module, trace, average, limit_val_batches=1.0)
    last_step, validated = trace.validated[-1]
    assert last_step == 6
    assert are_equal(validated, initial) == (not ours)
    assert are_equal(weights(module), initial) == (not ours)
    assert are_equal(weights(module), trace.trained) == ours


@both
def test_files_of_weights_only(regression, fit, tmp_path, ours):
    """Theirs exports the trained weights."""
    average = WeightAveraging(EMA(0.9)) if ours else EMAWeightAveraging(decay=0.9)
    keep = ModelCheckpoint(tmp_path, save_weights_only=True)
    module, trace = regression(sgd), Trace()
    fit(module, trace, average, keep, enable_checkpointing=True)
    saved = dict(torch.load(keep.best_model_path, weights_only=True)["state_dict"])
    assert are_equal(saved, trace.trained) == (not ours)
    assert are_equal(saved, weights(module)) == ours


@both
def test_an_exception_in_validation(regression, fit, tmp_path, ours):
    """Theirs leaves the average in the module, and swaps the two when saving."""

    class Failing(regression):
        def validation_step(self, batch, batch_idx):
            if self.global_step == 4:
                raise RuntimeError("stop")
            return super().validation_step(batch, batch_idx)

    average = WeightAveraging(EMA(0.9)) if ours else EMAWeightAveraging(decay=0.9)
    module, trace = Failing(sgd), Trace()
    with pytest.raises(RuntimeError, match="stop"):
        fit(
            module,
            trace,
            average,
            OnExceptionCheckpoint(tmp_path, "stopped"),
            limit_val_batches=1.0,
            enable_checkpointing=True,
        )
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert are_equal(weights(module), trace.trained) == ours
    assert are_equal(checkpoint["current_model_state"], trace.trained) == ours
    assert are_equal(dict(checkpoint["state_dict"]), trace.trained) == (not ours)


class Normed(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


@both
def test_buffers_of_integers(regression, fit, ours):
    """Theirs averages and truncates them."""
    average = WeightAveraging(EMA(0.9), average_buffers=True) if ours else EMAWeightAveraging(decay=0.9)
    module = regression(sgd)
    module.net = Normed()
    fit(module, average)
    assert (module.net[1].num_batches_tracked == 12) == ours


@both
def test_pickling_for_spawned_processes(ours):
    average = WeightAveraging(EMA(0.9)) if ours else EMAWeightAveraging(decay=0.9)
    if ours:
        assert pickle.loads(pickle.dumps(average)).average == EMA(0.9)
    else:
        with pytest.raises(AttributeError, match="local object"):
            pickle.dumps(average)


@both
def test_two_with_different_decay(regression, fit, ours):
    if ours:
        averages = [WeightAveraging(EMA(0.9)), WeightAveraging(EMA(0.5), evaluate=False)]
        module = regression(sgd)
        fit(module, *averages)
        assert not are_equal(averages[1].averaged_parameters(module), weights(module))
    else:
        with pytest.raises(RuntimeError, match="state_key"):
            fit(regression(sgd), EMAWeightAveraging(decay=0.9), EMAWeightAveraging(decay=0.5))


@both
def test_the_users_schedule_and_the_number_of_batches(regression, fit, ours):
    """Their SWA replaces the schedule, and with BatchNorm trains another epoch (without backward, but counted)."""
    average = (
        WeightAveraging(SWA(0.5), update_bn=True) if ours else StochasticWeightAveraging(swa_lrs=0.2, swa_epoch_start=2)
    )
    module, trace = regression(scheduled), Trace()
    module.net = Normed()
    fit(module, average, trace, epochs=4, accumulate_grad_batches=1)
    assert (trace.batches == 16) == ours
    expected = [pytest.approx(0.1 * 0.9**step) for step in range(1, 17)]
    assert (trace.rates[:16] == expected) == ours


def test_batch_norm_and_a_loss_scaler(regression, fit):
    """Where theirs has failed with "No inf checks were recorded" (Lightning issue 17245); on CPU it does not."""
    module = regression(sgd)
    module.net = Normed()
    fit(module, WeightAveraging(SWA(0.5), update_bn=True), epochs=4, precision="16-mixed")
    assert module.net[1].num_batches_tracked == 4


@both
def test_a_step_that_the_loss_scaler_skips(regression, fit, ours):
    """Theirs counts the unchanged weights once more."""
    average = WeightAveraging(EMA(0.5)) if ours else EMAWeightAveraging(decay=0.5)
    module, trace = regression(sgd, poisoned=[(1, 0)]), EachStep()
    fit(module, average, trace, precision="16-mixed")
    expected = trace.weights[0]
    for step, now in enumerate(trace.weights[1:], start=2):
        if step != 3 or not ours:
            expected = {name: 0.5 * (value + now[name]) for name, value in expected.items()}
    assert are_equal(trace.weights[2], trace.weights[1])  # it was skipped
    assert are_equal(weights(module), expected, 1e-6)


class EachStep(Callback):
    """The trained weights after each optimizer step, of two batches."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2 == 1:
            self.weights.append(weights(pl_module))


@both
def test_the_weights_that_a_uniform_average_takes_in(regression, fit, ours):
    """Theirs averages at the start of an epoch, and so never the result of the last epoch."""
    average = WeightAveraging(SWA(2, every=2)) if ours else StochasticWeightAveraging(0.1, 2, annealing_epochs=1)
    module, trace = regression(sgd), EachStep()
    fit(module, average, trace)
    ends = trace.weights[1::2]  # of the three epochs
    taken = ends if ours else [ends[0], ends[1]]
    expected = {name: torch.stack([end[name] for end in taken]).mean(0) for name in taken[0]}
    assert are_equal(weights(module), expected, 1e-6)


@both
def test_two_optimizers(regression, fit, ours):
    class Manual(regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    module = Manual(lambda m: [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (m.net[0], m.net[2])])
    if ours:
        averaging = WeightAveraging(SWA(0.5))
        fit(module, averaging, accumulate_grad_batches=1)
        assert set(averaging.averaged_parameters(module)) == set(weights(module))
    else:
        with pytest.raises(MisconfigurationException, match="SWA currently works with 1 `optimizer`"):
            fit(module, StochasticWeightAveraging(0.1), accumulate_grad_batches=1)


class Operations(TorchDispatchMode):
    """Counts what runs on the numbers of tensors of more than one element."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, torch.Tensor)]
        self.count += func is not torch.ops.aten.detach.default and any(t.numel() > 1 for t in tensors)
        return func(*args, **(kwargs or {}))


@both
def test_operations_of_an_update(regression, fit, ours):
    """Theirs runs several ops per tensor, one tensor after another, without an option to change this."""
    counts = []

    class Count(Callback):
        def on_train_start(self, trainer, pl_module):
            if ours:
                name, self.owner = "update_average_", own_pass_user
            else:
                name, self.owner = "update_parameters", average._average_model
            self.original = getattr(self.owner, name)

            def counted(*args, **kwargs):
                with Operations() as operations:
                    self.original(*args, **kwargs)
                counts.append(operations.count)

            monkeypatch.setattr(self.owner, name, counted)

    from lightning_optkit.callbacks.seams import kept_average as own_pass_user

    average = WeightAveraging(EMA(0.9)) if ours else EMAWeightAveraging(decay=0.9)
    with pytest.MonkeyPatch.context() as monkeypatch:
        fit(regression(sgd), average, Count())
    num_tensors = 4
    assert counts[-1] == 1 if ours else counts[-1] >= 3 * num_tensors
    if not ours:
        with pytest.raises(AssertionError):
            fit(regression(sgd), EMAWeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9)))


@both
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_checkpoint_resumed_without_the_callback(regression, fit, tmp_path, ours):
    """The same in both, and Lightning warns: no code of the callback runs, and training goes on from the average."""
    average = WeightAveraging(EMA(0.5)) if ours else EMAWeightAveraging(decay=0.5)
    module, resumed = regression(sgd), regression(sgd)
    fit(module, average, epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert are_equal(weights(resumed), weights(module))
