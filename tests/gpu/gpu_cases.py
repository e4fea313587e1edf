# SPDX-License-Identifier: Apache-2.0
"""The rules, stages and shapes of the CUDA step tests, on a device and under emulation."""

import copy

import torch

from lightning_optkit import optimizers as ours
from lightning_optkit.averaging import EMA, SWA, PowerEMA
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue, ZClip

RULES = {
    "sgd": (ours.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)),
    "plain sgd": (ours.SGD, dict(lr=0.1, maximize=True)),
    "adam": (ours.Adam, dict(weight_decay=0.1)),
    "adamw": (ours.AdamW, dict()),
    "amsgrad": (ours.AdamW, dict(amsgrad=True, maximize=True)),
    "adagrad": (ours.Adagrad, dict(initial_accumulator_value=0.1)),
    "rmsprop": (ours.RMSprop, dict(centered=True, momentum=0.9)),
    "adadelta": (ours.Adadelta, dict()),
    "adamax": (ours.Adamax, dict()),
    "nadam": (ours.NAdam, dict()),
    "radam": (ours.RAdam, dict()),
    "lion": (ours.Lion, dict()),
    "adan": (ours.Adan, dict()),
    "adopt": (ours.ADOPT, dict()),
    "ademamix": (ours.AdEMAMix, dict()),
    "schedule-free sgd": (ours.ScheduleFreeSGD, dict(lr=0.1)),
    "schedule-free adamw": (ours.ScheduleFreeAdamW, dict()),
    "lamb": (ours.LAMB, dict()),
    "lars": (ours.LARS, dict(trust_coefficient=0.1)),
    "adabelief": (ours.AdaBelief, dict(eps=1e-8, weight_decay=0.1)),
    "signum": (ours.Signum, dict()),
    "sophia-g": (ours.SophiaG, dict(eps=0.1)),
    "mars": (ours.MARS, dict(gamma=0.1)),
    "stable adamw": (ours.StableAdamW, dict(weight_decay=0.1)),
    "prodigy": (ours.Prodigy, dict(d0=1e-2, weight_decay=0.1, use_bias_correction=True)),
}
# The rate depends on norms or sums, which are added in another order on CUDA.
BY_NORMS = {"lamb", "lars", "mars", "stable adamw", "prodigy"}
# Real powers in double: the last bit may differ between host and device.
BY_POWERS = {"nadam", "ademamix", "adopt", "schedule-free sgd", "schedule-free adamw"}
STAGES = {
    "plain": dict(),
    "value, l1": dict(clip=ClipValue(0.3), l1=0.01),
    "cautious": dict(cautious=True),
    "centralize": dict(centralize=True),
    "ema": dict(average=EMA(0.9, start=2)),
    "ema that warms up": dict(average=EMA(0.9, start=2, warmup="power")),
    "bf16 ema": dict(average=EMA(0.9, dtype=torch.bfloat16)),
    "power ema": dict(average=PowerEMA(0.1)),
    "swa": dict(average=SWA(1)),
    "norm": dict(clip=ClipNorm(0.5)),
    "tensor": dict(clip=ClipPerTensor(0.4)),
    "unit": dict(clip=ClipUnitwise(0.1), centralize=True, average=EMA(0.9), l1=0.01),
    "auto": dict(clip=AutoClip(30)),
    "z": dict(clip=ZClip(1.0, warmup_steps=2)),
    "int8": dict(state_dtype="int8"),
    "bf16 state": dict(state_dtype=torch.bfloat16),
}
SUMS_DECIDE = {"centralize", "norm", "tensor", "unit", "auto", "z"}
SHAPES = [(), (0,), (7,), (3, 5), (129, 33), (70_001,), (2, 3, 4, 5)]
MIDDLE_SHAPES = [(), (0,), (7,), (3, 5), (65, 33), (5_001,), (2, 3, 4, 5)]
SMALL_SHAPES = [(), (5,), (3, 100), (131,)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3 * 2**-6, torch.float16: 3 * 2**-9}
ROUNDINGS = ["nearest", "stochastic", "kahan", "split24", "split32"]
STATE_DTYPES = [torch.float32, torch.bfloat16, "int8"]


def is_possible(name, stages):
    """Whether the rule supports these stages; its constructor refuses those that make no sense."""
    optimizer_class, kwargs = RULES[name]
    try:
        optimizer_class([torch.ones(1, requires_grad=True)], **{**kwargs, **copy.deepcopy(stages)})
    except ValueError:
        return False
    return True


def is_refused(dtype, rounding):
    """Split weights are bf16; wider ones have nothing to split."""
    return dtype == torch.float16 and rounding.startswith("split")


def is_exact(name, stage, *, same_powers):
    """Whether the result must be bitwise equal to the CPU's."""
    return stage not in SUMS_DECIDE and name not in BY_NORMS and (same_powers or name not in BY_POWERS)


def inputs(dtype, shapes, steps):
    """Parameters, and gradients for each step."""
    generator = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [normal(shape) for shape in shapes], [[normal(shape) for shape in shapes] for _ in range(steps)]


def train(name, device, dtype=torch.float32, *, shapes=SHAPES, steps=4, place=None, **stages):
    """(parameters, optimizer) after a few steps. `place(tensors)`: where the tensors are to lie."""
    optimizer_class, kwargs = RULES[name]
    values, grads = inputs(dtype, shapes, steps)
    place = place or (lambda tensors: [t.to(device) for t in tensors])
    params = [value.requires_grad_() for value in place(values)]
    optimizer = optimizer_class(params, statistics=True, **{**kwargs, **copy.deepcopy(stages)})
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in grads:
        for p, g in zip(params, place(step), strict=True):
            p.grad = g
        optimizer.step()
    return params, optimizer


def assert_same(actual, expected, *, exact):
    """Compares what two runs of `train` returned: parameters, state, counters, statistics."""
    (found, on_device), (wanted, on_cpu) = actual, expected
    tolerance = 0.0 if exact else TOLERANCE[wanted[0].dtype]
    for p, q in zip(found, wanted, strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=0, atol=tolerance, equal_nan=True)
        assert set(on_device.state[p]) == set(on_cpu.state[q])
        for key, value in on_cpu.state[q].items():
            held = on_device.state[p][key].cpu()
            if exact:
                torch.testing.assert_close(held, value, rtol=0, atol=0, equal_nan=True, msg=key)
            elif value.dtype != torch.uint8:
                torch.testing.assert_close(held, value, rtol=1e-4, atol=tolerance, msg=key)
    assert on_device.num_steps == on_cpu.num_steps
    assert on_device.num_clipped == on_cpu.num_clipped
    assert on_device.num_skipped == on_cpu.num_skipped
    if on_cpu.grad_norm is not None:
        assert abs(on_device.grad_norm - on_cpu.grad_norm) <= 1e-5 * on_cpu.grad_norm
        assert abs(on_device.grad_norm_clipped - on_cpu.grad_norm_clipped) <= 1e-5 * on_cpu.grad_norm
    for ours_, theirs in zip(on_device.statistics(), on_cpu.statistics(), strict=True):
        assert abs(ours_.param_norm - theirs.param_norm) <= 1e-4 * theirs.param_norm
        assert abs(ours_.update_norm - theirs.update_norm) <= 1e-3 * theirs.update_norm + 1e-12
        assert ours_.nonfinite == theirs.nonfinite and abs(ours_.lost - theirs.lost) <= (0 if exact else 3)
