# SPDX-License-Identifier: Apache-2.0
"""Whiten against scikit-learn's PCA(whiten=True) and the definition of ZCA."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA

from lightning_optkit.data import Whiten

TABLES = hnp.arrays("float64", st.tuples(st.integers(2, 40), st.integers(1, 4)), elements=st.floats(-1e3, 1e3))


def test_pca_matches_scikit_learn(table):
    ours, theirs = Whiten().fit(table.split(37)), PCA(whiten=True, svd_solver="full").fit(table.numpy())
    assert_same_as_pca(ours, theirs, table)


def assert_same_as_pca(ours, theirs, table):
    real = theirs.explained_variance_ > 1e-20 * theirs.explained_variance_[0]  # digits has constant features
    torch.testing.assert_close(
        ours.explained_variance[real], torch.from_numpy(theirs.explained_variance_[real]), rtol=1e-6, atol=0
    )
    expected = torch.from_numpy(theirs.transform(table.numpy()))
    torch.testing.assert_close(ours(table)[:, real], expected[:, real], rtol=1e-6, atol=1e-6)
    assert (ours(table)[:, ~real] == 0).all()
    torch.testing.assert_close(ours.inverse(ours(table)), table, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n_components", [1, 5, 0.9, 0.999999])
def test_keeps_as_many_components_as_scikit_learn(table, n_components):
    ours = Whiten(n_components=n_components).fit(table.split(37))
    theirs = PCA(n_components, whiten=True, svd_solver="full").fit(table.numpy())
    expected = torch.from_numpy(theirs.transform(table.numpy()))
    torch.testing.assert_close(ours(table), expected, rtol=1e-6, atol=1e-6)
    back = torch.from_numpy(theirs.inverse_transform(expected.numpy()))
    torch.testing.assert_close(ours.inverse(expected), back, rtol=1e-6, atol=1e-6)


def test_zca_is_the_symmetric_root_of_the_inverse_covariance(table):
    table = table[:, table.std(dim=0) > 0][:, :12]
    whiten = Whiten("zca").fit(table.split(37))
    white = whiten(table)
    root = torch.linalg.lstsq(table - table.mean(dim=0), white).solution
    torch.testing.assert_close(root @ table.T.cov() @ root, torch.eye(table.shape[1], dtype=table.dtype))
    torch.testing.assert_close(root, root.T, rtol=1e-6, atol=1e-6 * float(root.abs().max()))
    assert torch.linalg.eigvalsh(root).min() > 0
    torch.testing.assert_close(whiten.inverse(white), table, rtol=1e-9, atol=1e-9)


@given(TABLES, st.integers(1, 40))
def test_streaming_equals_whole(rows, batch_size):
    rows = torch.from_numpy(rows)
    streamed, whole = Whiten().fit(rows.split(batch_size)), Whiten().fit(rows)
    scatter, expected = (w.stats["factor"].T @ w.stats["factor"] for w in (streamed, whole))
    torch.testing.assert_close(scatter, expected, rtol=1e-12, atol=1e-12 * (1 + float(rows.abs().max()) ** 2))
    torch.testing.assert_close(expected / (len(rows) - 1), torch.atleast_2d(rows.T.cov()), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("method", ["pca", "zca"])
@given(rows=TABLES)
def test_inverse_undoes_forward(method, rows):
    rows = torch.from_numpy(rows)
    whiten = Whiten(method).fit(rows)
    torch.testing.assert_close(whiten.inverse(whiten(rows)), rows, rtol=0, atol=1e-9)


def test_keeps_small_variances_beside_a_huge_offset():
    rows = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = (rows * 2**20).round() / 2**20  # exact after adding 1e9
    torch.testing.assert_close(Whiten().fit((rows + 1e9).split(50))(rows + 1e9), Whiten().fit(rows)(rows))


def test_fewer_rows_than_features_give_as_many_directions_as_rows():
    rows = torch.randn(4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    white = Whiten().fit(rows.split(3))(rows)
    assert white.shape == (4, 4) and (white[:, 3] == 0).all()  # centering takes one direction
    torch.testing.assert_close(white[:, :3].T.cov(), torch.eye(3, dtype=torch.float64))


def test_eps_is_added_to_every_variance():
    rows = torch.tensor(load_wine().data)
    plain, damped = Whiten().fit(rows), Whiten(eps=100.0).fit(rows)
    torch.testing.assert_close(damped.explained_variance, plain.explained_variance + 100)
    ratio = (plain.explained_variance / (plain.explained_variance + 100)).sqrt()
    torch.testing.assert_close(damped(rows), plain(rows) * ratio)


def test_channels_of_images_are_whitened_along_feature_dim():
    images = torch.randn(8, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images[:, 1] += images[:, 0]
    white = Whiten("zca", feature_dim=1).fit(images.split(3))(images)
    rows = white.movedim(1, 0).flatten(1)
    torch.testing.assert_close(rows.cov(), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "rows", "message"),
    [
        ({}, torch.ones(1, 2), r"Whiten\(rows=1\): variances need at least 2 training rows"),
        (
            {},
            torch.tensor([[1.0], [torch.nan]]),
            r"Whiten\(x=nan\): a missing value has no direction; put Impute before",
        ),
        ({"n_components": 3}, torch.rand(9, 2), r"Whiten\(n_components=3\): the training set has only 2 directions"),
    ],
)
def test_data_without_an_answer_is_refused(options, rows, message):
    with pytest.raises(ValueError, match=message):
        Whiten(**options).fit(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "cholesky"}, r"Whiten\(method='cholesky'\): method must be one of 'pca', 'zca'"),
        ({"method": "zca", "n_components": 2}, r"Whiten\(n_components=2\): zca keeps every direction"),
        ({"n_components": 1.5}, r"Whiten\(n_components=1.5\): n_components must be in \(0, 1\)"),
        ({"n_components": 0}, r"Whiten\(n_components=0\): n_components must be an integer >= 1"),
        ({"eps": -1.0}, r"Whiten\(eps=-1.0\): eps must be in \[0, inf\)"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Whiten(**arguments)
