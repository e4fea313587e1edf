# SPDX-License-Identifier: Apache-2.0
"""WeightAveraging in real Trainers, folded into the step and in its own pass: who sees the average, and when."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import Fuse, WeightAveraging
from lightning_optkit.optimizers import AdamW

PATHS = ["folded", "own pass"]
TOLERANCE = 1e-6  # six steps on numbers of size 1 in fp32

folded_and_own = pytest.mark.parametrize("path", PATHS)


def callbacks_of(path, average, *more):
    return [*([Fuse()] if path == "folded" else []), WeightAveraging(average), *more]


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_equal(actual, expected, tolerance=0.0):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class Trace(Callback):
    """The trained weights after every optimizer step, and what every validation step sees, by step."""

    def __init__(self):
        self.trained, self.validated, self.last_step = {}, {}, 0

    def on_train_start(self, trainer, pl_module):
        self.last_step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            self.trained[self.last_step] = weights(pl_module)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validated.setdefault(trainer.global_step, []).append(weights(pl_module))


def averages(trained, average):
    """The average after each step from the first that is averaged, from the trained weights."""
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


# --- who sees what ---


@folded_and_own
@pytest.mark.parametrize("configure", [adamw, sgd])
@pytest.mark.parametrize("average", [EMA(0.9), EMA(0.5, start=3), EMA(0.5, start=2, every=3)], ids=str)
def test_validation_sees_the_average_from_its_first_update_on_and_never_before(
    regression, fit, path, configure, average
):
    trace = Trace()
    fit(regression(configure), *callbacks_of(path, average, trace), limit_val_batches=1.0)
    expected = averages(trace.trained, average)
    assert list(trace.validated) == [0, 2, 4, 6]  # 0: the sanity check
    for step, seen in trace.validated.items():
        for shown in seen:
            if step in expected:
                assert_equal(shown, expected[step], TOLERANCE)
            elif step:
                assert_equal(shown, trace.trained[step])


@folded_and_own
@pytest.mark.parametrize("val_check_interval", [1, 3])
def test_validation_in_the_middle_of_an_epoch_and_of_an_accumulation(regression, fit, path, val_check_interval):
    trace, average = Trace(), EMA(0.9)
    module, plain = regression(adamw), regression(adamw)
    arguments = dict(val_check_interval=val_check_interval, limit_val_batches=1.0)
    fit(module, *callbacks_of(path, average, trace), **arguments)
    expected = averages(trace.trained, average)
    for step, seen in trace.validated.items():
        if step:
            assert_equal(seen[-1], expected[step], TOLERANCE)
    plain_trace = Trace()
    fit(plain, *([Fuse()] if path == "folded" else []), plain_trace, **arguments)
    assert_equal(trace.trained, plain_trace.trained)


@folded_and_own
def test_training_continues_from_the_trained_weights(regression, fit, path):
    traces = Trace(), Trace()
    fit(regression(adamw), *callbacks_of(path, EMA(0.9), traces[0]), limit_val_batches=1.0)
    fit(regression(adamw), *callbacks_of(path, EMA(0.9), traces[1])[path == "own pass" :][-1:], limit_val_batches=1.0)
    assert traces[0].trained.keys() == traces[1].trained.keys()
    assert_equal(traces[0].trained, traces[1].trained, TOLERANCE)


@folded_and_own
def test_after_the_fit_the_module_holds_the_average(regression, fit, path):
    trace, module = Trace(), regression(adamw)
    fit(module, *callbacks_of(path, EMA(0.9), trace))
    assert_equal(weights(module), averages(trace.trained, EMA(0.9))[6], TOLERANCE)


@folded_and_own
def test_an_average_that_never_starts_leaves_the_trained_weights(regression, fit, path, tmp_path):
    trace, module = Trace(), regression(adamw)
    with pytest.warns(
        UserWarning, match=r"^WeightAveraging\(EMA\(decay=0\.9, start=7, .*\)\): the run ended after 6 steps"
    ):
        trainer = fit(module, *callbacks_of(path, EMA(0.9, start=7), trace), limit_val_batches=1.0)
    assert_equal(weights(module), trace.trained[6])
    assert_equal(trace.validated[6][-1], trace.trained[6])
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert_equal(dict(checkpoint["state_dict"]), trace.trained[6])


@folded_and_own
@pytest.mark.parametrize(
    "order", [["validate", "test", "predict"], ["test", "validate", "predict", "validate"]], ids=str
)
def test_everything_after_the_fit_uses_the_average(regression, fit, data, path, order):
    trace, module = Trace(), regression(adamw)
    trainer = fit(module, *callbacks_of(path, EMA(0.9), trace), limit_val_batches=1.0)
    average = averages(trace.trained, EMA(0.9))[6]
    trace.validated.clear()
    for name in order:
        if name == "validate":
            trainer.validate(module, data(), verbose=False)
            assert_equal(trace.validated[6][-1], average, TOLERANCE)
        elif name == "test":
            trainer.test(module, data(), verbose=False)
        else:
            predicted = torch.cat(trainer.predict(module, data()))
            expected = torch.cat([torch.func.functional_call(module, average, (b,), {}) for b in inputs(data)])
            assert_equal(predicted, expected, TOLERANCE)
        assert_equal(weights(module), average, TOLERANCE)


def inputs(data):
    return [batch[0] for batch in data()]


@folded_and_own
def test_both_ways_give_the_same_numbers(regression, fit, path):
    """Parameters of a layer have no gradients in epoch 0 and 2: the average of what stands still stands still."""

    class Skipping(regression):
        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch == 1)

    trace, module = Trace(), Skipping(adamw)
    fit(module, *callbacks_of(path, EMA(0.5), trace))
    own = Skipping(adamw)
    fit(own, WeightAveraging(EMA(0.5)))
    assert_equal(weights(module), weights(own), TOLERANCE)


@folded_and_own
def test_frozen_parameters_stay_as_they_are(regression, fit, path):
    module = regression(adamw)
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.clone()
    fit(module, *callbacks_of(path, EMA(0.9)), limit_val_batches=1.0)
    assert_equal(module.net[0].weight, before)


def test_an_optimizer_of_this_package_needs_no_fuse(regression, fit):
    module, expected = regression(lambda m: AdamW(m.parameters(), lr=0.05)), regression(adamw)
    fit(module, WeightAveraging(EMA(0.9)))
    fit(expected, WeightAveraging(EMA(0.9)))
    assert_equal(weights(module), weights(expected), TOLERANCE)


def test_any_other_optimizer_is_averaged_too(regression, fit):
    trace, module = Trace(), regression(lambda m: torch.optim.NAdam(m.parameters(), lr=0.05))
    fit(module, Fuse(), WeightAveraging(EMA(0.9)), trace)
    assert_equal(weights(module), averages(trace.trained, EMA(0.9))[6], TOLERANCE)


@pytest.mark.parametrize("averaging_first", [True, False])
def test_the_order_of_the_callbacks_does_not_matter(regression, fit, averaging_first):
    module, expected = regression(adamw), regression(adamw)
    callbacks = [WeightAveraging(EMA(0.9)), Fuse()]
    trainer = fit(module, *(callbacks if averaging_first else callbacks[::-1]), limit_val_batches=1.0)
    fit(expected, WeightAveraging(EMA(0.9)), limit_val_batches=1.0)
    assert_equal(weights(module), weights(expected), TOLERANCE)
    assert type(trainer.optimizers[0]) is torch.optim.AdamW


# --- 16 bits ---


@folded_and_own
def test_a_step_that_the_loss_scaler_skips_is_not_averaged(regression, fit, path):
    """EMA(0.5, every=2) with the third step skipped: counting it would average other steps."""
    average, poisoned = EMA(0.5, every=2), [(1, 0)]
    trace, module = Trace(), regression(adamw, poisoned)
    fit(module, *callbacks_of(path, average, trace), precision="16-mixed")
    done = [w for step, w in trace.trained.items() if step != 3]
    expected = averages(dict(enumerate(done, start=1)), average)
    assert_equal(weights(module), expected[5], TOLERANCE)


def test_a_step_that_a_fused_optimizer_of_torch_skips_is_not_averaged(regression, fit):
    average, trace = EMA(0.5, every=2), Trace()
    module = regression(lambda m: torch.optim.AdamW(m.parameters(), lr=0.05, fused=True), [(1, 0)])
    fit(module, WeightAveraging(average), trace, precision="16-mixed")
    done = [w for step, w in trace.trained.items() if step != 3]
    assert_equal(weights(module), averages(dict(enumerate(done, start=1)), average)[5], TOLERANCE)


@folded_and_own
def test_averages_of_bf16_parameters_are_fp32(regression, fit, path):
    average, trace, module = EMA(0.9), Trace(), regression(sgd)
    trainer = fit(module, *callbacks_of(path, average, trace), precision="bf16-true")
    exact = averages({step: {n: w.float() for n, w in now.items()} for step, now in trace.trained.items()}, average)[6]
    for name, param in module.named_parameters():
        kept = trainer.optimizers[0].state[param]["ema"]
        assert kept.dtype == torch.float32
        assert_equal(kept, exact[name], TOLERANCE)
        assert_equal(param.detach(), exact[name].bfloat16())


# --- checkpoints ---


def saved(fit, module, tmp_path, folder, *callbacks, epochs=4, **kwargs):
    """A run that keeps the checkpoint of every epoch."""
    keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
    trainer = fit(module, *callbacks, keep, epochs=epochs, enable_checkpointing=True, **kwargs)
    return trainer, tmp_path / folder / "epoch=1.ckpt"


resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*ModelCheckpoint")


@folded_and_own
@pytest.mark.parametrize("limit_val_batches", [0, 1.0])
def test_a_checkpoint_holds_the_average_and_beside_it_the_trained_weights(
    regression, fit, tmp_path, path, limit_val_batches
):
    trace, module = Trace(), regression(adamw)
    callbacks = callbacks_of(path, EMA(0.9), trace)
    trainer, file = saved(fit, module, tmp_path, "run", *callbacks, limit_val_batches=limit_val_batches)
    checkpoint = torch.load(file, weights_only=True)
    expected = averages(trace.trained, EMA(0.9))
    assert_equal(dict(checkpoint["state_dict"]), expected[4], TOLERANCE)
    assert_equal(dict(checkpoint["current_model_state"]), trace.trained[4])

    trainer.save_checkpoint(tmp_path / "end.ckpt")  # after the fit, when the module holds the average
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    assert_equal(dict(checkpoint["state_dict"]), expected[8], TOLERANCE)
    assert_equal(dict(checkpoint["current_model_state"]), trace.trained[8])


@resuming
@folded_and_own
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-true"])
@pytest.mark.parametrize("configure", [adamw, sgd])
def test_resumed_equals_uninterrupted_bit_for_bit(regression, fit, tmp_path, path, configure, precision):
    average = EMA(0.9, start=2, every=3)
    whole, trace = regression(configure), Trace()
    arguments = dict(precision=precision, limit_val_batches=1.0)
    _, half = saved(fit, whole, tmp_path, "run", *callbacks_of(path, average, trace), **arguments)
    resumed, second = regression(configure), Trace()
    fit(resumed, *callbacks_of(path, average, second), epochs=4, ckpt_path=half, **arguments)
    assert list(second.trained) == [5, 6, 7, 8]
    for step in second.trained:
        assert_equal(second.trained[step], trace.trained[step])
    for step in (6, 8):
        assert_equal(second.validated[step], trace.validated[step])
    assert_equal(weights(resumed), weights(whole))


@folded_and_own
def test_resumed_from_a_checkpoint_saved_after_the_fit(regression, fit, tmp_path, path):
    average = EMA(0.9, every=3)
    whole, half, resumed = (regression(adamw) for _ in range(3))
    fit(whole, *callbacks_of(path, average), epochs=4)
    fit(half, *callbacks_of(path, average), epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, *callbacks_of(path, average), epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(weights(resumed), weights(whole))


@resuming
@pytest.mark.parametrize("paths", [PATHS, PATHS[::-1]], ids=str)
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("configure", [adamw, sgd])
def test_a_checkpoint_continues_the_other_way(regression, fit, tmp_path, configure, every, paths):
    """Folded first and then in its own pass, and the reverse; steps are counted on, not from 1."""
    average = EMA(0.9, every=every)
    whole, resumed = regression(configure), regression(configure)
    _, half = saved(fit, whole, tmp_path, "run", *callbacks_of(paths[0], average))
    fit(resumed, *callbacks_of(paths[1], average), epochs=4, ckpt_path=half)
    assert_equal(weights(resumed), weights(whole), TOLERANCE)


@folded_and_own
def test_the_file_of_the_best_epoch_holds_the_weights_that_were_measured(regression, fit, data, tmp_path, path):
    keep = ModelCheckpoint(tmp_path / "best", save_top_k=1, monitor="val_loss")
    trace, module = Trace(), regression(adamw)
    arguments = dict(limit_val_batches=1.0, enable_checkpointing=True)
    trainer = fit(module, *callbacks_of(path, EMA(0.9), trace, keep), **arguments)
    checkpoint = torch.load(keep.best_model_path, weights_only=True)
    expected = averages(trace.trained, EMA(0.9))
    assert_equal(dict(checkpoint["state_dict"]), expected[checkpoint["global_step"]], TOLERANCE)
    (measured,) = trainer.validate(module, data(), ckpt_path="best", verbose=False)
    assert measured["val_loss"] == pytest.approx(float(keep.best_model_score), abs=TOLERANCE)
    assert_equal(weights(module), dict(checkpoint["state_dict"]))


@folded_and_own
def test_tied_parameters_are_saved_under_both_names(regression, fit, tmp_path, path):
    class Tied(regression):
        def __init__(self):
            super().__init__(adamw)
            self.again = self.net[0]

    module = Tied()
    _, file = saved(fit, module, tmp_path, "run", *callbacks_of(path, EMA(0.9)))
    for weights_of in ("state_dict", "current_model_state"):
        checkpoint = torch.load(file, weights_only=True)[weights_of]
        assert_equal(checkpoint["again.weight"], checkpoint["net.0.weight"])


@folded_and_own
def test_buffers_are_the_models_own(regression, fit, tmp_path, path):
    class Counting(regression):
        def __init__(self):
            super().__init__(adamw)
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def training_step(self, batch, batch_idx):
            self.count += 1
            return super().training_step(batch, batch_idx)

    module = Counting()
    _, file = saved(fit, module, tmp_path, "run", *callbacks_of(path, EMA(0.9)), limit_val_batches=1.0)
    checkpoint = torch.load(file, weights_only=True)
    assert module.count == 16
    assert checkpoint["state_dict"]["count"] == checkpoint["current_model_state"]["count"] == 8


@resuming
@folded_and_own
def test_a_module_that_saves_only_some_weights_resumes(regression, fit, tmp_path, path):
    """As an adapter beside a frozen backbone does: `strict_loading = False` and a smaller state dict."""

    class Adapter(regression):
        def __init__(self):
            super().__init__(adamw)
            self.strict_loading = False
            self.net[0].requires_grad_(False)

        def state_dict(self, *args, **kwargs):
            return {name: p for name, p in super().state_dict(*args, **kwargs).items() if "net.0" not in name}

    whole, resumed = Adapter(), Adapter()
    _, half = saved(fit, whole, tmp_path, "run", *callbacks_of(path, EMA(0.9)))
    fit(resumed, *callbacks_of(path, EMA(0.9)), epochs=4, ckpt_path=half)
    assert_equal(weights(resumed), weights(whole))


@resuming
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*WeightAveraging")
def test_without_the_callback_a_checkpoint_starts_from_the_average(regression, fit, tmp_path):
    trace, module = Trace(), regression(adamw)
    _, half = saved(fit, module, tmp_path, "run", Fuse(), WeightAveraging(EMA(0.9)), trace)
    first = regression(adamw)
    fit(first, epochs=2, ckpt_path=half)
    assert_equal(weights(first), averages(trace.trained, EMA(0.9))[4], TOLERANCE)


# --- when something goes wrong ---


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
    """One callback, two modules: nothing of the first run reaches the second."""
    averaging = WeightAveraging(EMA(0.9, every=3))
    fuse = [Fuse()] if path == "folded" else []
    fit(regression(sgd), *fuse, averaging)
    second, expected = regression(adamw), regression(adamw)
    trace = Trace()
    fit(second, *fuse, averaging, trace, limit_val_batches=1.0)
    fit(expected, *callbacks_of(path, averaging.average), limit_val_batches=1.0)
    assert_equal(weights(second), weights(expected))
    assert_equal(trace.validated[2][-1], averages(trace.trained, averaging.average)[2], TOLERANCE)


def hooks_of(optimizer):
    return [hook for name, hooks in vars(optimizer).items() if name.endswith("_hooks") for hook in hooks]


def test_no_hook_is_left_on_the_optimizer(regression, fit):
    module = regression(adamw)
    assert not hooks_of(fit(module, WeightAveraging(EMA(0.9))).optimizers[0])
    module = failing(regression, "training_step", step=2)(adamw)
    with pytest.raises(Stop):
        fit(module, WeightAveraging(EMA(0.9)))
    assert not hooks_of(module.trainer.optimizers[0])


def test_two_that_would_be_evaluated_are_refused_by_name(regression, fit):
    with pytest.raises(ValueError, match=r"^WeightAveraging\(evaluate=True\): EMA\(decay=0\.9.* and EMA\(decay=0\.99"):
        fit(regression(adamw), WeightAveraging(EMA(0.9)), WeightAveraging(EMA(0.99)))


# --- manual optimization ---


@folded_and_own
def test_two_optimizers_that_take_turns(regression, fit, path):
    class Manual(regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    def two(module):
        return [torch.optim.AdamW(module.net[0].parameters()), torch.optim.SGD(module.net[2].parameters(), lr=0.1)]

    module, expected, trained = Manual(two), {}, []

    class AfterBoth(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trained.append(weights(pl_module))

    average = EMA(0.9, start=2, every=2)
    fit(module, *callbacks_of(path, average, AfterBoth()), accumulate_grad_batches=1)
    expected = averages(dict(enumerate(trained, start=1)), average)
    assert_equal(weights(module), expected[12], TOLERANCE)
