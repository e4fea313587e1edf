# SPDX-License-Identifier: Apache-2.0
"""Real tables, whole and with holes."""

import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine

sys.path.insert(0, str(Path(__file__).parent))  # draws_worker.py

LOADERS = (load_breast_cancer, load_wine, load_diabetes, load_digits)


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__)
def table(request):
    return torch.tensor(request.param().data, dtype=torch.float64)


@pytest.fixture
def holed_table(table):
    """The table with one value in ten missing."""
    holes = torch.rand(table.shape, generator=torch.Generator().manual_seed(1)) < 0.1
    return table.masked_fill(holes, torch.nan)
