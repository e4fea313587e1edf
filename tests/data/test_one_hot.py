# SPDX-License-Identifier: Apache-2.0
"""OneHot against scikit-learn's OneHotEncoder."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.datasets import load_digits
from sklearn.preprocessing import OneHotEncoder

from lightning_optkit.data import OneHot

IDS = hnp.arrays("int64", st.tuples(st.integers(1, 30), st.integers(1, 4)), elements=st.integers(-3, 3))


@pytest.mark.parametrize("drop", [None, "first", "if_binary"])
def test_matches_scikit_learn_on_digits_with_missing_values(drop):
    rows = torch.tensor(load_digits().data)[:, :20]
    rows = rows.masked_fill(torch.rand(rows.shape, generator=torch.Generator().manual_seed(0)) < 0.05, torch.nan)
    rows[:, 3] = (rows[:, 3] > 8).double()  # a binary feature
    ours = OneHot(drop=drop).fit(rows.split(100))
    theirs = OneHotEncoder(drop=drop, sparse_output=False)
    expected = torch.from_numpy(theirs.fit_transform(rows.numpy()))
    assert torch.equal(ours(rows), expected)
    for mine, yours in zip(ours.categories, theirs.categories_, strict=True):
        np.testing.assert_array_equal(mine.numpy(), yours)
    torch.testing.assert_close(ours.inverse(expected), rows, rtol=0, atol=0, equal_nan=True)


@given(IDS, st.integers(1, 30))
def test_streaming_equals_whole(rows, batch_size):
    rows = torch.from_numpy(rows)
    streamed, whole = OneHot().fit(rows.split(batch_size)), OneHot().fit(rows)
    for name, value in whole.stats.named().items():
        assert torch.equal(streamed.stats[name], value), name
    assert whole.stats["occurrences"].sum() == rows.numel()


@pytest.mark.parametrize("drop", [None, "first", "if_binary"])
@given(rows=IDS)
def test_inverse_undoes_forward(drop, rows):
    rows = torch.from_numpy(rows)
    encode = OneHot(drop=drop).fit(rows)
    assert torch.equal(encode.inverse(encode(rows)), rows.double())


def test_unseen_category_is_refused_or_ignored():
    rows, new = torch.tensor([[1, 4], [2, 4]]), torch.tensor([[1, 4], [2, 9]])
    with pytest.raises(ValueError, match=r"OneHot\(x\[\.\.\., 1\]=9\): not a category of the training set"):
        OneHot().fit(rows)(new)
    encode = OneHot(handle_unknown="ignore").fit(rows)
    assert encode(new).tolist() == [[1, 0, 1], [0, 1, 0]]
    torch.testing.assert_close(
        encode.inverse(encode(new)), torch.tensor([[1.0, 4.0], [2.0, torch.nan]]).double(), equal_nan=True
    )


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity_is_never_a_category(value):
    encode = OneHot(handle_unknown="ignore").fit(torch.tensor([[torch.nan], [1.0]]))
    assert encode(torch.tensor([[value], [torch.nan]])).tolist() == [[0, 0], [0, 1]]


def test_negative_zero_is_zero():
    assert OneHot().fit(torch.tensor([[-0.0], [0.0]]))(torch.tensor([[-0.0]])).tolist() == [[1]]


def test_one_row_and_more_dimensions():
    encode = OneHot().fit(torch.tensor([[[3, 5], [4, 5]]]))
    assert encode(torch.tensor([[[4, 5]]])).tolist() == [[[0, 1, 1]]]


def test_integers_too_large_for_float64_are_refused():
    with pytest.raises(ValueError, match=r"OneHot\(x=2\*\*53 or more\): such integers are not exact"):
        OneHot().fit(torch.tensor([[2**60]]))


@pytest.mark.parametrize("argument", ["handle_unknown", "drop"])
def test_wrong_choice_is_refused(argument):
    with pytest.raises(ValueError, match=rf"OneHot\({argument}='last'\): {argument} must be one of"):
        OneHot(**{argument: "last"})
