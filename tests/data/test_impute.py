# SPDX-License-Identifier: Apache-2.0
"""Impute against scikit-learn's SimpleImputer."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.impute import SimpleImputer

from lightning_optkit.data import Impute

STRATEGIES = ["mean", "median", "most_frequent", "constant"]
HOLED = hnp.arrays(
    "float64",
    st.tuples(st.integers(1, 30), st.integers(1, 4)),
    elements=st.sampled_from([math.nan, -2.0, 0.0, 1.0, 5.5]),
)


@pytest.mark.parametrize("add_indicator", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_matches_scikit_learn_on_tables_with_missing_values(holed_table, strategy, add_indicator):
    holed_table[:, 0] = 3.0  # a feature without holes has no indicator
    ours = Impute(strategy, fill_value=-7.0, add_indicator=add_indicator).fit(holed_table.split(37))
    theirs = SimpleImputer(strategy=strategy, fill_value=-7.0, add_indicator=add_indicator)
    expected = torch.from_numpy(theirs.fit_transform(holed_table.numpy()))
    torch.testing.assert_close(ours(holed_table), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(rows=HOLED, batch_size=st.integers(1, 30))
def test_streaming_equals_whole(strategy, rows, batch_size):
    rows = torch.from_numpy(rows)
    streamed, whole = (
        Impute(strategy, keep_empty_features=True).fit(batches) for batches in (rows.split(batch_size), rows)
    )
    torch.testing.assert_close(streamed.fill, whole.fill, rtol=1e-14, atol=1e-14)


@given(rows=HOLED)
def test_inverse_undoes_forward(rows):
    rows = torch.from_numpy(rows)
    impute = Impute(add_indicator=True, keep_empty_features=True).fit(rows)
    torch.testing.assert_close(impute.inverse(impute(rows)), rows, rtol=0, atol=0, equal_nan=True)


def test_inverse_without_indicator_is_refused():
    with pytest.raises(ValueError, match=r"Impute\(add_indicator=False\): inverse needs add_indicator=True"):
        Impute().fit(torch.ones(2, 1)).inverse(torch.ones(2, 1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_a_number_can_mark_missing_values(dtype):
    rows = torch.tensor([[1, -1], [4, 8], [-1, 2]], dtype=dtype)
    expected = SimpleImputer(missing_values=-1.0).fit_transform(rows.numpy().astype("float64"))
    assert Impute(missing_values=-1).fit(rows)(rows).tolist() == expected.tolist()


def test_nan_beside_another_mark_is_refused():
    with pytest.raises(ValueError, match=r"Impute\(missing_values=-1\): x has NaN"):
        Impute(missing_values=-1).fit(torch.tensor([[torch.nan]]))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_column_without_values_is_kept_as_in_scikit_learn_when_asked(strategy):
    rows = np.array([[1.0, np.nan], [2.0, np.nan]])
    theirs = SimpleImputer(strategy=strategy, fill_value=-7.0, keep_empty_features=True, add_indicator=True)
    ours = Impute(strategy, fill_value=-7.0, keep_empty_features=True, add_indicator=True).fit(torch.from_numpy(rows))
    assert ours(torch.from_numpy(rows)).tolist() == theirs.fit_transform(rows).tolist()


@pytest.mark.parametrize("strategy", STRATEGIES[:3])
def test_column_without_values_is_refused_otherwise(strategy):
    with pytest.raises(ValueError, match=r"Impute\(x\[\.\.\., 1\]\): features \[1\] have no value in"):
        Impute(strategy).fit(torch.tensor([[1.0, torch.nan]]))


def test_indicator_of_images_is_appended_to_the_channels():
    images = torch.ones(2, 3, 2, 2)
    images[0, 1, 0, 0] = torch.nan
    filled = Impute(add_indicator=True, feature_dim=1).fit(images)(images)
    assert filled.shape == (2, 4, 2, 2) and filled[:, 3].sum() == 1 and filled[0, 3, 0, 0] == 1


def test_rows_are_forgotten_by_finalize():
    impute = Impute("median").fit(torch.ones(100, 2))
    assert sum(value.numel() for value in impute.stats.named().values()) == 2 * 3  # present, missing, fill
    with pytest.raises(RuntimeError, match=r"Impute\(fitted=True\): the rows were forgotten"):
        impute.partial_fit(torch.ones(1, 2))


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match=r"Impute\(strategy='mode'\): strategy must be one of 'mean', 'median'"):
        Impute("mode")
