# SPDX-License-Identifier: Apache-2.0
"""Exact zeros are counted, near zeros are not."""

import torch

from lightning_optkit.regularization import sparsity


def test_only_exact_zeros_count():
    assert sparsity({"a": torch.tensor([0.0, 1e-30]), "b": torch.zeros(3), "c": torch.zeros(0)}) == {
        "a": 0.5,
        "b": 1.0,
        "c": 0.0,
    }
