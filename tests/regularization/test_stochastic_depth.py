# SPDX-License-Identifier: Apache-2.0
"""The decay rule, and that dropping keeps the mean."""

import pytest
import torch

from lightning_optkit.layers import DropPath
from lightning_optkit.regularization import linear_drop_rates, stochastic_depth


def test_the_rate_grows_linearly_to_the_last_block():
    assert linear_drop_rates(5, 0.5) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert linear_drop_rates(1, 0.3) == [0.3]


@pytest.mark.parametrize("batch_dim", [0, 1, -1])
def test_whole_examples_are_dropped_and_the_mean_is_kept(batch_dim):
    torch.manual_seed(0)
    branch = torch.rand(4, 4000, 3).movedim(1, batch_dim) + 1
    dropped = stochastic_depth(branch, 0.4, batch_dim)
    factors = (dropped / branch).movedim(batch_dim, 0).flatten(1)
    assert torch.equal(factors.amin(1) == 0, factors.amax(1) == 0)
    kept = factors.amax(1) > 0
    assert kept.float().mean() == pytest.approx(0.6, abs=0.03)
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / 0.6))


def test_it_keeps_the_dtype():
    assert stochastic_depth(torch.ones(4, 2, dtype=torch.bfloat16), 0.5).dtype == torch.bfloat16


def test_bf16_rounds_once():
    torch.manual_seed(0)
    branch = torch.randn(64, 8, dtype=torch.bfloat16)
    dropped = stochastic_depth(branch, 0.3)
    kept = dropped[:, 0] != 0
    assert torch.equal(dropped[kept], (branch[kept].double() / 0.7).bfloat16())


def test_a_dropped_infinity_is_zero():
    torch.manual_seed(0)
    assert set(stochastic_depth(torch.full((100, 2), float("inf")), 0.5).unique().tolist()) == {0.0, float("inf")}


def test_it_is_drop_path_in_training():
    branch = torch.randn(32, 4)
    torch.manual_seed(0)
    expected = DropPath(0.3)(branch)
    torch.manual_seed(0)
    assert torch.equal(stochastic_depth(branch, 0.3), expected)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: linear_drop_rates(0), r"^linear_drop_rates\(num_blocks=0\): num_blocks must be an integer >= 1\.$"),
        (lambda: linear_drop_rates(2, 1.0), r"^linear_drop_rates\(p=1\.0\): p must be in \[0, 1\)\.$"),
        (lambda: stochastic_depth(torch.ones(2), 1.0), r"^stochastic_depth\(p=1\.0\): p must be in \[0, 1\)\.$"),
        (lambda: stochastic_depth(torch.ones(2), 0.5, 1), r"^stochastic_depth\(batch_dim=1\): the branch has 1 dim"),
    ],
)
def test_bad_input_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function()
