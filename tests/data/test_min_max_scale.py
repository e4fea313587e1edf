# SPDX-License-Identifier: Apache-2.0
"""MinMaxScale against scikit-learn's MinMaxScaler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import MinMaxScaler

from lightning_optkit.data import MinMaxScale

TABLES = hnp.arrays("float64", st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=st.floats(-1e6, 1e6))


@pytest.mark.parametrize("feature_range", [(0, 1), (-1, 3)])
def test_matches_scikit_learn_on_tables_with_missing_values(holed_table, feature_range):
    ours, theirs = MinMaxScale(feature_range).fit(holed_table.split(37)), MinMaxScaler(feature_range)
    expected = torch.from_numpy(theirs.fit_transform(holed_table.numpy()))
    torch.testing.assert_close(ours(holed_table), expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(ours.inverse(expected), holed_table, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_clips_new_values_only_when_asked():
    rows, new = torch.tensor([[0.0], [2.0]]), torch.tensor([[-2.0], [1.0], [3.0]])
    assert MinMaxScale().fit(rows)(new).flatten().tolist() == [-1.0, 0.5, 1.5]
    assert MinMaxScale(clip=True).fit(rows)(new).flatten().tolist() == [0.0, 0.5, 1.0]


@given(TABLES, st.integers(1, 40))
def test_streaming_equals_whole(rows, batch_size):
    rows = torch.from_numpy(rows)
    streamed, whole = MinMaxScale().fit(rows.split(batch_size)), MinMaxScale().fit(rows)
    assert torch.equal(streamed.data_min, whole.data_min) and torch.equal(streamed.scale, whole.scale)
    assert torch.equal(whole.data_max, rows.amax(dim=0))


@given(TABLES)
def test_inverse_undoes_forward(rows):
    rows = torch.from_numpy(rows)
    scale = MinMaxScale((-1, 1)).fit(rows)
    error = (scale.inverse(scale(rows)) - rows).abs()
    assert (error <= 1e-14 * (1 + rows.abs().amax(dim=0))).all()


def test_keeps_a_small_range_beside_a_huge_offset():
    rows = torch.tensor([[1e9], [1e9 + 2**-20], [1e9 + 2**-19]], dtype=torch.float64)
    assert MinMaxScale().fit(rows)(rows).flatten().tolist() == [0.0, 0.5, 1.0]


def test_constant_column_maps_to_the_lower_end():
    assert MinMaxScale((2, 3)).fit(torch.full((5, 1), 7.0))(torch.tensor([[7.0]])).item() == 2


def test_column_without_values_is_refused():
    with pytest.raises(ValueError, match=r"MinMaxScale\(x\[\.\.\., 1\]\): features \[1\] have no value in"):
        MinMaxScale().fit(torch.tensor([[1.0, torch.nan], [2.0, torch.nan]]))


def test_empty_range_is_refused():
    with pytest.raises(ValueError, match=r"MinMaxScale\(feature_range=\(1, 1\)\): the first end must be below"):
        MinMaxScale((1, 1))
