# SPDX-License-Identifier: Apache-2.0
"""initialize as a whole: rows, schemes, seeds, bad arguments, and the signal through deep networks."""

import functools

import pytest
import torch
from torch import nn

from lightning_optkit.init import (
    depth_scaled,
    he,
    identity,
    initialize,
    lecun,
    lsuv,
    orthogonal,
    truncated_normal,
    xavier,
)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def by_name(rows):
    return {f"{row.module}.{row.parameter}".lstrip("."): row for row in rows}


def zoo():
    return nn.Sequential(nn.Embedding(9, 8), nn.LSTM(8, 8), nn.Conv1d(8, 8, 3, groups=2), nn.ReLU(), nn.Linear(8, 2))


def test_every_row_says_what_its_parameter_holds():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    rows = by_name(initialize(model, he, generator=seeded()))
    assert list(rows) == [name for name, _ in model.named_parameters()]
    assert [row.scheme for row in rows.values()] == ["he, relu", "zeros", "ones", "zeros", "he, linear", "zeros"]
    for name, parameter in model.named_parameters():
        assert rows[name].shape == tuple(parameter.shape)
        assert rows[name].std == pytest.approx(float(parameter.detach().std(correction=0)), abs=1e-7)


def test_a_partial_keeps_what_it_has_filled():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    initialize(model, functools.partial(he, activation="tanh"), generator=seeded())
    reference = nn.init.kaiming_normal_(torch.empty(4, 4), nonlinearity="tanh", generator=seeded())
    assert torch.equal(model[0].weight, reference)


def test_torch_s_own_functions_are_schemes_too():
    layer = nn.Linear(4, 4)
    initialize(layer, nn.init.uniform_, generator=seeded())
    assert torch.equal(layer.weight, nn.init.uniform_(torch.empty(4, 4), generator=seeded()))


@pytest.mark.parametrize("scheme", [xavier, he, lecun, orthogonal, truncated_normal, identity])
def test_a_generator_reproduces_every_bit_and_leaves_the_global_one_alone(scheme):
    first, second = zoo(), zoo()
    before = torch.get_rng_state()
    initialize(first, scheme, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    initialize(second, scheme, generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_without_a_generator_the_global_seed_decides():
    layer, reference = nn.Linear(4, 4), torch.empty(4, 4)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        initialize(layer, he)
        torch.manual_seed(3)
        nn.init.kaiming_normal_(reference, nonlinearity="relu")
    assert torch.equal(layer.weight, reference)


def deep(activation, width=256, depth=30):
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), activation())))


def output_second_moment(model):
    with torch.no_grad():
        return float(model(torch.randn(256, 256, generator=seeded(1))).square().mean())


@pytest.mark.parametrize(
    ("scheme", "activation", "bounds"),
    [
        (xavier, nn.Tanh, (0.1, 1.0)),
        (orthogonal, nn.Tanh, (0.1, 1.0)),
        (he, nn.ReLU, (0.25, 4.0)),
        (xavier, nn.ReLU, (0.25, 4.0)),
        (orthogonal, nn.ReLU, (0.25, 4.0)),
        (lecun, nn.SELU, (0.5, 2.0)),
        (functools.partial(truncated_normal, std=0.01), nn.ReLU, (0.0, 1e-20)),
        (functools.partial(truncated_normal, std=0.01), nn.Tanh, (0.0, 1e-20)),
        (functools.partial(he, activation="linear"), nn.ReLU, (0.0, 1e-7)),
    ],
)  # fmt: skip
def test_the_signal_through_thirty_layers(scheme, activation, bounds):
    # The 256 x 256 weights of 30 layers make the log of the second moment wander by about 0.5 (one standard error).
    model = deep(activation)
    initialize(model, scheme, generator=seeded())
    low, high = bounds
    assert low <= output_second_moment(model) <= high


def test_rejects_what_is_not_a_module():
    with pytest.raises(TypeError, match=r"initialize\(model=Tensor\): model must be a torch\.nn\.Module\."):
        initialize(torch.empty(2, 2), he)


def test_rejects_what_is_not_a_function():
    with pytest.raises(TypeError, match=r"initialize\(scheme='he'\): scheme must be a function that fills a tensor\."):
        initialize(nn.Linear(2, 2), "he")


@pytest.mark.parametrize(
    "scheme", [lsuv, depth_scaled, functools.partial(depth_scaled, num_layers=2)], ids=["lsuv", "depth", "partial"]
)
def test_rejects_a_scheme_for_whole_models(scheme):
    with pytest.raises(TypeError, match=r"initialize\(scheme=\w+.*\): \w+.* works on a whole model; call "):
        initialize(nn.Linear(2, 2), scheme)


def test_rejects_an_infinite_forget_bias():
    with pytest.raises(ValueError, match=r"initialize\(forget_bias=inf\): forget_bias must be in \(-inf, inf\)\."):
        initialize(nn.LSTM(2, 2), he, forget_bias=float("inf"))
