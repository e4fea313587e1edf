# SPDX-License-Identifier: Apache-2.0
"""RobustScale against scikit-learn's RobustScaler, and the stated bound of the quantiles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import RobustScaler

from lightning_optkit.data import RobustScale

TABLES = hnp.arrays("float64", st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=st.floats(-1e6, 1e6))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"quantile_range": (5.0, 90.0)},
        {"unit_variance": True},
        {"with_centering": False},
        {"with_scaling": False},
    ],
    ids=str,
)
def test_matches_scikit_learn_on_tables_with_missing_values(holed_table, options):
    ours, theirs = RobustScale(**options).fit(holed_table.split(37)), RobustScaler(**options)
    expected = torch.from_numpy(theirs.fit_transform(holed_table.numpy()))
    torch.testing.assert_close(ours(holed_table), expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(ours.inverse(expected), holed_table, rtol=1e-9, atol=1e-9, equal_nan=True)


@given(TABLES, st.integers(1, 40))
def test_streaming_equals_whole_up_to_exact_rows(rows, batch_size):
    rows = torch.from_numpy(rows)
    streamed, whole = RobustScale(exact_rows=40).fit(rows.split(batch_size)), RobustScale().fit(rows)
    assert torch.equal(streamed.center, whole.center) and torch.equal(streamed.scale, whole.scale)


@given(TABLES)
def test_inverse_undoes_forward(rows):
    rows = torch.from_numpy(rows)
    scale = RobustScale().fit(rows)
    size = 1 + rows.abs().amax(dim=0)
    assert ((scale.inverse(scale(rows)) - rows).abs() <= 1e-14 * size).all()


@pytest.mark.parametrize("order", ["rising", "random"])
@pytest.mark.parametrize("num_rows", [1000, 100_000])
@pytest.mark.parametrize("exact_rows", [64, 1000])
def test_rank_error_stays_within_the_stated_bound(order, num_rows, exact_rows):
    ranks = np.arange(num_rows) if order == "rising" else np.random.default_rng(0).permutation(num_rows)
    rows = torch.tensor(np.stack([ranks, -ranks], axis=1), dtype=torch.float64)
    rows[:, 1] = rows[:, 1].masked_fill(torch.arange(num_rows) % 2 == 0, torch.nan)
    scale = RobustScale(exact_rows=exact_rows, quantile_range=(10.0, 90.0))
    for batch in rows.split(777):
        scale.partial_fit(batch)
    held = len(scale.stats["sample"])
    scale.finalize()
    levels = max(math.ceil(math.log2(num_rows / exact_rows)), 0)
    bound = math.ceil(levels / 2) / exact_rows * num_rows
    median, spread = np.nanmedian(rows.numpy(), axis=0), np.nanquantile(rows.numpy(), [0.1, 0.9], axis=0)
    tolerance = 1e-6 + bound * torch.tensor([1.0, 2.0], dtype=torch.float64)  # half the ranks of column 1 are missing
    assert held <= exact_rows * (levels + 1)
    assert ((scale.center - torch.from_numpy(median)).abs() <= tolerance).all()
    assert ((scale.scale - torch.from_numpy(spread[1] - spread[0])).abs() <= 2 * tolerance).all()


def test_errors_of_neighboring_levels_cancel():
    """Keeping the lower row of every pair at every level would move this median by a fifth of the rows."""
    ranks = torch.randperm(20_000, generator=torch.Generator().manual_seed(0)).double()
    scale = RobustScale(exact_rows=16).fit(ranks[:, None].split(17))
    assert abs(scale.center.item() - 10_000) < 0.05 * 20_000


def test_outliers_do_not_move_it():
    rows = torch.arange(1.0, 102.0)[:, None]
    moved = rows.clone()
    moved[-1] = 1e30
    assert torch.equal(RobustScale().fit(rows).scale, RobustScale().fit(moved).scale)


def test_column_without_spread_is_divided_by_one():
    assert RobustScale().fit(torch.tensor([[4.0]] * 9 + [[9.0]]))(torch.tensor([[5.0]])).item() == 1


def test_learning_after_finalize_is_refused():
    scale = RobustScale().fit(torch.tensor([[1.0], [2.0]]))
    assert scale.state_dict()["stats.sample"].numel() == 0
    with pytest.raises(RuntimeError, match=r"RobustScale\(fitted=True\): the rows were forgotten by finalize\(\)"):
        scale.partial_fit(torch.tensor([[3.0]]))
    with pytest.raises(RuntimeError, match=r"RobustScale\(fitted=True\): the rows were forgotten by finalize\(\)"):
        RobustScale().merge(scale)


def test_column_without_values_is_refused():
    with pytest.raises(ValueError, match=r"RobustScale\(x\[\.\.\., 0\]\): features \[0\] have no value in"):
        RobustScale().fit(torch.tensor([[torch.nan, 1.0]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantile_range": (75.0, 25.0)}, r"\(quantile_range=\(75.0, 25.0\)\): the ends must be in increasing order"),
        ({"quantile_range": (-1.0, 25.0)}, r"\(quantile_range=-1.0\): quantile_range must be in \[0, 100\]"),
        ({"quantile_range": (0.0, 50.0), "unit_variance": True}, r"must be strictly between 0 and 100"),
        ({"exact_rows": 1}, r"\(exact_rows=1\): exact_rows must be an integer >= 2"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RobustScale(**options)
