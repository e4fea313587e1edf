# SPDX-License-Identifier: Apache-2.0
"""Schedule-free AdamW against an explicit implementation (Defazio et al. 2024, Algorithm 1)."""

import pytest
import torch

from lightning_optkit.optimizers import ScheduleFreeAdamW

HYPERPARAMETERS = [
    dict(lr=0.05),
    dict(lr=0.05, betas=(0.5, 0.9), weight_decay=0.1, eps=1e-6),
    dict(lr=0.05, warmup_steps=20, r=1.0),
    dict(lr=0.05, warmup_steps=100, weight_lr_power=0.0, weight_decay=0.1),
]


def written_out(
    values,
    gradients,
    lr,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    warmup_steps=0,
    r=0.0,
    weight_lr_power=2.0,
):
    """x, y, z of the paper, each kept by itself."""
    b1, b2 = betas
    x, z, v = values.clone(), values.clone(), torch.zeros_like(values)
    weights = 0.0
    for t, g in enumerate(gradients, start=1):
        y = (1 - b1) * z + b1 * x
        v = b2 * v + (1 - b2) * g**2
        gamma = lr * (1 - b2**t) ** 0.5 * min(1.0, t / warmup_steps if warmup_steps else 1.0)
        z = z - gamma * g / (v.sqrt() + eps) - gamma * weight_decay * y
        weight = t**r * gamma**weight_lr_power
        weights += weight
        x = (1 - weight / weights) * x + weight / weights * z
    return x, (1 - b1) * z + b1 * x, z


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (16, 33)], ids=str)
def test_follows_the_algorithm_of_the_paper(shape, hyperparameters, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=torch.float64), torch.randn(50, *shape, dtype=torch.float64)
    p = values.clone().requires_grad_()
    optimizer = ScheduleFreeAdamW([p], **hyperparameters, fused=fused)
    optimizer.train()
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    x, y, z = written_out(values, gradients, **hyperparameters)
    torch.testing.assert_close(p.detach(), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(optimizer.state[p]["z"], z, rtol=1e-12, atol=1e-12)
    optimizer.eval()
    torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize(
    ("state_dtype", "dtype", "tolerance"),
    [(torch.bfloat16, torch.bfloat16, 0.01), ("int8", torch.uint8, 0.05)],  # relative errors of 2^-9 and 1/8
    ids=str,
)
def test_z_is_kept_in_full_beside_a_narrow_second_moment(state_dtype, dtype, tolerance, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(300), torch.randn(20, 300)
    p = values.clone().requires_grad_()
    optimizer = ScheduleFreeAdamW([p], lr=0.05, eps=1e-2, state_dtype=state_dtype, fused=fused)
    optimizer.train()
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    state = optimizer.state[p]
    assert (state["z"].dtype, state["exp_avg_sq"].dtype) == (torch.float32, dtype)
    _, y, z = written_out(values.double(), gradients.double(), lr=0.05, eps=1e-2)
    torch.testing.assert_close(p.detach().double(), y, rtol=0, atol=tolerance)
    torch.testing.assert_close(state["z"].double(), z, rtol=0, atol=tolerance)


def as_in_the_package(values, gradients, lr, betas, eps=1e-8, weight_decay=0.0):
    """x of schedulefree 1.4.1 (AdamWScheduleFree.step, foreach=False): the correction is in the second moment alone."""
    b1, b2 = betas
    y, z, v, weights = values.clone(), values.clone(), torch.zeros_like(values), 0.0
    for t, g in enumerate(gradients, start=1):
        v = b2 * v + (1 - b2) * g**2
        direction = g / ((v / (1 - b2**t)).sqrt() + eps) + weight_decay * y
        weights += lr**2
        share = lr**2 / weights
        y = y + share * (z - y) + lr * (b1 * (1 - share) - 1) * direction
        z = z - lr * direction
    return y + (1 - 1 / b1) * (z - y)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize(("beta2", "is_the_same"), [(0.0, True), (0.5, False), (0.999, False)])
def test_differs_from_the_package_by_the_bias_correction_alone(beta2, is_the_same, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(40, dtype=torch.float64), torch.randn(60, 40, dtype=torch.float64) + 0.3
    given = dict(lr=0.01, betas=(0.8, beta2), weight_decay=0.1)
    p = values.clone().requires_grad_()
    optimizer = ScheduleFreeAdamW([p], **given, fused=fused)
    optimizer.train()
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    optimizer.eval()
    x, package = written_out(values, gradients, **given)[0], as_in_the_package(values, gradients, **given)
    torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)
    difference = (package - x).norm() / (x - values).norm()
    assert difference < 1e-12 if is_the_same else 1e-3 < difference < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_dict_without_the_point_of_the_gradients_gives_it_back(dtype):
    torch.manual_seed(0)
    weight = torch.randn(50, dtype=dtype, requires_grad=True)
    optimizer = ScheduleFreeAdamW([weight], lr=0.1)
    optimizer.train()
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    trained = weight.detach().clone()
    optimizer.eval()
    saved = optimizer.state_dict()
    saved["state"] = {0: {name: value for name, value in saved["state"][0].items() if name != "y"}}
    loaded = weight.detach().clone().requires_grad_()
    other = ScheduleFreeAdamW([loaded], lr=0.1)
    other.load_state_dict(saved)
    other.train()
    torch.testing.assert_close(loaded.detach(), trained)
    other.train()
    torch.testing.assert_close(loaded.detach(), trained)


def test_a_step_at_a_rate_of_zero_only_makes_room_for_state():
    weight = torch.ones(5, requires_grad=True)
    optimizer = ScheduleFreeAdamW([weight], lr=0.0)
    weight.grad = torch.zeros(5)
    optimizer.step()
    assert optimizer.state[weight].keys() >= {"exp_avg_sq", "z", "step"}
    assert weight.tolist() == [1.0] * 5
    with pytest.raises(RuntimeError, match="the parameters hold the average"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="the parameters hold the average"):
        optimizer.step()
