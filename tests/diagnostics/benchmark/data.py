# SPDX-License-Identifier: Apache-2.0
"""Real data that scikit-learn carries with it: nothing is downloaded."""

from functools import cache

import torch
from sklearn import datasets


@cache
def _loaded(name):
    data = getattr(datasets, f"load_{name}")()
    return torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target)


def split(name, seed, standardize=True):
    """x, y, x_val, y_val: a fifth for validation; features standardized by the training part."""
    x, y = _loaded(name)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1000 + seed))
    cut = len(x) * 4 // 5
    train, val = order[:cut], order[cut:]
    x, y, x_val, y_val = x[train], y[train], x[val], y[val]
    if standardize:
        mean, std = x.mean(0), x.std(0).clamp_min(1e-3 * x.std())
        x, x_val = (x - mean) / std, (x_val - mean) / std
    return x, y, x_val, y_val


def digits(seed, shape=(64,)):
    """8 x 8 images in [0, 1] minus their mean, in this shape."""
    x, y, x_val, y_val = split("digits", seed, standardize=False)
    x, x_val = (x - 4.9) / 6.0, (x_val - 4.9) / 6.0
    return x.reshape(-1, *shape), y, x_val.reshape(-1, *shape), y_val
