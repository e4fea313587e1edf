# SPDX-License-Identifier: Apache-2.0
"""Cautious updates against the formula in fp64, on rules of every kind."""

import copy
import math
import re

import pytest
import torch

from lightning_optkit import optimizers
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipValue
from lightning_optkit.optimizers import ADOPT, LAMB, SGD, SOAP, Adafactor, AdamW, Adan, Lion, Muon, Prodigy, StableAdamW
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.caution import cautious_update
from lightning_optkit.step.shards import why_gathered

STEPS, RATE, DECAY = 200, 0.02, 0.1


def masked(update, grad):
    """Algorithm 1 of Liang et al., with the bound of the authors' code."""
    mask = (update * grad > 0).to(update.dtype)
    return update * mask / mask.mean().clamp(min=1e-3)


def adamw(p, g, s, t, beta1=0.8, beta2=0.95, eps=1e-3):
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g * g
    update = s["m"] / (1 - beta1**t) / ((s["v"] / (1 - beta2**t)).sqrt() + eps)
    return p - RATE * DECAY * p - RATE * masked(update, g)


def lion(p, g, s, t, beta1=0.8, beta2=0.95):
    m = s.get("m", torch.zeros_like(g))
    s["m"] = beta2 * m + (1 - beta2) * g
    return p - RATE * DECAY * p - RATE * masked((beta1 * m + (1 - beta1) * g).sign(), g)


def nesterov(p, g, s, t, momentum=0.7):
    g = g + DECAY * p  # L2 is part of what the rule sees
    s["b"] = momentum * s["b"] + g if "b" in s else g
    return p - RATE * masked(g + momentum * s["b"], g)


def lamb(p, g, s, t, beta1=0.8, beta2=0.95, eps=1e-3):
    s["m"] = beta1 * s.get("m", 0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0) + (1 - beta2) * g * g
    r = masked(s["m"] / (1 - beta1**t) / ((s["v"] / (1 - beta2**t)).sqrt() + eps), g) + DECAY * p
    return p - RATE * p.norm() / r.norm() * r


def adopt(p, g, s, t, beta1=0.8, beta2=0.95, eps=1e-3):
    if t == 1:
        s["m"], s["v"] = torch.zeros_like(g), g * g
        return p
    s["m"] = beta1 * s["m"] + (1 - beta1) * (g / s["v"].sqrt().clamp(min=eps)).clamp(
        -((t - 1) ** 0.25), (t - 1) ** 0.25
    )
    s["v"] = beta2 * s["v"] + (1 - beta2) * g * g
    return p - RATE * DECAY * p - RATE * masked(s["m"], g)


def stable_adamw(p, g, s, t, beta1=0.8, beta2=0.95, eps=1e-3):
    b1, b2 = beta1 * (1 - beta1 ** (t - 1)) / (1 - beta1**t), beta2 * (1 - beta2 ** (t - 1)) / (1 - beta2**t)
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    rms = (g * g / s["v"].clamp(min=eps * eps)).mean().sqrt().item()
    rate = RATE / max(1, rms)
    return p - rate * DECAY * p - rate * masked(s["m"] / (s["v"].sqrt() + eps), g)


def adan(p, g, s, t, beta1=0.8, beta2=0.7, beta3=0.95, eps=1e-3):
    diff = g - s["g"] if "g" in s else torch.zeros_like(g)
    s["g"], s["m"] = g, beta1 * s.get("m", 0) + (1 - beta1) * g
    s["d"] = beta2 * s.get("d", 0) + (1 - beta2) * diff
    s["n"] = beta3 * s.get("n", 0) + (1 - beta3) * (g + beta2 * diff) ** 2
    update = s["m"] / (1 - beta1**t) + beta2 * s["d"] / (1 - beta2**t)
    update = update / ((s["n"] / (1 - beta3**t)).sqrt() + eps)
    return (p - RATE * masked(update, g)) / (1 + RATE * DECAY)


MOMENTS = dict(betas=(0.8, 0.95), eps=1e-3)
RULES = {
    "AdamW": (AdamW, MOMENTS, adamw),
    "Lion": (Lion, dict(betas=(0.8, 0.95)), lion),
    "SGD": (SGD, dict(momentum=0.7, nesterov=True), nesterov),
    "LAMB": (LAMB, MOMENTS, lamb),
    "ADOPT": (ADOPT, dict(betas=(0.8, 0.95), eps=1e-3, decouple=True), adopt),
    "StableAdamW": (StableAdamW, MOMENTS, stable_adamw),
    "Adan": (Adan, dict(betas=(0.8, 0.7, 0.95), eps=1e-3), adan),
}


def fresh(*shape, dtype=torch.float32, seed=0):
    return torch.nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(shape, steps, dtype=torch.float32):
    """Noise around a mean that changes its sign, so that momentum and gradient disagree in part."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(shape, generator=generator) + math.cos(t / 7)).to(dtype) for t in range(steps)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-4)], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_it_equals_the_formula_over_200_steps(name, dtype, tolerance):
    cls, kwargs, rule = RULES[name]
    param = fresh(6, 5, dtype=dtype)
    optimizer = cls([param], lr=RATE, weight_decay=DECAY, caution=True, **kwargs)
    expected, state = param.detach().clone().double(), {}
    for t, grad in enumerate(gradients((6, 5), STEPS, dtype), start=1):
        param.grad = grad
        optimizer.step()
        expected = rule(expected, grad.double(), state, t)
    torch.testing.assert_close(param.detach().double(), expected, rtol=tolerance, atol=tolerance)


def test_the_mask_keeps_what_agrees_and_scales_it_by_its_share():
    update, grad = torch.tensor([1.0, -2.0, 3.0, 0.0]), torch.tensor([5.0, 5.0, 1.0, 1.0])
    assert cautious_update(update, grad).tolist() == [2.0, 0.0, 6.0, 0.0]
    assert cautious_update(update * 1e-30, grad * 1e-30).tolist() == pytest.approx([2e-30, 0.0, 6e-30, 0.0])
    assert cautious_update(-grad, grad).tolist() == [0.0] * 4
    one_of_many = torch.ones(5000).neg().index_fill(0, torch.tensor([7]), 1.0)
    assert cautious_update(one_of_many, torch.ones(5000)).max() == pytest.approx(1000)  # not 5000
    assert cautious_update(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)


STEPPED_BY_EVERY_RULE = sorted(
    {name for name in optimizers.__all__ if name[0].isupper()}
    - {"GroupTable", "LARS", "ScheduleFreeSGD", "ScheduleFreeAdamW"}
)
WITHOUT_MOMENTUM = {"Adadelta", "Adafactor", "Adagrad", "RMSprop", "SGD"}  # their updates have the sign of the gradient


@pytest.mark.parametrize("name", STEPPED_BY_EVERY_RULE)
def test_no_element_of_any_rule_goes_up_its_gradient_and_the_explanation_says_where_it_runs(name):
    param = fresh(6, 4, dtype=torch.float64)
    optimizer = getattr(optimizers, name)([param], weight_decay=0.0, caution=True)
    moved = 0
    for grad in gradients((6, 4), 20, torch.float64):
        before, param.grad = param.detach().clone(), grad
        optimizer.step()
        assert float(((before - param.detach()) * grad).min()) >= 0
        moved += int((before != param.detach()).sum())
    (plan,) = optimizer.explain().groups
    assert moved == 20 * 24 if name in WITHOUT_MOMENTUM else 0 < moved < 20 * 24
    assert plan.stages[plan.stages.index("update") + 1] == "caution"
    if not isinstance(optimizer, Muon | SOAP | optimizers.CAME | optimizers.DAdaptAdam):
        assert plan.path == "reference: no kernel that counts where update and gradient agree"


def test_a_rule_with_estimate_or_norms_of_its_own_moves_in_the_masked_direction():
    """Adafactor's length and Prodigy's estimate stay those of the rule: masked and plain runs differ by the mask."""
    for cls in (Adafactor, Prodigy):
        plain, ours = (fresh(6, 4, dtype=torch.float64) for _ in range(2))
        for param, caution in ((plain, False), (ours, True)):
            param.grad = gradients((6, 4), 1, torch.float64)[0]
            cls([param], caution=caution).step()
        start = fresh(6, 4, dtype=torch.float64).detach()
        torch.testing.assert_close(start - ours, masked(start - plain.detach(), plain.grad), rtol=1e-9, atol=0)


def test_groups_differ_and_a_change_takes_effect_at_the_next_step():
    params, alone = [fresh(4, 3) for _ in range(2)], fresh(4, 3)
    optimizer = AdamW([dict(params=params[:1], caution=True), dict(params=params[1:])], lr=0.1)
    other = AdamW([alone], lr=0.1, fused=False)
    grads = gradients((4, 3), 6)
    for t, grad in enumerate(grads):
        other.param_groups[0]["caution"] = optimizer.param_groups[1]["caution"] = t >= 3
        for param in (*params, alone):
            param.grad = grad.clone()
        optimizer.step()
        other.step()
    assert torch.equal(params[1], alone)
    assert not torch.equal(params[0], alone)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], other.state[alone]["exp_avg"]) for p in params)


def test_the_gradient_is_that_after_clip_and_sign_and_the_average_sees_the_result():
    param, mirrored = fresh(4, 3), fresh(4, 3)
    stages = dict(caution=True, clip=ClipValue(0.5), average=EMA(0.5))
    optimizer, other = (SGD([p], lr=0.1, momentum=0.9, maximize=m, **stages) for p, m in ((param, 0), (mirrored, 1)))
    expected, buffer, average = fresh(4, 3).detach(), torch.zeros(4, 3), None
    for grad in gradients((4, 3), 5):
        param.grad, mirrored.grad = grad, -grad
        optimizer.step()
        other.step()
        clipped = grad.clamp(-0.5, 0.5)
        buffer = 0.9 * buffer + clipped
        expected = expected - 0.1 * masked(buffer, clipped)
        average = expected if average is None else 0.5 * (average + expected)
    torch.testing.assert_close(param.detach(), expected)
    torch.testing.assert_close(optimizer.state[param]["ema"], average)
    assert torch.equal(param, mirrored)


def test_complex_numbers_are_pairs_and_sparse_gradients_are_written_out():
    pair, pairs = fresh(3, 2, dtype=torch.complex64), None
    pair.data.imag.copy_(fresh(3, 2, seed=2).detach())
    pairs = torch.nn.Parameter(torch.view_as_real(pair.detach()).clone())
    embedding, dense = fresh(5, 3), fresh(5, 3)
    optimizer = AdamW([pair, pairs, embedding, dense], lr=0.1, caution=True)
    for real, rows in zip(gradients((3, 2, 2), 4), gradients((2, 3), 4), strict=True):
        pair.grad, pairs.grad = torch.view_as_complex(real), real
        embedding.grad = torch.sparse_coo_tensor(torch.tensor([[0, 3]]), rows, (5, 3), check_invariants=False)
        dense.grad = embedding.grad.to_dense()
        optimizer.step()
    assert torch.equal(torch.view_as_real(pair.detach()), pairs.detach())
    assert torch.equal(embedding, dense)


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "split32"])
def test_16_bit_weights_are_masked_in_fp32(rounding):
    param, wide = fresh(40, 30, dtype=torch.bfloat16), None
    wide = torch.nn.Parameter(param.detach().float())
    optimizer, other = (AdamW([p], lr=1e-2, caution=True, rounding=rounding) for p in (param, wide))
    for grad in gradients((40, 30), 10, torch.bfloat16):
        param.grad, wide.grad = grad, grad.float()
        optimizer.step()
        other.step()
    error = (param.detach().float() - wide.detach()).abs().max()
    assert error <= {"nearest": 0.1, "kahan": 0.01, "split32": 0.01}[rounding]
    if rounding == "split32":
        assert torch.equal(optimizer._full_precision_of(param), wide.detach())


def test_a_state_dict_has_it_and_torchs_loads_without_it():
    param = fresh(3)
    saved = copy.deepcopy(AdamW([param], caution=True).state_dict())
    ours = AdamW([fresh(3)])
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["caution"] is True
    ours.load_state_dict(torch.optim.AdamW([fresh(3)]).state_dict())
    assert ours.param_groups[0]["caution"] is True


def test_a_sharded_parameter_is_gathered(monkeypatch):
    monkeypatch.setattr("lightning_optkit.step.shards.sharding_groups", lambda param: ("a group",))
    param = fresh(4)
    for caution, said in ((True, "count the signs"), (False, None)):
        optimizer = AdamW([param], caution=caution)
        group = optimizer.param_groups[0]
        assert why_gathered(param, group, optimizer._rule(group), None, torch.float32) == said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ScheduleFreeSGD", "(caution=True): must be False; y and z follow the same direction."),
        ("ScheduleFreeAdamW", "(caution=True): must be False; y and z follow the same direction."),
        ("LARS", "(caution=True): must be False; decay is part of the momentum."),
        ("AdamW", None),
    ],
)
def test_rules_that_have_no_place_for_it_refuse_it(name, said):
    cls = getattr(optimizers, name)
    assert issubclass(cls, OnePassOptimizer)
    if said is None:
        with pytest.raises(ValueError, match=r"^AdamW\(caution=1\): caution must be one of False, True\.$"):
            cls([fresh(2)], caution=1)
        return
    with pytest.raises(ValueError, match=f"^{re.escape(name + said)}$"):
        cls([fresh(2)], caution=True)
