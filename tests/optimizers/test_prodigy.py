# SPDX-License-Identifier: Apache-2.0
"""Prodigy against an explicit implementation (Mishchenko & Defazio 2024, Prodigy (Adam version))."""

import copy
import math

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import Prodigy
from lightning_optkit.step import step_in_backward

CHUNK = 16384  # elements: kChunk of csrc/core/tables.h
PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
HYPERPARAMETERS = [
    dict(),
    dict(lr=0.5, betas=(0.8, 0.9), beta3=0.7, eps=1e-3, d0=1e-3),
    dict(weight_decay=0.1, use_bias_correction=True, d0=1e-2),
    dict(weight_decay=0.1, decouple=False, safeguard_warmup=True, lr=0.3, d0=1e-3),
    dict(d_coef=2.0, growth_rate=1.5, d0=1e-2),
]


def written_out(
    values,
    gradient,
    steps,
    lr=1.0,
    betas=(0.9, 0.999),
    beta3=None,
    eps=1e-8,
    weight_decay=0.0,
    decouple=True,
    use_bias_correction=False,
    safeguard_warmup=False,
    d0=1e-6,
    d_coef=1.0,
    growth_rate=math.inf,
    slice_p=1,
):
    """The paper's x, d and state, all parameters as one vector; each option is where the authors' package has it.

    `gradient(k, x)` is that of step k. r and s have the factor 1 - sqrt(beta2) of the paper; the optimizer's lack it,
    and are divided by d0.
    """
    beta1, beta2 = betas
    root = math.sqrt(beta2) if beta3 is None else beta3
    x, start = values.clone(), values.clone()
    m, v, s = (torch.zeros_like(values) for _ in range(3))
    r, d, d_max, estimates = 0.0, d0, d0, []
    seen = slice(None, None, slice_p)
    for k in range(1, steps + 1):
        g = gradient(k, x)
        g = g if decouple else g + weight_decay * x
        gamma = lr * (math.sqrt(1 - beta2**k) / (1 - beta1**k) if use_bias_correction else 1.0)
        m = beta1 * m + (1 - beta1) * d * g
        v = beta2 * v + (1 - beta2) * d**2 * g**2
        r = root * r + (1 - root) * gamma * d**2 * (g[seen] @ (start - x)[seen])
        s = root * s + (1 - root) * (1.0 if safeguard_warmup else gamma) * d**2 * g
        if decouple:
            x = x - gamma * d * weight_decay * x
        x = x - gamma * d * m / (v.sqrt() + d * eps)
        d_hat = d_coef * r / s[seen].abs().sum()
        jump = max(d, d_hat) if d == d0 else d
        d_max = max(d_max, d_hat)
        d = min(d_max, jump * growth_rate)
        estimates.append(float(d))
    return x, estimates, dict(exp_avg=m, exp_avg_sq=v, s=s / ((1 - root) * d0), p0=start)


def pull(num, dtype=torch.float64):
    """Where a vector starts, and the noisy gradient that pulls it a distance of about 1 away."""
    generator = torch.Generator().manual_seed(1)
    values, target = torch.randn(2, num, generator=generator, dtype=torch.float64).to(dtype)
    noise = 0.1 * torch.randn(64, num, generator=generator, dtype=torch.float64).to(dtype)
    return values, lambda k, x: x.detach().reshape(-1) - target.to(x.dtype) + noise[k].to(x.dtype)


def run(optimizer, p, gradient, steps):
    """The estimate after each step."""
    estimates = []
    for k in range(1, steps + 1):
        p.grad = gradient(k, p).view(p.shape)
        optimizer.step()
        estimates.append(float(optimizer.param_groups[0]["d"]))
    return estimates


def parts_of(vector, shapes):
    sizes = [math.prod(shape) for shape in shapes]
    return [part.clone().view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]


@PATHS
@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS, ids=str)
def test_follows_the_algorithm_of_the_paper(hyperparameters, fused):
    shapes = [(), (7,), (16, 33), (3, CHUNK // 2)]
    values, gradient = pull(sum(map(math.prod, shapes)))
    params = [part.requires_grad_() for part in parts_of(values, shapes)]
    optimizer = Prodigy([dict(params=params[:2]), dict(params=params[2:])], **hyperparameters, fused=fused)
    estimates = []
    for k in range(1, 41):
        g = gradient(k, torch.cat([p.detach().reshape(-1) for p in params]))
        for p, part in zip(params, parts_of(g, shapes), strict=True):
            p.grad = part
        optimizer.step()
        estimates.append(float(optimizer.param_groups[1]["d"]))
    x, expected, state = written_out(values, gradient, 40, **hyperparameters)
    assert expected[-1] > 3 * expected[0]  # it did grow
    assert estimates == pytest.approx(expected, rel=1e-10)
    for p, part in zip(params, parts_of(x, shapes), strict=True):
        torch.testing.assert_close(p.detach(), part, rtol=0, atol=1e-10)
    for name, value in state.items():
        held = torch.cat([optimizer.state[p][name].reshape(-1) for p in params])
        torch.testing.assert_close(held, value, rtol=0, atol=1e-10 * float(value.abs().max()), msg=name)


@PATHS
@pytest.mark.parametrize(("scale", "grad_scale"), [(1e-20, 1e20), (1e20, 1e-20), (1e8, 1e8), (1e-25, 1e15)])
def test_the_estimate_in_single_precision_at_any_scale_of_weights_and_gradients(scale, grad_scale, fused):
    values, gradient = pull(2000)
    estimates = []
    for dtype in (torch.float32, torch.float64):
        p = (values * scale).to(dtype).requires_grad_()
        optimizer = Prodigy([p], d0=1e-2 * scale, eps=0.0, fused=fused)
        estimates.append(run(optimizer, p, lambda k, x: (gradient(k, x.double() / scale) * grad_scale).to(x.dtype), 20))
    assert estimates[1][-1] > 10 * 1e-2 * scale
    assert estimates[0] == pytest.approx(estimates[1], rel=1e-3)


@PATHS
def test_follows_it_in_single_precision_to_rounding(fused):
    values, gradient = pull(CHUNK + 37, torch.float32)
    p = values.clone().requires_grad_()
    # A large eps: the direction of an element whose gradient is about zero would be its rounding error.
    estimates = run(Prodigy([p], d0=1e-3, eps=0.1, fused=fused), p, gradient, 40)
    x, expected, _ = written_out(values.double(), gradient, 40, d0=1e-3, eps=0.1)
    assert estimates == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=1e-4)


def test_every_slice_p_th_element_makes_the_estimate():
    values, gradient = pull(50)
    p = values.view(10, 5).t().contiguous().t().requires_grad_()  # by the order of the elements, not of memory
    optimizer = Prodigy([p], d0=1e-3, slice_p=7)
    estimates = run(optimizer, p, gradient, 30)
    x, expected, _ = written_out(values, gradient, 30, d0=1e-3, slice_p=7)
    assert estimates == pytest.approx(expected, rel=1e-11)
    torch.testing.assert_close(p.detach().reshape(-1), x, rtol=1e-11, atol=1e-11)
    assert optimizer.state[p]["s"].shape == optimizer.state[p]["p0"].shape == (8,)
    assert "reference: slice_p=7 leaves elements out" in str(optimizer.explain())


def test_a_complex_parameter_is_its_pairs():
    values, gradient = pull(20)
    p, q = torch.view_as_complex(values.view(10, 2)).clone().requires_grad_(), values.clone().requires_grad_()
    ours, pairs = Prodigy([p], d0=1e-3), Prodigy([q], d0=1e-3)
    for k in range(1, 21):
        q.grad = gradient(k, q)
        p.grad = torch.view_as_complex(gradient(k, torch.view_as_real(p)).view(10, 2))
        ours.step()
        pairs.step()
    torch.testing.assert_close(torch.view_as_real(p.detach()).view(20), q.detach(), rtol=0, atol=1e-12)


def test_a_slice_of_a_complex_parameter_keeps_both_parts():
    p = torch.ones(10, dtype=torch.complex64).requires_grad_()
    p.grad = torch.arange(10) * (1 - 2j)
    optimizer = Prodigy([p], d0=0.5, slice_p=3)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["s"], 0.5 * p.grad[::3])


def test_resumes_bit_for_bit_with_8_bit_state_and_slices(resumes):
    resumes(lambda params: Prodigy(params, d0=1e-3, state_dtype="int8"), torch.float32)
    resumes(lambda params: Prodigy(params, d0=1e-3, slice_p=3), torch.float32)


def test_a_resumed_estimate_is_one_tensor_again_and_a_number_put_in_by_hand_counts():
    p, q = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = Prodigy([dict(params=[p]), dict(params=[q])], d0=1e-3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["d"] = 0.25
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    first, second = optimizer.param_groups
    assert first["d"] is second["d"]
    torch.testing.assert_close(p.detach(), torch.full((3,), 1 - 0.25 * 0.1 / 0.001**0.5))


def test_bits_do_not_depend_on_the_number_of_threads(snapshot, threads):
    seen = []
    for count in (1, 2):
        threads(count)
        values, gradient = pull(5 * CHUNK + 3, torch.float32)
        p = values.clone().requires_grad_()
        optimizer = Prodigy([p], d0=1e-2, clip=ClipNorm(10.0), average=EMA(0.9), statistics=True)
        run(optimizer, p, gradient, 4)
        seen.append(snapshot(optimizer))
    assert seen[0] == seen[1]


@PATHS
def test_a_skipped_step_leaves_the_estimate_and_everything_else(snapshot, fused):
    values, gradient = pull(9)
    p = values.clone().requires_grad_()
    optimizer = Prodigy([p], d0=1e-3, fused=fused, clip=ClipNorm(1e9))
    run(optimizer, p, gradient, 3)
    before = snapshot(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert snapshot(optimizer) == before
    del optimizer.found_inf
    p.grad = torch.full_like(p, math.nan)
    nan = snapshot(optimizer)
    optimizer.step()
    assert snapshot(optimizer) == nan
    assert optimizer.num_skipped == 2


def test_a_step_that_the_device_skipped_observed_nothing_and_leaves_the_estimate(frozen):
    values, gradient = pull(9)
    p = values.clone().requires_grad_()
    optimizer = Prodigy([p], d0=1e-3)
    run(optimizer, p, gradient, 5)
    before = frozen(optimizer.state_dict()["param_groups"])
    optimizer._learn(torch.zeros(2, dtype=torch.float64))
    assert frozen(optimizer.state_dict()["param_groups"]) == before


@PATHS
def test_gradients_of_zero_and_a_first_rate_of_zero_leave_the_estimate(fused):
    p = torch.ones(4, requires_grad=True)
    optimizer = Prodigy([p], d0=1e-3, fused=fused)
    p.grad = torch.zeros(4)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = torch.ones(4)
    optimizer.step()
    assert p.tolist() == [1.0] * 4
    assert float(optimizer.param_groups[0]["d"]) == 1e-3
    assert not optimizer.state[p]["s"].any()


@PATHS
def test_a_group_at_rate_zero_stays_and_does_not_count(fused):
    values, gradient = pull(12)
    trained, alone, frozen = (values.clone().requires_grad_() for _ in range(3))
    both = Prodigy([dict(params=[trained]), dict(params=[frozen], lr=0.0)], d0=1e-3, fused=fused)
    one = Prodigy([alone], d0=1e-3, fused=fused)
    for k in range(1, 21):
        trained.grad, alone.grad, frozen.grad = gradient(k, trained), gradient(k, alone), -gradient(k, alone)
        both.step()
        one.step()
    assert float(both.param_groups[0]["d"]) == float(one.param_groups[0]["d"]) > 2e-3
    torch.testing.assert_close(trained, alone, rtol=0, atol=0)
    assert torch.equal(frozen.detach(), values)


def test_a_parameter_that_comes_later_takes_the_estimate_as_it_is():
    values, gradient = pull(12, torch.float32)
    p = values.clone().requires_grad_()
    optimizer = Prodigy([p], d0=1e-3)
    d = run(optimizer, p, gradient, 10)[-1]
    late = torch.ones(3, requires_grad=True)
    optimizer.add_param_group(dict(params=[late]))
    late.grad, p.grad = torch.ones(3), gradient(11, p)
    optimizer.step()
    torch.testing.assert_close(late.detach(), torch.full((3,), 1 - d * 0.1 / 0.001**0.5))


@pytest.mark.parametrize(
    ("state_dtype", "dtype", "per_element"),
    [(torch.float32, torch.float32, 16), (torch.bfloat16, torch.bfloat16, 10), ("int8", torch.uint8, 7)],
    ids=str,
)
def test_where_it_started_is_kept_in_full_beside_narrow_averages(state_dtype, dtype, per_element):
    p = torch.randn(1280).requires_grad_()
    start = p.detach().clone()
    optimizer = Prodigy([p], d0=1e-2, state_dtype=state_dtype)
    for _ in range(3):
        p.grad = torch.ones(1280)
        optimizer.step()
    state = optimizer.state[p]
    assert torch.equal(state["p0"], start)
    assert {state[name].dtype for name in ("exp_avg", "exp_avg_sq", "s")} == {dtype}
    held = sum(state[name].numel() * state[name].itemsize for name in ("exp_avg", "exp_avg_sq", "s", "p0"))
    assert held == per_element * 1280


def test_explain_tells_of_the_estimate_and_of_what_is_only_read():
    (plan,) = Prodigy([torch.ones(3, requires_grad=True)]).explain().groups
    assert (plan.stages, plan.bytes_per_element) == (("update", "estimate"), 12 + 3 * 8 + 4)


def test_cannot_step_inside_the_backward_pass():
    message = r"^step_in_backward\(Prodigy\): its rate is learned of all gradients, which are never there together\.$"
    with pytest.raises(ValueError, match=message):
        step_in_backward(Prodigy([torch.ones(1, requires_grad=True)]))


def test_evaluates_a_closure():
    p = torch.tensor([3.0], requires_grad=True)
    optimizer = Prodigy([p], d0=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[0] == 9.0 > losses[1] > losses[2]


def test_learns_the_digits_without_a_rate(digits_loss):
    found = []
    loss = digits_loss(Prodigy, evaluate=lambda optimizer: found.append(float(optimizer.param_groups[0]["d"])))
    assert loss < 0.06  # 0.05 when this was written
    assert 1e-2 < found[0] < 1


def test_refuses_groups_that_cannot_share_an_estimate():
    p, q = (torch.ones(1, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match=r"^Prodigy\(d0=0\.5\): d0 must be 1e-06 in all groups\.$"):
        Prodigy([dict(params=[p]), dict(params=[q], d0=0.5)])
    p.grad = torch.ones(1)
    optimizer = Prodigy([dict(params=[p]), dict(params=[q], lr=0.5)])
    with pytest.raises(ValueError, match=r"^Prodigy\.step: groups have the rates \[0\.5, 1\.0\]; the estimate needs "):
        optimizer.step()
    assert p.item() == 1.0


@pytest.mark.parametrize("entry", ["d", "d_max", "d_numerator"])
@pytest.mark.parametrize("loads", [False, True], ids=["set by hand", "loaded"])
def test_an_estimate_in_a_tensor_of_one_element_is_taken_at_its_value(entry, loads):
    def stepped(form):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = Prodigy([p])
        for step in range(3):
            if step == 1:
                state_dict = optimizer.state_dict() if loads else None
                group = state_dict["param_groups"][0] if loads else optimizer.param_groups[0]
                group[entry] = form(float(group[entry]))
                if loads:
                    optimizer.load_state_dict(state_dict)
            p.grad = torch.full((3,), 0.5)
            optimizer.step()
        return p.detach(), optimizer.param_groups[0]["d"]

    for found, expected in zip(stepped(lambda v: torch.tensor([[v]])), stepped(lambda v: v), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
