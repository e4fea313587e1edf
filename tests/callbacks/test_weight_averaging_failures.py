# SPDX-License-Identifier: Apache-2.0
"""WeightAveraging after failures, and in a second fit: trained weights, a correct checkpoint, no leftovers."""

import pytest
import torch
from average_cases import (
    TOLERANCE,
    Trace,
    adamw,
    assert_equal,
    averages,
    callbacks_of,
    folded_and_own,
    hooks_of,
    sgd,
    weights,
)
from lightning.pytorch.callbacks import OnExceptionCheckpoint

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, WeightAveraging

# With an OnExceptionCheckpoint Lightning looks for a last checkpoint, and says that there is none.
stoppable = pytest.mark.filterwarnings(
    "ignore:`.fit.ckpt_path=None.` was called without a model", 'ignore:.fit.ckpt_path="last". is set'
)


class Stop(Exception):
    pass


def failing(regression, hook, step):
    class Failing(regression):
        """Raises in its own `hook`, once `step` steps are done."""

    def fail(self, *args, **kwargs):
        if self.global_step >= step:
            raise Stop
        return getattr(super(Failing, self), hook)(*args, **kwargs)

    setattr(Failing, hook, fail)
    return Failing


@stoppable
@folded_and_own
@pytest.mark.parametrize("hook", ["validation_step", "on_validation_epoch_end", "training_step"])
def test_an_exception_leaves_the_trained_weights_and_a_right_checkpoint(regression, fit, tmp_path, path, hook):
    trace, module = Trace(), failing(regression, hook, step=4)(adamw)
    callbacks = callbacks_of(path, EMA(0.9), trace, OnExceptionCheckpoint(tmp_path, "stopped"))
    with pytest.raises(Stop):
        fit(module, *callbacks, limit_val_batches=1.0, enable_checkpointing=True)
    assert max(trace.trained) == 4
    assert_equal(weights(module), trace.trained[4])
    checkpoint = torch.load(tmp_path / "stopped.ckpt", weights_only=True)
    assert_equal(dict(checkpoint["state_dict"]), averages(trace.trained, EMA(0.9))[4], TOLERANCE)
    assert_equal(dict(checkpoint["current_model_state"]), trace.trained[4])


@stoppable
@folded_and_own
def test_a_run_resumes_from_the_checkpoint_of_an_exception(regression, fit, tmp_path, path):
    average = EMA(0.9, every=3)
    whole, resumed = regression(adamw), regression(adamw)
    fit(whole, *callbacks_of(path, average), epochs=4)
    stopped = failing(regression, "on_train_batch_start", step=4)(adamw)
    callbacks = callbacks_of(path, average, OnExceptionCheckpoint(tmp_path, "stopped"))
    with pytest.raises(Stop):
        fit(stopped, *callbacks, epochs=4, enable_checkpointing=True)
    fit(resumed, *callbacks_of(path, average), epochs=4, ckpt_path=tmp_path / "stopped.ckpt")
    assert_equal(weights(resumed), weights(whole), TOLERANCE)


@folded_and_own
def test_a_second_fit_starts_its_average_anew(regression, fit, path):
    """One callback, two modules: nothing of the first run affects the second."""
    averaging = WeightAveraging(EMA(0.9, every=3))
    fuse = [Fuse()] if path == "folded" else []
    fit(regression(sgd), *fuse, averaging)
    second, expected = regression(adamw), regression(adamw)
    trace = Trace()
    fit(second, *fuse, averaging, trace, limit_val_batches=1.0)
    fit(expected, *callbacks_of(path, averaging.average), limit_val_batches=1.0)
    assert_equal(weights(second), weights(expected))
    assert_equal(trace.validated[2][-1], averages(trace.trained, averaging.average)[2], TOLERANCE)


def test_no_hook_is_left_on_the_optimizer(regression, fit):
    module = regression(adamw)
    assert not hooks_of(fit(module, WeightAveraging(EMA(0.9))).optimizers[0])
    module = failing(regression, "training_step", step=2)(adamw)
    with pytest.raises(Stop):
        fit(module, WeightAveraging(EMA(0.9)))
    assert not hooks_of(module.trainer.optimizers[0])
