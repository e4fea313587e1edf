# SPDX-License-Identifier: Apache-2.0
"""The activation that initialize assigns to a layer."""

import pytest
from torch import nn

from lightning_optkit.init import he, initialize


def by_name(rows):
    return {f"{row.module}.{row.parameter}".lstrip("."): row for row in rows}


class Block(nn.Module):
    """Registers its activation first and calls functions in its forward: order says little."""

    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


class Act(nn.Module):
    """A custom activation."""


def schemes(model, **arguments):
    rows = initialize(model, he, **arguments)
    return [row.scheme for row in rows if row.parameter == "weight" and row.scheme.startswith("he")]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Linear(4, 4), ["he"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ["he", "he"]),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Dropout(), nn.Tanh(), nn.Linear(4, 4)),
         ["he, tanh", "he, linear"]),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Tanh()), ["he, linear", "he, tanh"]),
        (nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
         ["he, linear", "he, relu"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Softmax(dim=1), nn.ReLU()), ["he, linear"]),
        (nn.Sequential(Block(), nn.Linear(4, 4)), ["he", "he", "he, linear"]),
        (nn.Sequential(nn.Linear(4, 4), Act(), nn.Linear(4, 4), nn.ReLU()), ["he", "he, relu"]),
        (nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.2)), ["he, LeakyReLU(negative_slope=0.2)"]),
    ],
    ids=range(9),
)  # fmt: skip
def test_the_following_activation_is_read_off_the_order_of_modules(model, expected):
    assert schemes(model) == expected


def test_one_activation_module_used_twice_counts_twice():
    act = nn.Tanh()
    assert schemes(nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)) == ["he, tanh", "he, tanh"]


def test_torch_s_transformer_layer_names_its_activation():
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu")
    assert schemes(layer) == ["he, linear", "he, gelu", "he, linear"]


def test_the_activation_can_be_set_for_all_or_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.LSTM(4, 4))
    assert schemes(model, activation="tanh") == ["he, tanh", "he, tanh"]
    assert schemes(model, activation={"2": "selu"}) == ["he, relu", "he, selu"]
    rows = by_name(initialize(model, he, activation={"3": "relu"}))
    assert rows["3.weight_ih_l0"].scheme == "he, relu"


def test_rejects_an_activation_for_a_layer_that_is_not_there():
    with pytest.raises(
        ValueError, match=r"initialize\(activation='fc9'\): activation must name weighted layers of the"
    ):
        initialize(nn.Linear(2, 2), he, activation={"fc9": "relu"})
