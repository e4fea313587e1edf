# SPDX-License-Identifier: Apache-2.0
"""WSAM in real Trainers against an explicit loop."""

import pytest
import torch
from two_gradient_cases import assert_close, trained, written_out

from lightning_optkit.callbacks import SAM, WSAM


def combined(g, g_p, batch, gamma=0.8):
    return (1 - 2 * gamma) / (1 - gamma) * g + gamma / (1 - gamma) * g_p


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 5e-4)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_it_equals_the_loop_that_is_written_out_over_200_batches(make_trainer, accumulate, dtype, tolerance):
    found = trained(make_trainer, WSAM(rho=0.1, gamma=0.8), accumulate=accumulate, dtype=dtype)
    assert_close(found, written_out(combined, 0.1, accumulate=accumulate, dtype=dtype), tolerance)


def test_half_is_sam_and_zero_is_the_loss_alone(make_trainer):
    found = trained(make_trainer, WSAM(rho=0.2, gamma=0.5), steps=20)
    assert_close(found, trained(make_trainer, SAM(rho=0.2), steps=20), 1e-6)
    plain = trained(make_trainer, WSAM(rho=0.2, gamma=0.0), steps=20)
    assert_close(plain, written_out(lambda g, g_p, batch: g, 0.2, steps=20), 1e-5)


@pytest.mark.parametrize("gamma", [-0.1, 1.0])
def test_bad_arguments_are_refused(gamma):
    with pytest.raises(ValueError, match=r"^WSAM\(gamma=.*\): gamma must be in \[0, 1\)\.$"):
        WSAM(gamma=gamma)
