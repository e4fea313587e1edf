# SPDX-License-Identifier: Apache-2.0
"""Standardize against scikit-learn's StandardScaler and the formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import StandardScaler

from lightning_optkit.data import Standardize

TABLES = hnp.arrays("float64", st.tuples(st.integers(2, 40), st.integers(1, 4)), elements=st.floats(-1e6, 1e6))


def assert_close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected), rtol=1e-6, atol=atol, equal_nan=True)


@pytest.mark.parametrize("options", [{}, {"with_mean": False}, {"with_std": False}], ids=str)
def test_matches_scikit_learn_on_tables_with_missing_values(holed_table, options):
    ours, theirs = Standardize(**options).fit(holed_table.split(37)), StandardScaler(**options)
    expected = theirs.fit_transform(holed_table.numpy())
    assert_close(ours(holed_table), expected)
    assert_close(ours.inverse(ours(holed_table)), holed_table)
    if not options:
        assert_close(ours.mean, theirs.mean_)
        assert_close(ours.var, theirs.var_)
        assert_close(ours.scale, theirs.scale_)


@given(TABLES, st.integers(1, 40))
def test_streaming_equals_whole(rows, batch_size):
    rows = torch.from_numpy(rows)
    streamed, whole = Standardize().fit(rows.split(batch_size)), Standardize().fit(rows)
    size = 1 + rows.abs().amax(dim=0)
    assert ((streamed.mean - whole.mean).abs() <= 1e-14 * size).all()
    assert ((streamed.var - whole.var).abs() <= 1e-13 * size**2).all()


@given(TABLES)
def test_inverse_undoes_forward(rows):
    rows = torch.from_numpy(rows)
    scale = Standardize().fit(rows)
    error = (scale.inverse(scale(rows)) - rows).abs()
    assert (error <= 1e-14 * (1 + rows.abs().amax(dim=0))).all()


def test_keeps_small_variance_beside_a_huge_offset():
    small = torch.randn(5000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    small = (small * 2**30).round() / 2**30 // 2**-22 * 2**-22  # exact after adding 1e9
    scale = Standardize().fit((small + 1e9).split(7))
    expected = (small - small.mean(dim=0)) / small.std(dim=0, correction=0)
    torch.testing.assert_close(scale(small + 1e9), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [0.1, 1e9 + 0.1, 0.0, -1e-300])
def test_constant_column_becomes_zero(value):
    rows = torch.full((1001, 1), value, dtype=torch.float64)
    scale = Standardize().fit(rows.split(10))
    assert scale.var.item() == 0 and scale.scale.item() == 1
    assert (scale(rows) == 0).all()


def test_column_that_varies_by_rounding_only_counts_as_constant_as_in_scikit_learn():
    rows = 0.1 * (1 + torch.finfo(torch.float64).eps * torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64))
    assert Standardize().fit(rows).scale.item() == StandardScaler().fit(rows.numpy()).scale_[0] == 1


def test_one_row_becomes_zero():
    assert Standardize().fit(torch.tensor([[3.0, -2.0]]))(torch.tensor([[3.0, -1.0]])).tolist() == [[0.0, 1.0]]


def test_column_first_seen_in_a_later_batch_is_learned():
    rows = torch.tensor([[1.0, torch.nan], [3.0, torch.nan], [5.0, 7.0], [7.0, 9.0]])
    scale = Standardize().fit(rows.split(2))
    torch.testing.assert_close(scale.mean, torch.tensor([4.0, 8.0], dtype=torch.float64))
    torch.testing.assert_close(scale.var, torch.tensor([5.0, 1.0], dtype=torch.float64))


def test_counts_channels_of_images_along_feature_dim():
    images = torch.randn(6, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 4 + 2
    scale = Standardize(feature_dim=1).fit(images.split(4))
    torch.testing.assert_close(scale.mean, images.double().mean(dim=(0, 2, 3)))
    torch.testing.assert_close(scale(images).std(dim=(0, 2, 3), correction=0), torch.ones(3))


def test_goes_on_learning_after_finalize():
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = Standardize().fit(rows[:10]).partial_fit(rows[10:])
    with pytest.raises(RuntimeError, match=r"Standardize\(fitted=False\): call fit\(batches\)"):
        scale(rows)
    torch.testing.assert_close(scale.finalize().var, rows.var(dim=0, correction=0), rtol=1e-13, atol=0)


def test_overflowing_spread_is_refused():
    with pytest.raises(ValueError, match=r"Standardize\(x\[\.\.\., 0\]\): the spread of this feature overflows"):
        Standardize().fit(torch.tensor([[-1e200], [1e200]], dtype=torch.float64))
