# SPDX-License-Identifier: Apache-2.0
"""The contract of every rule that torch does not have; its own file compares it with its paper."""

import pytest
import torch

from lightning_optkit import optimizers

HYPERPARAMETERS = {
    "Adan": dict(lr=1e-2, weight_decay=0.1),
    "AdEMAMix": dict(lr=1e-2, weight_decay=0.1, alpha_warmup=40, beta3_warmup=30),
    "ADOPT": dict(lr=1e-2, weight_decay=0.1, decouple=True),
    "LAMB": dict(lr=1e-2, weight_decay=0.1),
    "LARS": dict(lr=1.0, weight_decay=0.1, trust_coefficient=0.02),
    "Lion": dict(lr=1e-3, weight_decay=0.1),
    "AdaBelief": dict(lr=1e-2, weight_decay=0.1, eps=1e-8),
    "CAME": dict(lr=1e-3, weight_decay=0.1),
    "SOAP": dict(lr=1e-3, precondition_frequency=3),
    "MARS": dict(lr=1e-2, weight_decay=0.1, gamma=0.05),
    "Signum": dict(lr=1e-3, weight_decay=0.1),
    "SophiaG": dict(lr=1e-2, eps=0.1),
    "StableAdamW": dict(lr=1e-2, weight_decay=0.1),
    "Prodigy": dict(d0=1e-3, growth_rate=1.05, weight_decay=0.1),
    "DAdaptAdam": dict(d0=1e-3, growth_rate=1.05, weight_decay=0.1),
    "ScheduleFreeSGD": dict(lr=1.0, weight_decay=1e-3, warmup_steps=10),
    "ScheduleFreeAdamW": dict(lr=2e-2, weight_decay=1e-2, warmup_steps=10),
}
ESTIMATES = {"Prodigy", "DAdaptAdam"}  # their rate
NO_AVERAGE = {"ScheduleFreeSGD", "ScheduleFreeAdamW"}  # they are averages
EACH_RULE = pytest.mark.parametrize("name", HYPERPARAMETERS)
PATHS = pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)


def made(name, params, **kwargs):
    """In its training mode, where it has one."""
    optimizer = getattr(optimizers, name)(params, **kwargs)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return optimizer


def builder(name, **given):
    return lambda params, **kwargs: made(name, params, **HYPERPARAMETERS[name], **given, **kwargs)


def test_every_rule_of_our_own_is_in_the_table():
    rules = {name for name in optimizers.__all__ if hasattr(getattr(optimizers, name), "_torch_class")}
    assert set(HYPERPARAMETERS) == {name for name in rules if getattr(optimizers, name)._torch_class is None}


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.01}
PRODIGYS = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.01}  # its rate is a sum over all elements


@DTYPES
@EACH_RULE
def test_both_paths_agree_with_a_clip_and_an_average(paths_agree, name, dtype):
    tolerance = (PRODIGYS if name in ESTIMATES else TOLERANCE)[dtype]
    relative = 0.02 if dtype == torch.bfloat16 else tolerance
    paths_agree(builder(name), dtype, averages=name not in NO_AVERAGE, rtol=relative, atol=tolerance)


STATE_DTYPES = {
    "Prodigy": (torch.float32, torch.bfloat16, "int8"),
    "ScheduleFreeSGD": (torch.float32,),  # its only state is a point
}
ROUNDINGS = [dict(rounding=name) for name in ("kahan", "stochastic", "split24", "split32")]
STAGES = [
    (name, dict(state_dtype=dtype, **stage))
    for name in HYPERPARAMETERS
    for stage in (ROUNDINGS if name in NO_AVERAGE else [*ROUNDINGS, dict(l1=0.1), dict(centralize=True)])
    for dtype in STATE_DTYPES.get(name, (torch.float32, torch.bfloat16))
]


@pytest.mark.parametrize(("name", "stages"), STAGES, ids=str)
def test_both_paths_agree_with_other_stages(paths_agree, name, stages):
    paths_agree(builder(name, **stages), torch.bfloat16, averages=name not in NO_AVERAGE, rtol=0.05, atol=0.05)


@DTYPES
@PATHS
@EACH_RULE
def test_resumes_bit_for_bit(resumes, name, dtype, fused):
    resumes(builder(name, fused=fused), dtype)


@EACH_RULE
def test_ascends_when_asked_to(name):
    rate = dict(d0=0.1) if name in ESTIMATES else dict(lr=0.1)
    up, down = torch.tensor([1.0], requires_grad=True), torch.tensor([1.0], requires_grad=True)
    one, other = made(name, [up], maximize=True, **rate), made(name, [down], **rate)
    for _ in range(3):
        up.grad, down.grad = torch.tensor([2.0]), torch.tensor([-2.0])
        one.step()
        other.step()
    assert up.item() == down.item() > 1.0


@pytest.mark.parametrize(
    "name", [name for name in HYPERPARAMETERS if name not in ESTIMATES]
)  # whose estimate has a test of its own
def test_single_precision_is_double_precision_to_rounding(name):
    torch.manual_seed(0)
    values, gradients = torch.randn(300, dtype=torch.float64), torch.randn(50, 300, dtype=torch.float64)
    p, q = values.float().requires_grad_(), values.float().double().requires_grad_()
    both = [builder(name)([p]), builder(name)([q])]
    for g in gradients.float():
        p.grad, q.grad = g, g.double()
        for optimizer in both:
            optimizer.step()
    torch.testing.assert_close(p.detach().double(), q.detach(), rtol=2e-6, atol=2e-6)


LEARNS = [  # and the loss when this was written
    ("Adan", dict(lr=1e-2, weight_decay=0.02), 0.15),  # 0.136
    ("AdEMAMix", dict(lr=1e-2, alpha=5.0, alpha_warmup=200, beta3_warmup=200), 0.17),  # 0.154
    ("ADOPT", dict(lr=3e-2), 0.18),  # 0.162
    ("LAMB", dict(lr=2e-2), 0.2),
    ("LARS", dict(lr=1.0, trust_coefficient=0.02), 0.2),
    ("Lion", dict(lr=1e-2, weight_decay=0.1), 0.15),  # 0.125
    ("AdaBelief", dict(lr=1e-2), 0.15),  # 0.126
    ("CAME", dict(lr=1e-3), 0.06),  # 0.039
    ("SOAP", dict(lr=3e-2), 0.12),  # 0.092
    ("MARS", dict(lr=1e-2), 0.19),  # 0.166
    ("Signum", dict(lr=1e-2, weight_decay=0.1), 0.1),  # 0.066
    ("SophiaG", dict(lr=1e-2, eps=1e-3), 0.12),  # 0.092
    ("StableAdamW", dict(lr=1e-2), 0.2),  # 0.178
    ("DAdaptAdam", dict(), 0.04),  # 0.021
    ("ScheduleFreeSGD", dict(lr=1.0, weight_decay=1e-3, warmup_steps=10), 0.26),  # 0.247
    ("ScheduleFreeAdamW", dict(lr=2e-2, weight_decay=1e-2, warmup_steps=10), 0.18),  # 0.165
]


ELSEWHERE = {"Muon", "Prodigy"}  # they learn the digits in their own files


def test_every_rule_of_our_own_learns():
    rules = {name for name in optimizers.__all__ if hasattr(getattr(optimizers, name), "_torch_class")}
    of_torch = {name for name in rules if getattr(optimizers, name)._torch_class is not None}  # they follow torch
    assert {name for name, *_ in LEARNS} == rules - of_torch - ELSEWHERE


@pytest.mark.parametrize(("name", "kwargs", "bound"), LEARNS, ids=lambda value: value if isinstance(value, str) else "")
def test_learns_the_digits(digits_loss, name, kwargs, bound):
    def build(params):
        weight, bias = params
        groups = [dict(params=[weight]), dict(params=[bias], adapt=False)] if name == "LARS" else [weight, bias]
        return made(name, groups, **kwargs)

    def evaluate(optimizer):
        if hasattr(optimizer, "eval"):
            optimizer.eval()

    assert digits_loss(build, evaluate=evaluate) < bound
