# SPDX-License-Identifier: Apache-2.0
"""Converts a torch optimizer to one-pass and back during training, which continues as if nothing had been done."""

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers.convert import from_torch_, to_torch_
from tests.optimizers.convert_cases import NUM_STEPS, RULES, SCHEDULERS, built, train, without_params

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,  # NUM_STEPS on numbers of size 1, each rounded by 6e-8, through a division by a small root
}


# --- training continues ---


DTYPES_AND_PLACES = [
    (torch.float32, 4, 8),
    *((torch.float64, there, back) for there, back in [(0, 0), (0, NUM_STEPS), (4, 8), (1, 2)]),
]


@pytest.mark.parametrize("dtype, there, back", DTYPES_AND_PLACES)
@pytest.mark.parametrize("scheduled", SCHEDULERS)
@pytest.mark.parametrize("rule", RULES)
def test_training_continues_under_every_scheduler(rule, scheduled, dtype, there, back):
    """Converted before step `there` and back before step `back`: every warning of torch would be an error here."""
    runs = []
    for is_converted in (False, True):
        optimizer, params = built(rule, dtype)
        scheduler = SCHEDULERS[scheduled](optimizer)
        train(optimizer, params, range(there), scheduler)
        if is_converted:
            from_torch_(optimizer)
            assert type(optimizer) is RULES[rule][0]
        train(optimizer, params, range(there, back), scheduler)
        if is_converted:
            to_torch_(optimizer)
            assert type(optimizer) is RULES[rule][1]
        train(optimizer, params, range(back, NUM_STEPS), scheduler)
        runs.append((params, without_params(optimizer.param_groups), scheduler.get_last_lr()))
    (expected, expected_groups, expected_lr), (params, groups, last_lr) = runs
    torch.testing.assert_close(params, expected, rtol=0, atol=TOLERANCE[dtype])
    assert (groups, last_lr) == (expected_groups, expected_lr)


@pytest.mark.parametrize("rule", RULES)
def test_converting_between_the_step_and_the_schedulers_step_is_no_reason_to_warn(rule):
    optimizer, params = built(rule)
    scheduler = SCHEDULERS["StepLR"](optimizer)
    train(optimizer, params, [0])
    from_torch_(optimizer)
    scheduler.step()
    train(optimizer, params, [1])
    to_torch_(optimizer)
    scheduler.step()


@pytest.mark.parametrize("convert", [lambda o: from_torch_(o), lambda o: (from_torch_(o), to_torch_(o))])
def test_a_scheduler_that_is_stepped_first_still_warns(convert):
    optimizer, _ = built("adamw")
    scheduler = SCHEDULERS["StepLR"](optimizer)
    convert(optimizer)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_tensor_lr_stays_the_same_tensor():
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizer, params = built("adamw", lr=lr)
    expected, expected_params = built("adamw", lr=lr.clone())
    for o, p in ((optimizer, params), (expected, expected_params)):
        scheduler = SCHEDULERS["ExponentialLR"](o)
        if o is optimizer:
            from_torch_(o)
        train(o, p, range(5), scheduler)
    assert optimizer.param_groups[0]["lr"] is lr
    torch.testing.assert_close(params, expected_params, rtol=0, atol=1e-12)


@pytest.mark.parametrize("momenta", [(0.0, 0.9), (0.9, 0.0, 0.9)], ids=str)
def test_a_momentum_that_passes_through_zero(momenta):
    """torch creates a buffer at the first step with momentum, and does not change it while momentum is 0."""
    optimizers, parameter_lists = zip(*(built("sgd", nesterov=False) for _ in range(2)), strict=True)
    from_torch_(optimizers[1])
    for optimizer, params in zip(optimizers, parameter_lists, strict=True):
        for place, momentum in enumerate(momenta):
            optimizer.param_groups[0]["momentum"] = momentum
            train(optimizer, params, range(3 * place, 3 * place + 3))
    torch.testing.assert_close(parameter_lists[1], parameter_lists[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_16_bit_parameters_train_on_after_the_way_back(rule, dtype):
    optimizer, params = built(rule, dtype)
    from_torch_(optimizer)
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    train(optimizer, params, range(3, 6))
    assert all(p.isfinite().all() for p in params)


def test_parameters_with_moments_in_bf16_train_on_after_the_way_back():
    optimizer, params = built("adamw", torch.float32)
    from_torch_(optimizer, state_dtype=torch.bfloat16)
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    train(optimizer, params, range(3, 6))
    assert all(p.isfinite().all() for p in params)


# --- a second conversion starts anew ---


def test_nothing_of_a_conversion_is_left_after_the_way_back():
    optimizer, params = built("adamw")
    before = set(vars(optimizer))
    from_torch_(optimizer, statistics=True)
    optimizer.clip = ClipNorm(1e-3)
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    assert set(vars(optimizer)) - before <= {"_step_supports_amp_scaling"}  # torch sets it for some arguments
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_a_second_conversion_keeps_no_clip_average_dtype_or_counts_of_the_first():
    optimizer, params = built("adamw", torch.float32)
    from_torch_(optimizer, statistics=True, state_dtype=torch.bfloat16)
    optimizer.clip = ClipNorm(1e-3)
    optimizer.keep_average(EMA(0.9))
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    from_torch_(optimizer)
    assert optimizer.clip is None
    assert optimizer.average is None
    assert optimizer.num_steps == optimizer.num_clipped == 0
    assert not optimizer.record_statistics
    assert optimizer.state_dtype == torch.float32


@pytest.mark.parametrize("rule", RULES)
def test_training_continues_through_two_conversions(rule):
    optimizer, params = built(rule)
    expected, expected_params = built(rule)
    from_torch_(optimizer)
    train(optimizer, params, range(3))
    to_torch_(optimizer)
    train(optimizer, params, range(3, 6))
    from_torch_(optimizer)
    assert (
        optimizer._engine.plan is None
    )  # a plan of before holds addresses of state that is gone: not to be stepped with
    train(optimizer, params, range(6, 9))
    train(expected, expected_params, range(9))
    torch.testing.assert_close(params, expected_params, rtol=0, atol=1e-12)
