# SPDX-License-Identifier: Apache-2.0
"""Prechelt's criteria by hand."""

import pytest

from lightning_optkit.regularization import generalization_loss, progress, progress_quotient, successive_increases


def test_generalization_loss_is_percent_above_the_minimum_so_far():
    errors = [2.0, 1.0, 1.5, 0.5, 0.6]
    found = [generalization_loss(errors[: t + 1]) for t in range(5)]
    assert found == pytest.approx([0.0, 0.0, 50.0, 0.0, 20.0])


def test_progress_is_per_mille_of_the_mean_over_the_minimum_of_the_last_strip():
    assert progress([100.0, 4.0, 2.0, 3.0], strip=3) == pytest.approx(1000 * (3 / 2 - 1))
    assert progress([1.0, 1.0], strip=2) == 0.0


def test_the_quotient_is_high_where_training_stands_still():
    assert progress_quotient([1.0, 1.2], [2.0, 1.0], strip=2) == pytest.approx(20 / 500)
    assert progress_quotient([1.0, 1.2], [1.0, 1.0], strip=2) == float("inf")
    assert progress_quotient([1.2, 1.0], [1.0, 1.0], strip=2) == 0.0


@pytest.mark.parametrize(
    ("errors", "strip", "count"),
    [
        ([1, 2, 3, 4], 1, 3),
        ([1, 2, 2, 3], 1, 1),
        ([3, 2, 1], 1, 0),
        ([9, 1, 9, 2, 9, 3], 2, 2),
        ([9, 1, 9, 2, 9, 3, 9], 2, 2),  # an incomplete strip is not looked at
        ([9, 1, 9, 2, 9, 1, 9, 4], 2, 1),
        ([1], 1, 0),
        ([1, 2], 3, 0),
        ([], 2, 0),
    ],
)
def test_increases_are_counted_from_strip_end_to_strip_end(errors, strip, count):
    assert successive_increases(errors, strip) == count


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (generalization_loss, ([],), r"^generalization_loss\(errors=\[\]\): errors must hold at least one\.$"),
        (generalization_loss, ([1.0, 0.0],), r"^generalization_loss\(errors=\[\.\.\., 0, \.\.\.\]\): every error must"),
        (progress, ([1.0], 2), r"^progress\(strip=2\): there are only 1 errors\.$"),
        (progress, ([1.0, -1.0], 2), r"^progress\(errors=\[\.\.\., -1, \.\.\.\]\): every error must be greater than 0"),
        (progress, ([1.0], 0), r"^progress\(strip=0\): strip must be an integer >= 1\.$"),
        (progress_quotient, ([1.0], [1.0], 2), r"^progress_quotient\(strip=2\): there are only 1 training_errors\.$"),
        (successive_increases, ([1.0], 0), r"^successive_increases\(strip=0\): strip must be an integer >= 1\.$"),
    ],
)
def test_bad_input_is_refused(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
