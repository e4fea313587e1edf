# SPDX-License-Identifier: Apache-2.0
"""Networks whose ReLUs can die, and networks whose gradient can vanish, besides those of `families`.

`RELU` and `SQUASHING` are used to adjust rules; the held-out ones were set apart before the first run.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from tests.diagnostics.benchmark import data
from tests.diagnostics.benchmark.families import Setup, cnn, deep_mlp, mlp, regression, tanh_mlp


def _chain(sizes, activation):
    layers = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers)


def _xavier(body):
    for layer in body:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return body


def _classes(family, seed, body, width, data_, lrs, epochs, batch_size=64):
    classes = int(data_[1].max()) + 1
    head = nn.Linear(width, classes)
    return Setup(family, seed, body, head, data_, F.cross_entropy, "classes", lrs, epochs, batch_size)


def _regression(family, seed, activation):
    x, y, x_val, y_val = data.split("diabetes", seed)
    mean, std = y.mean(), y.std()
    y, y_val = ((each - mean).float() / std for each in (y, y_val))
    head = nn.Sequential(nn.Linear(32, 1), nn.Flatten(0))
    body, lrs = _chain([10, 32, 32], activation), (3e-3, 0.02)
    return Setup(family, seed, body, head, (x, y, x_val, y_val), F.mse_loss, "regression", lrs, 20, 32)


def _autoencoder(family, seed, activation):
    x, _, x_val, _ = data.digits(seed)
    head = nn.Sequential(nn.Linear(32, 48), activation(), nn.Linear(48, 64))
    body, lrs = _chain([64, 48, 32], activation), (3e-3, 0.3)
    return Setup(family, seed, body, head, (x, x, x_val, x_val), F.mse_loss, "regression", lrs, 10)


def sigmoid_wine(seed):
    body = _chain([13, 32, 32], nn.Sigmoid)
    return _classes("sigmoid_wine", seed, body, 32, data.split("wine", seed), (1e-2, 0.3), 30, 16)


def tanh_regression(seed):
    return _regression("tanh_regression", seed, nn.Tanh)


def deep_tanh(seed):
    body = _xavier(_chain([64] + [48] * 6, nn.Tanh))
    return _classes("deep_tanh", seed, body, 48, data.digits(seed), (1e-3, 0.01), 9)


# --- held out ---


def relu_cancer(seed):
    body = _chain([30, 48, 48, 48], nn.ReLU)
    return _classes("relu_cancer", seed, body, 48, data.split("breast_cancer", seed), (2e-3, 0.05), 15, 32)


def relu_wine(seed):
    return _classes(
        "relu_wine", seed, _chain([13, 32, 32], nn.ReLU), 32, data.split("wine", seed), (3e-3, 0.05), 30, 16
    )


def deep_cnn(seed):
    body = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(216, 48), nn.ReLU(),
    )  # fmt: skip
    return _classes("deep_cnn", seed, body, 48, data.digits(seed, (1, 8, 8)), (2e-3, 0.03), 8)


def relu_autoencoder(seed):
    return _autoencoder("relu_autoencoder", seed, nn.ReLU)


def tanh_cancer(seed):
    body = _chain([30, 48, 48, 48], nn.Tanh)
    return _classes("tanh_cancer", seed, body, 48, data.split("breast_cancer", seed), (2e-3, 0.05), 15, 32)


def tanh_cnn(seed):
    body = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.Tanh(), nn.Conv2d(12, 24, 3, stride=2), nn.Tanh(), nn.Flatten()
    )  # fmt: skip
    return _classes("tanh_cnn", seed, body, 216, data.digits(seed, (1, 8, 8)), (3e-3, 0.05), 7)


def sigmoid_digits(seed):
    return _classes("sigmoid_digits", seed, _chain([64, 64], nn.Sigmoid), 64, data.digits(seed), (1e-2, 0.3), 8)


def tanh_autoencoder(seed):
    return _autoencoder("tanh_autoencoder", seed, nn.Tanh)


RELU = (mlp, deep_mlp, cnn, regression)
SQUASHING = (tanh_mlp, sigmoid_wine, tanh_regression, deep_tanh)
RELU_HELD_OUT = (relu_cancer, relu_wine, deep_cnn, relu_autoencoder)
SQUASHING_HELD_OUT = (tanh_cancer, tanh_cnn, sigmoid_digits, tanh_autoencoder)
