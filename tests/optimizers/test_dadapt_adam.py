# SPDX-License-Identifier: Apache-2.0
"""DAdaptAdam against an explicit implementation (Defazio & Mishchenko 2023, the Adam version)."""

import copy
import math

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import DAdaptAdam
from lightning_optkit.step import step_in_backward

HYPERPARAMETERS = [
    dict(),
    dict(lr=0.5, betas=(0.8, 0.9), eps=1e-3, d0=1e-3),
    dict(weight_decay=0.1, decouple=True, use_bias_correction=True, d0=1e-2),
    dict(weight_decay=0.1, lr=0.3, d0=1e-3, betas=(0.0, 0.5)),
    dict(growth_rate=1.02, d0=1e-2, betas=(0.5, 0.8)),
]
SHAPES = [(), (7,), (4, 5)]


def written_out(
    x,
    gradient,
    steps,
    lr=1.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    decouple=False,
    use_bias_correction=False,
    d0=1e-6,
    growth_rate=math.inf,
):
    """The authors' x, d and state, all parameters as one vector."""
    beta1, beta2 = betas
    root = math.sqrt(beta2)
    m, v, s = (torch.zeros_like(x) for _ in range(3))
    r, d, estimates = 0.0, d0, []
    for k in range(1, steps + 1):
        g = gradient(k, x)
        g = g if decouple else g + weight_decay * x
        gamma = d * lr * (math.sqrt(1 - beta2**k) / (1 - beta1**k) if use_bias_correction else 1.0)
        r = root * r + (1 - root) * gamma * float(g @ (s / (v.sqrt() + eps)))
        m = beta1 * m + (1 - beta1) * gamma * g
        v = beta2 * v + (1 - beta2) * g**2
        s = root * s + (1 - root) * gamma * g
        if decouple:
            x = x - gamma * weight_decay * x
        x = x - m / (v.sqrt() + eps)
        d = max(d, min(r / ((1 - root) * float(s.abs().sum())), d * growth_rate))
        estimates.append(d)
    return x, estimates, dict(exp_avg=m, exp_avg_sq=v, s=s)


def pull(num, dtype=torch.float64):
    """Where a vector starts, and the noisy gradient that pulls it a distance of about 1 away."""
    generator = torch.Generator().manual_seed(1)
    values, target = torch.randn(2, num, generator=generator, dtype=torch.float64).to(dtype)
    noise = 0.1 * torch.randn(256, num, generator=generator, dtype=torch.float64).to(dtype)
    return values, lambda k, x: x.detach().reshape(-1) - target.to(x.dtype) + noise[k].to(x.dtype)


def parts_of(vector, shapes=SHAPES):
    parts = vector.split([math.prod(shape) for shape in shapes])
    return [part.clone().view(shape) for part, shape in zip(parts, shapes, strict=True)]


def stepped(optimizer, gradient, steps, first=1):
    """The estimate after each step."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    estimates = []
    for k in range(first, first + steps):
        g = gradient(k, torch.cat([p.detach().reshape(-1) for p in params]))
        for p, part in zip(params, parts_of(g, [p.shape for p in params]), strict=True):
            p.grad = part
        optimizer.step()
        estimates.append(float(optimizer.param_groups[-1]["d"]))
    return estimates


def in_two_groups(values, **kwargs):
    params = [part.requires_grad_() for part in parts_of(values)]
    return params, DAdaptAdam([dict(params=params[:2]), dict(params=params[2:])], **kwargs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=str)
@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS, ids=str)
def test_follows_the_authors_recursion_over_200_steps(hyperparameters, dtype, tolerance):
    values, gradient = pull(28, dtype)
    params, optimizer = in_two_groups(values, **hyperparameters)
    estimates = stepped(optimizer, gradient, 200)
    x, expected, state = written_out(values.double(), gradient, 200, **hyperparameters)
    assert expected[-1] > 1.5 * expected[0]  # it did grow
    assert estimates == pytest.approx(expected, rel=tolerance)
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in params]).double(), x, rtol=0, atol=tolerance)
    for name, value in state.items():
        held = torch.cat([optimizer.state[p][name].reshape(-1) for p in params]).double()
        torch.testing.assert_close(held, value, rtol=0, atol=tolerance * float(value.abs().max()), msg=name)


def test_the_estimate_never_falls_and_is_one_tensor_of_all_groups():
    values, gradient = pull(28)
    _, optimizer = in_two_groups(values, d0=1e-3)
    estimates = stepped(optimizer, gradient, 50)
    assert estimates == sorted(estimates)
    first, second = (group["d"] for group in optimizer.param_groups)
    assert first is second and first.dtype == torch.float64 and first.dim() == 0


def test_a_state_dict_continues_the_same_bits():
    values, gradient = pull(28, torch.float32)
    params, whole = in_two_groups(values, d0=1e-3, average=EMA(0.9))
    stepped(whole, gradient, 10)
    others, resumed = in_two_groups(torch.cat([p.detach().reshape(-1) for p in params]), average=EMA(0.9))
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert stepped(whole, gradient, 10, first=11) == stepped(resumed, gradient, 10, first=11)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert all(torch.equal(whole.state[p]["ema"], resumed.state[q]["ema"]) for p, q in zip(params, others, strict=True))


def test_a_skipped_step_and_one_without_gradients_teach_nothing():
    values, gradient = pull(28)
    params, optimizer = in_two_groups(values, d0=1e-3, clip=ClipNorm(1e9))
    stepped(optimizer, gradient, 5)
    before = copy.deepcopy((optimizer.state_dict(), params))
    for p in params:
        p.grad = torch.full_like(p, math.inf)
    optimizer.step()
    assert optimizer.num_skipped == 1
    for name in ("d", "d_numerator"):
        assert optimizer.param_groups[0][name] == before[0]["param_groups"][0][name]
    assert all(torch.equal(p, q) for p, q in zip(params, before[1], strict=True))

    fresh = torch.nn.Parameter(torch.ones(3))
    idle = DAdaptAdam([fresh])
    fresh.grad = torch.zeros(3)
    idle.step()
    assert (float(idle.param_groups[0]["d"]), float(idle.param_groups[0]["d_numerator"])) == (1e-6, 0.0)
    assert torch.equal(fresh.detach(), torch.ones(3))


def test_a_group_at_a_rate_of_0_stays_and_two_other_rates_are_refused():
    values, gradient = pull(28)
    params, optimizer = in_two_groups(values, d0=1e-2)
    optimizer.param_groups[0]["lr"] = 0.0
    stepped(optimizer, gradient, 3)
    start = parts_of(values)
    assert [torch.equal(p.detach(), q) for p, q in zip(params, start, strict=True)] == [True, True, False]
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(
        ValueError, match=r"^DAdaptAdam\.step: groups have the rates \[0\.5, 1\.0\]; the estimate needs"
    ):
        optimizer.step()


def test_groups_with_other_settings_of_the_estimate_are_refused():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    for name, value in (("d0", 0.1), ("betas", (0.9, 0.5)), ("growth_rate", 2.0), ("use_bias_correction", True)):
        with pytest.raises(ValueError, match=r"^DAdaptAdam\(.*must be .* in all groups\.$"):
            DAdaptAdam([dict(params=params[:1]), {"params": params[1:], name: value}])


def test_it_cannot_step_inside_the_backward_pass_and_says_where_it_runs():
    param = torch.nn.Parameter(torch.ones(2))
    optimizer = DAdaptAdam([param], weight_decay=0.1, decouple=True)
    with pytest.raises(ValueError, match="DAdaptAdam"):
        step_in_backward(optimizer)
    (plan,) = optimizer.explain().groups
    assert plan.path == "reference: no kernel that estimates before it updates"
    assert plan.stages == ("update", "estimate", "decay(0.1)")
