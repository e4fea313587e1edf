# SPDX-License-Identifier: Apache-2.0
"""lsuv: unit variance after every layer, and no side effects."""

import pytest
import torch
from torch import nn

from lightning_optkit.init import activation_statistics, he, initialize, lsuv, truncated_normal


def batch(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def seeded():
    return torch.Generator().manual_seed(0)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.ConvTranspose2d(8, 6, 3, groups=2),
        nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, 5),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(*(m for _ in range(30) for m in (nn.Linear(64, 64), nn.ReLU()))), (256, 64)),
        (nn.Sequential(*(m for _ in range(30) for m in (nn.Linear(64, 64), nn.Tanh()))), (256, 64)),
        (convolutional(), (32, 3, 8, 8)),
    ],
    ids=["relu", "tanh", "conv"],
)
def test_every_layer_puts_out_unit_variance(model, shape):
    rows = lsuv(model, batch(*shape), generator=seeded())
    seen = [row for row in activation_statistics(model, batch(*shape)) if row.kind not in ("ReLU", "Tanh")]
    variances = [row.variance for row in seen if row.kind.startswith(("Linear", "Conv"))]
    assert len(variances) == sum(row.parameter == "weight" and row.scheme.startswith("lsuv") for row in rows) >= 3
    assert variances == pytest.approx([1] * len(variances), abs=0.011)  # tolerance 0.01 and rounding


def test_a_layer_stays_orthogonal_up_to_its_scale():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    rows = lsuv(model, batch(64, 8), generator=seeded())
    assert rows[2].scheme.startswith("lsuv, times scaled: 1, ")  # without bias the first scaling is exact
    product = model[2].weight.detach() @ model[2].weight.detach().T
    torch.testing.assert_close(product, torch.eye(8) * product[0, 0], atol=1e-4, rtol=1e-4)
    assert abs(product[0, 0] - 1) > 0.1  # a ReLU came before: it had to be scaled


def test_modes_buffers_hooks_and_random_state_are_put_back():
    model = convolutional()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    state = torch.get_rng_state()
    lsuv(model, batch(32, 3, 8, 8), generator=seeded())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_everything_is_put_back_after_an_error_too():
    model = convolutional()
    with pytest.raises(RuntimeError):
        lsuv(model, batch(2, 4, 8, 8))
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_the_same_generator_gives_the_same_weights():
    first, second = convolutional(), convolutional()
    lsuv(first, batch(32, 3, 8, 8), generator=seeded())
    lsuv(second, batch(32, 3, 8, 8), generator=seeded())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_start_none_scales_the_weights_there_are_and_keeps_their_biases():
    layer = nn.Linear(8, 8)
    initialize(layer, he, generator=seeded())
    before = layer.weight.detach().clone()
    layer.bias.data.copy_(torch.linspace(-1, 1, 8))
    rows = lsuv(layer, batch(512, 8), start=None)
    assert float(layer(batch(512, 8)).detach().var(correction=0)) == pytest.approx(1, abs=0.011)
    ratio = layer.weight.detach() / before
    torch.testing.assert_close(ratio, ratio[0, 0].expand(8, 8), rtol=1e-4, atol=0)
    assert torch.equal(layer.bias.detach(), torch.linspace(-1, 1, 8))
    assert [row.parameter for row in rows] == ["weight"] and not rows[0].scheme.startswith("lsuv, times scaled: 1,")


def test_max_iterations_ends_the_scaling_and_the_row_says_where_it_stands():
    layer = nn.Linear(8, 8)
    initialize(layer, he, generator=seeded())
    layer.bias.data.copy_(torch.linspace(-5, 5, 8))  # the bias alone has more than unit variance
    row = lsuv(layer, batch(64, 8), start=None, max_iterations=2)[0]
    assert row.scheme.startswith("lsuv, times scaled: 2, output variance: ")
    assert float(row.scheme.rsplit(maxsplit=1)[-1]) > 5


def test_a_shared_layer_is_scaled_at_its_first_use():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    lsuv(model, batch(256, 8), generator=seeded())
    assert float(layer(batch(256, 8)).detach().var(correction=0)) == pytest.approx(1, abs=0.011)


def test_layers_that_never_run_keep_their_start():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    rows = lsuv(model, batch(64, 8), forward=lambda model, x: model["used"](x))
    assert [row.scheme.split(",")[0] for row in rows if row.parameter == "weight"] == ["lsuv", "orthogonal"]


def test_any_other_start():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    lsuv(model, batch(256, 8), start=truncated_normal)
    assert float(model(batch(256, 8)).detach().var(correction=0)) == pytest.approx(1, abs=0.011)


def test_rejects_a_batch_on_which_a_layer_is_constant():
    with pytest.raises(
        ValueError, match=r"lsuv\(batch\): the output of layer '0' must vary and be finite, its varianc"
    ):
        lsuv(nn.Sequential(nn.Linear(4, 4)), torch.zeros(8, 4))


def test_rejects_a_batch_that_is_not_finite():
    with pytest.raises(ValueError, match=r"lsuv\(batch\): the output of layer '0' must vary and be finite.* nan\."):
        lsuv(nn.Sequential(nn.Linear(4, 4)), torch.full((8, 4), float("nan")))


def test_rejects_a_forward_that_runs_no_layer():
    with pytest.raises(ValueError, match=r"lsuv\(forward\): forward must run at least one Linear, Bilinear or"):
        lsuv(nn.Linear(4, 4), batch(8, 4), forward=lambda model, x: x)


@pytest.mark.parametrize(
    ("argument", "value", "requirement"),
    [
        ("tolerance", 0, r"tolerance must be in \(0, inf\)\."),
        ("max_iterations", 0, r"max_iterations must be an integer"),
    ],
)
def test_rejects_numbers_out_of_range(argument, value, requirement):
    with pytest.raises(ValueError, match=rf"lsuv\({argument}=0\): {requirement}"):
        lsuv(nn.Linear(4, 4), batch(8, 4), **{argument: value})


def test_rejects_the_meta_device():
    with pytest.raises(ValueError, match=r"lsuv\(model with 'weight' on the meta device\)"):
        lsuv(nn.Linear(4, 4, device="meta"), batch(8, 4))
