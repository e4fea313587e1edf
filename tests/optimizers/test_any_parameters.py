# SPDX-License-Identifier: Apache-2.0
"""Every rule on any parameters: compiled, in any dtype and layout, against its plain PyTorch in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_optkit import optimizers
from lightning_optkit._native import extension

# Chosen so that a step changes numbers of size 1 by about 0.1, and no element depends on the last bit of its gradient.
RULES = {
    "SGD": dict(momentum=0.9, weight_decay=0.1),
    "Adagrad": dict(lr_decay=0.1, initial_accumulator_value=0.1),
    "RMSprop": dict(centered=True, momentum=0.5, alpha=0.5, eps=0.1),
    "Adadelta": dict(rho=0.5, eps=1e-2),
    "Adafactor": dict(eps=(1e-2, 1e-3), weight_decay=0.1),
    "Adam": dict(amsgrad=True, weight_decay=0.1, eps=1e-2),
    "AdamW": dict(weight_decay=0.1, eps=1e-2),
    "Adamax": dict(weight_decay=0.1, eps=1e-2),
    "NAdam": dict(weight_decay=0.1, decoupled_weight_decay=True, eps=1e-2),
    "RAdam": dict(betas=(0.5, 0.9), eps=1e-2),
    "Lion": dict(weight_decay=0.1),
    "LAMB": dict(weight_decay=0.1, eps=1e-2, norm_bounds=(0.1, 1.0)),
    "LARS": dict(trust_coefficient=0.5),
    "Adan": dict(weight_decay=0.1, eps=1e-2),
    "ADOPT": dict(eps=0.5),
    "AdEMAMix": dict(alpha=2.0, weight_decay=0.1, eps=1e-2),
    "AdaBelief": dict(weight_decay=0.1, eps=1e-2),
    "CAME": dict(betas=(0.5, 0.5, 0.5), eps=(1e-1, 1e-1)),
    "SOAP": dict(max_precondition_dim=0, weight_decay=0.1, eps=1e-2),  # bases feel the last bit
    "MARS": dict(gamma=0.1, weight_decay=0.1, eps=1e-2),
    "Signum": dict(momentum=0.5, weight_decay=0.1),  # sums of halves are exact, and so is their sign
    "SophiaG": dict(eps=1.0),
    "StableAdamW": dict(weight_decay=0.1, eps=1e-2),
    "ScheduleFreeSGD": dict(weight_decay=0.1),
    "ScheduleFreeAdamW": dict(weight_decay=0.1, eps=1e-2),
    "Prodigy": dict(d0=1.0, growth_rate=1.1, weight_decay=0.1, eps=1e-2),
    "DAdaptAdam": dict(d0=1.0, growth_rate=1.1, weight_decay=0.1, eps=1e-2),
    "Muon": dict(ns_steps=1, adamw_lr=0.1, adamw_eps=1e-2),
}
IN_PYTORCH = {
    "CAME": "reference: no kernel for two factored averages",
    "DAdaptAdam": "reference: no kernel that estimates before it updates",
    "SOAP": "reference: matrix products and decompositions",
}
LR, STEPS = 0.1, 4
CHUNK = 16384  # elements: kChunk of csrc/core/tables.h
SHAPES = [(), (1,), (0,), (3, 0), (7,), (6, 9), (2, 3, 4, 5), (1, 5, 1), (CHUNK + 37,), (3, CHUNK)]
# Largest error after 4 steps on numbers below 2, moved by about 0.1 a step.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 4 * 2**-7,  # each store may fall to the other side of a tie, which is one unit in the last place
    torch.float16: 4 * 2**-10,
}
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.permute(*range(t.ndim)[::-1]).contiguous().permute(*range(t.ndim)[::-1]) if t.ndim else t,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t.contiguous(),
    "gapped": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "a view": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
}
GRAD_LAYOUTS = LAYOUTS | {
    "expanded": lambda t: t.reshape(-1)[:1].reshape([1] * t.ndim).expand(t.shape) if t.numel() else t,
}
EVENTS = ["nothing", "move", "add a group", "drop one", "forget one"]

parameter = st.tuples(st.sampled_from(SHAPES), st.sampled_from(list(TOLERANCE)), st.sampled_from(list(LAYOUTS)))
gradients = st.lists(st.none() | st.sampled_from(list(GRAD_LAYOUTS)), min_size=5, max_size=5)


class Pair:
    """An optimizer, and the same rule in plain PyTorch on contiguous fp64 that holds what the first can store."""

    def __init__(self, name, specs, num_first):
        self.name = name
        self.params = [LAYOUTS[layout](drawn(shape).to(dtype)).requires_grad_() for shape, dtype, layout in specs]
        self.exact = [double(p) for p in self.params]
        build = getattr(optimizers, name)
        self.both = [
            build(self.groups(params, num_first), lr=LR, **RULES[name]) for params in (self.params, self.exact)
        ]
        plain = self.both[1]  # torch's Adafactor has no argument for it, so ours has none
        for options in (plain.defaults, *plain.param_groups):
            options["fused"] = False
        for optimizer in self.both if name.startswith("ScheduleFree") else ():
            optimizer.train()

    def groups(self, params, num_first):
        second = LR if self.name in ("Prodigy", "DAdaptAdam") else LR / 2  # which want one rate for all
        groups = [dict(params=params[:num_first]), dict(params=params[num_first:], lr=second, weight_decay=0.0)]
        return [group for group in groups if group["params"]]

    def happen(self, event):
        if event == "move":
            for p, layout in zip(self.params, LAYOUTS.values(), strict=False):
                p.data = layout(p.detach().clone())
        elif event == "add a group":
            self.params.append(drawn((9,)).bfloat16().requires_grad_())
            self.exact.append(double(self.params[-1]))
            for optimizer, members in zip(self.both, (self.params, self.exact), strict=True):
                optimizer.add_param_group(dict(params=[members[-1]]))
        elif event == "drop one":
            for optimizer, members in zip(self.both, (self.params, self.exact), strict=True):
                dropped = members.pop(0)
                for group in optimizer.param_groups:
                    group["params"][:] = [p for p in group["params"] if p is not dropped]
        elif event == "forget one":
            for optimizer, members in zip(self.both, (self.params, self.exact), strict=True):
                optimizer.state.pop(members[-1], None)

    def step(self, layouts):
        """The same gradients for both, each in its layout; None: no gradient."""
        for p, q, layout in zip(self.params, self.exact, layouts, strict=False):
            p.grad = None if layout is None else GRAD_LAYOUTS[layout](drawn(p.shape).to(p.dtype))
            q.grad = None if layout is None else p.grad.double().clone(memory_format=torch.contiguous_format)
        for optimizer in self.both:
            optimizer.step()
        for p, q in zip(self.params, self.exact, strict=True):
            q.data.copy_(q.detach().to(p.dtype))


def drawn(shape):
    return torch.randn(shape, dtype=torch.float64).clamp(-1.5, 1.5)


def double(p):
    return p.detach().double().clone(memory_format=torch.contiguous_format).requires_grad_()


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=settings.default.max_examples // 4)  # for each rule
@given(
    specs=st.lists(parameter, min_size=2, max_size=4),
    num_first=st.integers(0, 4),
    steps=st.lists(st.tuples(st.sampled_from(EVENTS), gradients), min_size=STEPS, max_size=STEPS),
    seed=st.integers(0, 2**31),
)
def test_any_parameters_and_gradients_that_come_go_and_move(name, specs, num_first, steps, seed):
    torch.manual_seed(seed)
    pair = Pair(name, specs, num_first)
    for event, layouts in steps:
        if event != "drop one" or len(pair.params) > 1:
            pair.happen(event)
        pair.step(layouts)
    assert all(plan.path.startswith("reference: ") for plan in pair.both[1].explain().groups)
    for p, q in zip(pair.params, pair.exact, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=TOLERANCE[p.dtype])


@pytest.mark.skipif(extension is None, reason="the extension is not built")
@pytest.mark.parametrize("name", RULES)
def test_what_is_tried_is_the_compiled_step(name):
    pair = Pair(name, [((7,), dtype, "contiguous") for dtype in TOLERANCE], 2)
    compiled = f"compiled ({extension.cpu_isa()})"
    assert {plan.path for plan in pair.both[0].explain().groups} == {IN_PYTORCH.get(name, compiled)}


def test_every_rule_is_tried():
    rules = {name for name in optimizers.__all__ if isinstance(getattr(optimizers, name), type)} - {"GroupTable"}
    assert set(RULES) == rules
