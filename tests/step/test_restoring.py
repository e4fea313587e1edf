# SPDX-License-Identifier: Apache-2.0
"""State from a file is loaded correctly, or refused with a clear error and nothing is changed."""

import copy
import math
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ZClip
from lightning_optkit.optimizers import SGD, Adafactor, Adam, AdamW, Muon, NAdam, Prodigy, RMSprop, ScheduleFreeSGD

NAN, INF = math.nan, math.inf


def trained(cls, steps, size=300, lr=0.1, **kwargs):
    """Two groups, so that a refusal at the second is seen to leave the first alone."""
    params = [torch.linspace(-1, 1, size).requires_grad_(), torch.ones(2, 3, requires_grad=True)]
    params = [torch.ones(3, 4, requires_grad=True), params[1]] if cls is Muon else params
    optimizer = cls([dict(params=[p]) for p in params], lr=lr, **kwargs)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(steps):
        for p in params:
            p.grad = torch.sin(torch.arange(p.numel()) + step).view_as(p)
        optimizer.step()
    return optimizer, params


class Wrapper(torch.Tensor):
    """Numbers that lie in another tensor, as those of a quantized one."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("looked into a wrapper")


def without_memory(t):
    freed = t.clone()
    freed.untyped_storage().resize_(0)
    return freed


def refused(cls, edit, snapshot, **kwargs):
    """The refusal of an edited state dict, after which the optimizer is as it was and goes on as it would have."""
    state_dict = copy.deepcopy(trained(cls, 5, lr=0.5, **kwargs)[0].state_dict())
    edit(state_dict)
    optimizer, params = trained(cls, 2, **kwargs)
    twin, twins = trained(cls, 2, **kwargs)
    before, held = snapshot(optimizer), [dict(state) for state in optimizer.state.values()]
    with pytest.raises((TypeError, ValueError)) as refusal:
        optimizer.load_state_dict(state_dict)
    assert str(refusal.value).startswith(f"{cls.__name__}.load_state_dict(state_dict=...): ")
    assert "\n" not in str(refusal.value)
    assert snapshot(optimizer) == before
    assert all(a[name] is b[name] for a, b in zip(optimizer.state.values(), held, strict=True) for name in b)
    for p, q in zip(params, twins, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    return str(refusal.value)


def state(name, value):
    """An edit: `value`, or what it makes of what is there, as the state `name` of the second parameter."""

    def edit(state_dict):
        entries = state_dict["state"][1]
        entries[name] = value(entries[name]) if callable(value) else value

    return edit


BAD_TENSORS = {
    "sparse": lambda t: t.to_sparse(),
    "on meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "wrapped": Wrapper,
    "without memory": without_memory,
    "integers": lambda t: t.to(torch.int64),
    "booleans": lambda t: t.bool(),
    "codes without scales": lambda t: t.to(torch.uint8),
    "complex": lambda t: t.to(torch.complex64),
    "another shape": lambda t: t.flatten(),
    "a list": lambda t: t.tolist(),
    "a number": 1.0,
    "a string": "x",
    "numpy": lambda t: t.numpy(),
}


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "ema", "compensation"])
@pytest.mark.parametrize("value", BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_a_tensor_that_cannot_be_read_or_is_another_is_refused(name, value, snapshot):
    said = refused(AdamW, state(name, value), snapshot, average=EMA(0.9), rounding="kahan", clip=ZClip())
    assert f"of parameter 1, the state {name!r} " in said


BAD_NUMBERS = [torch.ones(2), torch.ones(0), "x", NAN, -1.0, INF, True, 1j, 1e39, 10**5000, torch.tensor(-1.0),
               torch.tensor(NAN), torch.ones((), dtype=torch.bool), torch.ones(1).to_sparse(), [1.0],
               torch.ones((), device="meta")]  # fmt: skip


@pytest.mark.parametrize("name", ["step", "num_averaged"])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda v: type(v).__name__)
def test_a_count_that_is_none_is_refused(name, value, snapshot):
    assert f"'{name}'" in refused(AdamW, state(name, value), snapshot, average=EMA(0.9), clip=ZClip())


@pytest.mark.parametrize(
    ("cls", "name", "kwargs"),
    [(NAdam, "mu_product", {}), (SGD, "momentum_step", dict(momentum=0.9)), (ScheduleFreeSGD, "weight_sum", {})],
)
@pytest.mark.parametrize("value", ["x", torch.ones(2), NAN, -1.0])
def test_a_number_of_a_rule_that_is_none_is_refused(cls, name, kwargs, value, snapshot):
    assert f"'{name}'" in refused(cls, state(name, value), snapshot, **kwargs)


def test_a_rest_that_is_negative_is_what_it_is():
    optimizer, params = trained(ScheduleFreeSGD, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["weight_sum_rest"] = -1e-9
    optimizer.load_state_dict(state_dict)
    assert optimizer.state[params[0]]["weight_sum_rest"].item() == pytest.approx(-1e-9)


@pytest.mark.parametrize("value", [5, 5.0, torch.tensor(5), torch.tensor([5.0]), torch.tensor(5.0).double()], ids=str)
def test_a_count_is_taken_in_whatever_kind_of_number(value):
    optimizer, params = trained(AdamW, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state(name="step", value=value)(state_dict)
    optimizer.load_state_dict(state_dict)
    held = optimizer.state[params[1]]["step"]
    assert (held.item(), held.shape, held.dtype) == (5.0, torch.Size([]), torch.float32)
    optimizer.step()


# --- codes and their scales ---


BAD_SCALES = {
    "short": lambda s: s[:0],
    "long": lambda s: torch.cat([s, s]),
    "two-dimensional": lambda s: s.view(1, -1),
    "NaN": lambda s: s * NAN,
    "inf": lambda s: s * INF,
    "too large for fp32": lambda s: s.double() + 1e300,
    "negative": lambda s: -s,
    "integers": lambda s: s.long(),
    "sparse": lambda s: s.to_sparse(),
    "on meta": lambda s: s.to("meta"),
    "without memory": without_memory,
    "a list": lambda s: s.tolist(),
    "none": None,
}


@pytest.mark.parametrize("edit", BAD_SCALES.values(), ids=BAD_SCALES)
@pytest.mark.parametrize("name", ["exp_avg_scale", "exp_avg_sq_scale"])
def test_scales_that_do_not_go_with_their_codes_are_refused(name, edit, snapshot):
    refused(AdamW, state(name, edit), snapshot, state_dtype="int8")


def test_codes_with_gaps_and_scales_beside_numbers_are_refused(snapshot):
    refused(AdamW, state("exp_avg", lambda t: t[:, :1].expand(2, 3)), snapshot, state_dtype="int8")
    refused(AdamW, state("exp_avg", lambda t: t.float()), snapshot, state_dtype="int8")
    refused(AdamW, state("exp_avg_scale", torch.ones(1)), snapshot)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16], ids=str)
def test_scales_of_another_precision_are_converted(dtype):
    optimizer, params = trained(AdamW, 3, state_dtype="int8")
    saved = copy.deepcopy(optimizer.state_dict())
    for entries in saved["state"].values():
        for name in ("exp_avg_scale", "exp_avg_sq_scale"):
            entries[name] = entries[name].to(dtype)
    again, loaded = trained(AdamW, 1, state_dtype="int8")
    again.load_state_dict(saved)
    for p, q in zip(params, loaded, strict=True):
        scale = again.state[q]["exp_avg_scale"]
        assert scale.dtype == torch.float32
        assert torch.equal(scale, optimizer.state[p]["exp_avg_scale"].to(dtype).float())
        q.grad = torch.ones_like(q)
    again.step()


# --- whole, or not at all ---


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_half_a_state_is_refused(name, snapshot):
    assert f"no {name!r}" in refused(AdamW, lambda d: d["state"][1].pop(name), snapshot)


@pytest.mark.parametrize(
    ("cls", "kwargs", "switched", "added"),
    [
        (RMSprop, {}, dict(momentum=0.9), "momentum_buffer"),
        (RMSprop, {}, dict(centered=True), "grad_avg"),
        (Adam, {}, dict(amsgrad=True), "max_exp_avg_sq"),
        (SGD, {}, dict(momentum=0.9), "momentum_buffer"),
    ],
)
def test_what_a_setting_adds_may_be_missing_and_begins_anew(cls, kwargs, switched, added):
    optimizer, params = trained(cls, 2, **kwargs)
    optimizer.param_groups[0].update(switched)  # and saved before the next step
    again, loaded = trained(cls, 0, **kwargs)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, loaded, strict=True):
        q.data.copy_(p.detach())
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    again.step()
    assert all(torch.equal(p, q) for p, q in zip(params, loaded, strict=True))
    assert torch.equal(again.state[loaded[0]][added], optimizer.state[params[0]][added])


def test_state_that_a_parameter_does_not_keep_is_refused(snapshot):
    refused(Adafactor, state("variance", torch.ones(2, 3)), snapshot)
    refused(Adafactor, state("row_var", lambda t: t.t()), snapshot)
    refused(Prodigy, state("p0", lambda t: t[:1]), snapshot)


# --- the outline ---

OUTLINES = {
    "no groups": lambda d: d.pop("param_groups"),
    "no state": lambda d: d.pop("state"),
    "groups None": lambda d: d.update(param_groups=None),
    "groups a dict": lambda d: d.update(param_groups={0: d["param_groups"][0]}),
    "a group None": lambda d: d["param_groups"].__setitem__(1, None),
    "a group without params": lambda d: d["param_groups"][1].pop("params"),
    "params a number": lambda d: d["param_groups"][1].update(params=1),
    "params given twice": lambda d: d["param_groups"][1].update(params=[0]),
    "params unhashable": lambda d: d["param_groups"][1].update(params=[[1]]),
    "one group": lambda d: d["param_groups"].pop(),
    "state a list": lambda d: d.update(state=[]),
    "state None": lambda d: d.update(state=None),
    "state of none": lambda d: d["state"].__setitem__(7, d["state"][1]),
    "state of a parameter None": lambda d: d["state"].__setitem__(1, None),
    "a name that is none": lambda d: d["state"][1].__setitem__(3, torch.ones(2, 3)),
    "a rate out of range": lambda d: d["param_groups"][1].update(lr=-1.0),
    "a rate of two": lambda d: d["param_groups"][1].update(lr=torch.ones(2)),
    "a rate on meta": lambda d: d["param_groups"][1].update(lr=torch.ones((), device="meta")),
    "betas out of range": lambda d: d["param_groups"][1].update(betas=(0.9, 2.0)),
    "a rounding of none": lambda d: d["param_groups"][1].update(rounding="up"),
    "l1 NaN": lambda d: d["param_groups"][1].update(l1=NAN),
    "a decay of an average": lambda d: d["param_groups"][1].update(average_decay=2.0),
    "a flag": lambda d: d["param_groups"][1].update(maximize="no"),
    "decoupled a tensor": lambda d: d["param_groups"][1].update(decoupled_weight_decay=torch.ones(2)),
    "a rule of no name": lambda d: d.update(rule=None),
    "what cannot be copied": lambda d: d["param_groups"][1].update(lock=threading.Lock()),
}


@pytest.mark.parametrize("edit", OUTLINES.values(), ids=OUTLINES)
def test_a_state_dict_of_another_outline_is_refused(edit, snapshot):
    refused(AdamW, edit, snapshot, average=EMA(0.9), clip=ZClip())


@pytest.mark.parametrize("given", [None, 1, "x", [], {}, (1, 2)], ids=str)
def test_what_is_no_state_dict_is_refused(given, snapshot):
    optimizer, _ = trained(AdamW, 2)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=r"^AdamW\.load_state_dict\(state_dict=\.\.\.\): must "):
        optimizer.load_state_dict(given)
    assert snapshot(optimizer) == before


@pytest.mark.parametrize("given", [None, {}, {"learned": torch.ones(2)}, {"history": torch.ones(3)}, [1.0]], ids=str)
def test_a_clip_that_cannot_be_restored_leaves_all_as_it_was(given, snapshot):
    refused(AdamW, lambda d: d.update(clip=given), snapshot, clip=ZClip())


@pytest.mark.parametrize("cls", [Prodigy, ScheduleFreeSGD])
def test_what_a_rule_learned_is_looked_at(cls, snapshot):
    for name in cls._learned:
        refused(cls, lambda d, name=name: d["param_groups"][1].update({name: "x"}), snapshot)
        refused(cls, lambda d, name=name: d["param_groups"][1].update({name: torch.ones(2)}), snapshot)


# --- any edit of a state dict ---

VALUES = st.sampled_from(
    [None, {}, [], "x", -1.0, 0.5, NAN, INF, True, 3, (0.9, 0.99), torch.ones(()), torch.ones(1), torch.ones(2, 3),
     torch.ones(2, 3) * NAN, torch.ones(300).half(), torch.ones(6).to_sparse(), torch.ones(3, 2).t(),
     torch.zeros(2, 3, dtype=torch.uint8), torch.full((2, 3), 2.0, requires_grad=True),
     torch.randn(2, 3, dtype=torch.complex64).conj()]
)  # fmt: skip


def places_in(value, path=()):
    """Every key of every dict and list in a state dict."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places_in(item, (*path, key))


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it keeps nothing
@given(data=st.data())
def test_any_edit_loads_as_what_it_says_or_is_refused_whole(state_dtype, snapshot, data):
    kwargs = dict(average=EMA(0.9), clip=ZClip(warmup_steps=2), state_dtype=state_dtype)
    state_dict = copy.deepcopy(trained(AdamW, 4, lr=0.5, **kwargs)[0].state_dict())
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(list(places_in(state_dict))))
        holder = state_dict
        for key in path:
            holder = holder[key]
        if data.draw(st.booleans()):
            holder[last] = data.draw(VALUES)
        else:
            del holder[last]
    optimizer, params = trained(AdamW, 2, **kwargs)
    before = snapshot(optimizer)
    try:
        optimizer.load_state_dict(state_dict)
    except (TypeError, ValueError) as refusal:
        assert str(refusal).startswith("AdamW.load_state_dict(state_dict=...): ")
        assert "\n" not in str(refusal)
        assert snapshot(optimizer) == before
        return
    for number, p in enumerate(params):
        said, held = state_dict["state"].get(number, {}), optimizer.state.get(p, {})
        for name in ("exp_avg", "exp_avg_sq"):
            if said.get(name) is not None and said[name].dtype != torch.uint8 and state_dtype != "int8":
                expected = said[name].detach().to(held[name].dtype)
                torch.testing.assert_close(held[name], expected, rtol=0, atol=0, equal_nan=True)
        p.grad = torch.ones_like(p)
    optimizer.step()
    again, _ = trained(AdamW, 0, **kwargs)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
