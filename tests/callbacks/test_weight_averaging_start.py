# SPDX-License-Identifier: Apache-2.0
"""WeightAveraging: the start by epoch or fraction, warm-up, and the warning for an average that is too long."""

import warnings

import pytest
from average_cases import TOLERANCE, Trace, adamw, assert_equal, callbacks_of, folded_and_own, resuming, weights
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint

from lightning_optkit.averaging import EMA, LAWA, SWA, PowerEMA
from lightning_optkit.callbacks import Fuse, HyperparameterSchedule, WeightAveraging
from lightning_optkit.schedules import linear


def averaged(trained, average):
    """The average of the trained weights of some steps, by the decay of each update."""
    current = trained[0]
    for n, now in enumerate(trained[1:], start=1):
        decay = n / (n + 1) if isinstance(average, SWA) else average.decay_at(average.decay, n)
        current = {name: decay * value + (1 - decay) * now[name] for name, value in current.items()}
    return current


# The run has three epochs of two steps.
STARTS = [
    (EMA(0.5, start=2, start_interval="epoch"), 3),
    (EMA(0.5, start=1, start_interval="epoch", every=2), 1),
    (EMA(0.5, start=0.6), 4),
    (EMA(0.9, start=2, warmup="ratio"), 2),
    (EMA(0.9, warmup="power", start=0.5), 3),
    (PowerEMA(0.1), 1),
    (PowerEMA(0.2, start=2, start_interval="epoch"), 3),
    (SWA(3, start_interval="epoch"), 5),
]


@folded_and_own
@pytest.mark.parametrize(("average", "first"), STARTS, ids=[repr(average) for average, _ in STARTS])
def test_the_average_starts_where_it_says(regression, fit, average, first, path):
    trace, module = Trace(), regression(adamw)
    fit(module, *callbacks_of(path, average, trace))
    seen = [now for step, now in trace.trained.items() if step >= first][:: average.every]
    assert_equal(weights(module), averaged(seen, average), TOLERANCE)


@folded_and_own
@pytest.mark.parametrize(
    ("average", "first"),
    [(LAWA(9, start=2, start_interval="epoch"), 3), (LAWA(9, start=0.6), 4), (LAWA(2, start=0.3, every=2), 2)],
    ids=repr,
)
def test_snapshots_start_where_they_say(regression, fit, average, first, path):
    trace, module = Trace(), regression(adamw)
    fit(module, *callbacks_of(path, average, trace))
    seen = [now for step, now in trace.trained.items() if step >= first][:: average.every][-average.k :]
    mean = {name: sum(now[name] for now in seen) / len(seen) for name in seen[0]}
    assert_equal(weights(module), mean, TOLERANCE)


@folded_and_own
def test_an_epoch_is_counted_with_the_accumulation_of_each(regression, fit, path):
    trace, module = Trace(), regression(adamw)
    average = EMA(0.5, start=3, start_interval="epoch")
    scheduler = GradientAccumulationScheduler({0: 4, 1: 1})
    fit(module, *callbacks_of(path, average, scheduler, trace), accumulate_grad_batches=1)
    first = next(step for step in trace.trained if step > max(trace.trained) - 4)  # an epoch of 4 batches
    seen = [now for step, now in trace.trained.items() if step >= first]
    assert len(seen) == 4
    assert_equal(weights(module), averaged(seen, average), TOLERANCE)


@resuming
@folded_and_own
@pytest.mark.parametrize(
    "average", [EMA(0.5, start=2, start_interval="epoch", warmup="ratio"), PowerEMA(0.1), EMA(0.9, start=0.3)], ids=repr
)
def test_a_resumed_run_goes_on(regression, fit, average, path, tmp_path):
    whole, resumed = regression(adamw), regression(adamw)
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fit(whole, *callbacks_of(path, average), saver, enable_checkpointing=True)
    fit(resumed, *callbacks_of(path, average), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_equal(weights(resumed), weights(whole), TOLERANCE)


def test_two_power_averages_are_kept_at_once(regression, fit):
    short, long, trace = PowerEMA(0.05), PowerEMA(0.2), Trace()
    callbacks = WeightAveraging(short), WeightAveraging(long, evaluate=False)
    module = regression(adamw)
    fit(module, Fuse(verbose=False), *callbacks, trace)
    trained = [*trace.trained.values()]
    for callback, average in zip(callbacks, (short, long), strict=True):
        assert_equal(callback.averaged_parameters(module), averaged(trained, average), TOLERANCE)


# --- the warning ---

TOO_LONG = pytest.mark.parametrize(
    ("average", "fitting"),
    [
        (EMA(0.999), r"reaches back over 1,000 steps, but sees 6, so that 100% of it .*; EMA\(decay=0\.5, start=1"),
        (EMA(0.9, start=3), r"reaches back over 10 steps, but sees 4, so that 73% of it .*; EMA\(decay=0\.5, start=3"),
        (EMA(0.8, every=3), r"reaches back over 15 steps, but sees 6, so that 80% of it "),
    ],
    ids=repr,
)


@TOO_LONG
@folded_and_own
def test_an_average_longer_than_the_run_is_said_once_with_one_that_fits(regression, fit, average, fitting, path):
    with pytest.warns(UserWarning, match=r"^WeightAveraging\(EMA\(.*\)\): the average " + fitting) as caught:
        fit(regression(adamw), *callbacks_of(path, average))
    assert sum("reaches back" in str(warning.message) for warning in caught) == 1


@pytest.mark.parametrize(
    ("average", "others", "options"),
    [
        (EMA(0.8), (), {}),  # 5 steps of 6
        (EMA(0.999, warmup="power"), (), {}),
        (PowerEMA(0.05), (), {}),
        (SWA(1), (), {}),
        (EMA(0.999), (HyperparameterSchedule("average_decay", linear(0.5, 0.9)),), {}),
        (EMA(0.999), (), {"fast_dev_run": 2}),
        (EMA(0.999), (), {"epochs": 0}),
    ],
    ids=["fits", "warm-up", "power", "uniform", "scheduled", "trial", "none"],
)
def test_nothing_is_said_of_one_that_fits(regression, fit, average, others, options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(regression(adamw), WeightAveraging(average), *others, **options)
    assert not [warning for warning in caught if "reaches back" in str(warning.message)]
