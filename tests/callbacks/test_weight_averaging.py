# SPDX-License-Identifier: Apache-2.0
"""WeightAveraging in real Trainers, in the step and in a separate pass: where and when the average is used."""

import re

import pytest
import torch
from average_cases import TOLERANCE, Trace, adamw, assert_equal, averages, callbacks_of, folded_and_own, sgd, weights
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import Fuse, WeightAveraging
from lightning_optkit.optimizers import AdamW


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
@pytest.mark.parametrize("average", [EMA(0.9, start=7), SWA(7), LAWA(2, start=7)], ids=str)
def test_an_average_that_never_starts_leaves_the_trained_weights(regression, fit, path, average, tmp_path):
    trace, module = Trace(), regression(adamw)
    said = rf"^WeightAveraging\({re.escape(repr(average))}\): the run ended after 6 steps, before the first update"
    with pytest.warns(UserWarning, match=said):
        trainer = fit(module, *callbacks_of(path, average, trace), limit_val_batches=1.0)
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
    """Parameters of a layer have no gradients in epoch 0 and 2, so their average does not change there."""

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


# --- manual optimization ---


SECOND = {"one-pass": torch.optim.SGD, "of another kind": torch.optim.Rprop}  # Fuse leaves Rprop alone


@folded_and_own
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("order", [1, -1])
def test_two_optimizers_that_take_turns(regression, fit, path, second, order):
    class Manual(regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    def two(module):
        pair = [torch.optim.AdamW(module.net[0].parameters()), SECOND[second](module.net[2].parameters(), lr=0.01)]
        return pair[::order]

    module, trained = Manual(two), []

    class AfterBoth(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            trained.append(weights(pl_module))

    average = EMA(0.9, start=2, every=2)
    fit(module, *callbacks_of(path, average, AfterBoth()), accumulate_grad_batches=1)
    expected = averages(dict(enumerate(trained, start=1)), average)
    assert_equal(weights(module), expected[12], TOLERANCE)


# --- what is refused ---


def test_two_that_would_be_evaluated_are_refused_by_name(regression, fit):
    with pytest.raises(ValueError, match=r"^WeightAveraging\(evaluate=True\): EMA\(decay=0\.9.* and EMA\(decay=0\.99"):
        fit(regression(adamw), WeightAveraging(EMA(0.9)), WeightAveraging(EMA(0.99)))


@pytest.mark.parametrize(
    "other", [EMAWeightAveraging(decay=0.9), StochasticWeightAveraging(0.1)], ids=lambda c: type(c).__name__
)
def test_beside_lightnings_own_it_is_refused(regression, fit, other):
    message = (
        rf"^WeightAveraging\(EMA\(.*\)\): {type(other).__name__} would put an average into the module too; use one"
    )
    with pytest.raises(ValueError, match=message):
        fit(regression(adamw), WeightAveraging(EMA(0.9)), other)
