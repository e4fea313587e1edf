# SPDX-License-Identifier: Apache-2.0
"""A chain fitted stage after stage against scikit-learn's pipeline."""

import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from lightning_optkit.data import Impute, OneHot, Standardize, Vocabulary, Whiten, fit_in_order


def test_matches_a_scikit_learn_pipeline(holed_table):
    chain = nn.Sequential(Impute("median"), Standardize(), Whiten(n_components=5))
    theirs = make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), PCA(5, whiten=True, svd_solver="full"))
    expected = torch.from_numpy(theirs.fit_transform(holed_table.numpy()))
    fit_in_order(chain, holed_table.split(50))
    torch.testing.assert_close(chain(holed_table), expected, rtol=1e-6, atol=1e-6)


def test_applies_stages_that_learn_nothing():
    images = torch.arange(24.0).view(3, 2, 2, 2)
    chain = fit_in_order(nn.Sequential(nn.Flatten(), Standardize(), nn.ReLU()), [images])
    assert (chain(images)[0] == 0).all() and (chain(images)[2] > 1).all()


def test_text_to_ids_can_be_the_first_stage():
    chain = fit_in_order(nn.Sequential(Vocabulary(), OneHot()), [["a b", "b a"]])
    assert chain(["b b"]).tolist() == [[0, 1, 0, 1]]


def test_several_stages_need_data_that_can_be_read_again():
    chain = nn.Sequential(Impute(), Standardize())
    with pytest.raises(ValueError, match=r"fit_in_order\(batches=generator\): must be readable 2 times"):
        fit_in_order(chain, (torch.ones(1, 1) for _ in range(3)))


def test_chain_without_anything_to_fit_is_refused():
    with pytest.raises(ValueError, match=r"fit_in_order\(chain\): at least one stage must have partial_fit"):
        fit_in_order(nn.Sequential(nn.ReLU()), [torch.ones(1, 1)])
