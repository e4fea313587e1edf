# SPDX-License-Identifier: Apache-2.0
"""Both penalties, computed by hand."""

import pytest
import torch

from lightning_optkit.regularization import activation_regularization, temporal_activation_regularization

H = torch.tensor([[[1.0, 2.0], [3.0, 2.0], [0.0, 2.0]]])  # 1 example, 3 steps, 2 units


def test_ar_is_the_mean_square():
    assert activation_regularization(H, 3.0).item() == pytest.approx(3 * (1 + 4 + 9 + 4 + 0 + 4) / 6)


def test_tar_is_the_mean_square_of_the_change():
    assert temporal_activation_regularization(H, 2.0).item() == pytest.approx(2 * (4 + 0 + 9 + 0) / 4)
    assert temporal_activation_regularization(H.transpose(0, 1), 2.0, time_dim=0).item() == pytest.approx(6.5)
    assert temporal_activation_regularization(H, 2.0, time_dim=-2).item() == pytest.approx(6.5)


def test_a_single_step_does_not_change():
    h = torch.ones(2, 1, 3, requires_grad=True)
    temporal_activation_regularization(h).backward()
    assert h.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: activation_regularization(H, -1.0), r"^activation_regularization\(alpha=-1\.0\): alpha must be in"),
        (
            lambda: temporal_activation_regularization(H, -1.0),
            r"^temporal_.*\(beta=-1\.0\): beta must be in \[0, inf\)",
        ),
        (
            lambda: temporal_activation_regularization(H, 1.0, 3),
            r"^temporal_.*\(time_dim=3\): the activations have 3 dim",
        ),
    ],
)
def test_bad_input_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()
