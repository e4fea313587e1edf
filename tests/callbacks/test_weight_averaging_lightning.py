# SPDX-License-Identifier: Apache-2.0
"""Where Lightning's own averaging callbacks go wrong (2.6.6), and what ours do in the same place.

Not shown here, since they take two processes: theirs cannot deepcopy modules sharded by FSDP2; ours live on the shard
(test_weight_averaging_sharded.py).
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
from torch import nn

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
    """Theirs validates the initial weights, and leaves them in the module: the training is lost."""
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
    """Theirs leaves the average in the module, and saves the two the wrong way round."""

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
    """Where theirs has failed with "No inf checks were recorded" (Lightning issue 17245)."""
    module = regression(sgd)
    module.net = Normed()
    fit(module, WeightAveraging(SWA(0.5), update_bn=True), epochs=4, precision="16-mixed")
    assert module.net[1].num_batches_tracked == 4
