# SPDX-License-Identifier: Apache-2.0
"""Compressed state dicts: bounded errors, loaded by our classes and, widened, by torch's; damage is refused."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_optkit import optimizers
from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD, Adam, AdamW, Prodigy, ScheduleFreeAdamW
from lightning_optkit.optimizers.compressed import compressed_state_dict, widened_state_dict
from lightning_optkit.optimizers.convert import from_torch_
from lightning_optkit.step.quantized_state import dequantize8

OURS = {name: getattr(optimizers, name) for name in optimizers.__all__ if name[0].isupper() and name != "GroupTable"}
TORCHS = ["SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"]
DTYPES = pytest.mark.parametrize("dtype", ["int8", torch.bfloat16], ids=str)


def trained(cls, steps=6, params=None, **kwargs):
    """Two matrices, the second channels last in memory, after some steps."""
    generator = torch.Generator().manual_seed(0)
    if params is None:
        params = [nn.Parameter(torch.randn(40, 30, generator=generator)), nn.Parameter(torch.ones(20, 17).T)]
    optimizer = cls(params, **kwargs)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randint(
                -3, 1, p.shape, generator=generator
            )
        optimizer.step()
    return optimizer


def saved(state_dict):
    """Through a file that only holds tensors and plain types."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True), len(file.getvalue())


def assert_bounded(found, exact, *, signed, dtype):
    """Relative error of each number, and zero below the least code of its block."""
    bound, least = (1 / 16, 2.0 ** (-15 if signed else -31)) if dtype == "int8" else (1 / 256, 0.0)
    flat, other = (t.as_strided((t.numel(),), (1,)).double() for t in (found, exact))
    blocks = torch.nn.functional.pad(other.abs(), (0, -other.numel() % 128)).view(-1, 128).amax(1)
    floor = blocks.repeat_interleave(128)[: other.numel()] * least * 2
    assert ((flat - other).abs() <= bound * other.abs() * (1 + 1e-6) + floor).all()
    assert signed or ((flat > 0) == (other > 0)).all()


@DTYPES
@pytest.mark.parametrize("name", OURS)
def test_every_rule_loads_its_compressed_state_within_the_bounds_and_trains_on(name, dtype):
    optimizer = trained(OURS[name])
    before = copy.deepcopy(optimizer.state_dict())
    found, _ = saved(compressed_state_dict(optimizer, dtype))
    torch.testing.assert_close(
        optimizer.state_dict()["state"], before["state"], rtol=0, atol=0
    )  # the given one is not changed
    params = [p.detach().clone().requires_grad_() for group in optimizer.param_groups for p in group["params"]]
    resumed = trained(OURS[name], 0, params)
    resumed.load_state_dict(found)
    rule = optimizer._rule(optimizer.param_groups[0])
    for number, state in before["state"].items():
        for key, exact in state.items():
            value = resumed.state_dict()["state"][number][key]
            is_moment = (
                key in rule.state_names and not rule.spec(key).full_precision and exact.shape == params[number].shape
            )
            if is_moment:
                assert not torch.equal(value, exact) or not exact.any() or key == "previous_grad"
                assert_bounded(value, exact, signed=not rule.spec(key).nonnegative, dtype=dtype)
            else:
                torch.testing.assert_close(value, exact, rtol=0, atol=0)
    for p in params:
        p.grad = torch.ones_like(p)
    resumed.step()
    assert all(p.isfinite().all() for p in params)


@DTYPES
@pytest.mark.parametrize("name", TORCHS)
def test_torchs_class_loads_the_widened_one_and_ours_the_compressed_one(name, dtype):
    kwargs = dict(momentum=0.9) if name in ("SGD", "RMSprop") else {}
    theirs = trained(getattr(torch.optim, name), **kwargs)
    found, _ = saved(compressed_state_dict(theirs, dtype))
    again = trained(getattr(torch.optim, name), 0, **kwargs)
    again.load_state_dict(widened_state_dict(found))
    ours = trained(OURS[name], 0, **kwargs)
    ours.load_state_dict(found)
    for p, q in zip(again.state.values(), ours.state.values(), strict=True):
        for key, value in p.items():
            if isinstance(value, torch.Tensor) and value.ndim:
                torch.testing.assert_close(value, q[key], rtol=0, atol=0)
    for p in again.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    again.step()


def test_torch_cannot_take_codes_for_numbers():
    found = compressed_state_dict(trained(torch.optim.AdamW))
    again = trained(torch.optim.AdamW, 0)
    again.load_state_dict(found)
    for p in again.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        again.step()


def test_the_file_is_smaller():
    params = [nn.Parameter(torch.ones(300, 400))]
    optimizer = trained(AdamW, params=params)
    whole, bf16, int8 = (
        saved(state_dict)[1] / params[0].numel()
        for state_dict in (
            optimizer.state_dict(),
            compressed_state_dict(optimizer, torch.bfloat16),
            compressed_state_dict(optimizer),
        )
    )
    assert (round(whole, 1), round(bf16, 1), round(int8, 1)) == (8.0, 4.0, 2.1)


def test_state_in_8_bits_is_saved_as_it_is_and_what_is_no_moment_too():
    optimizer = trained(AdamW, state_dtype="int8", average=EMA(0.9))
    found = compressed_state_dict(optimizer)["state"]
    for number, kept in optimizer.state_dict()["state"].items():
        for name in ("exp_avg", "exp_avg_sq"):
            one = {"codes": kept.pop(name), "scale": kept.pop(f"{name}_scale"), "signed": name == "exp_avg"}
            torch.testing.assert_close(found[number].pop(name), one, rtol=0, atol=0)
        torch.testing.assert_close(found[number], kept, rtol=0, atol=0)
    optimizer = trained(ScheduleFreeAdamW)
    found, exact = compressed_state_dict(optimizer)["state"][0], optimizer.state_dict()["state"][0]
    assert found["z"] is exact["z"] and found["exp_avg_sq"]["signed"] is False
    optimizer = trained(Prodigy)
    found, exact = compressed_state_dict(optimizer)["state"][0], optimizer.state_dict()["state"][0]
    assert found["p0"] is exact["p0"] and found["s"]["signed"] is True


def test_a_converted_optimizer_has_the_codes_that_it_trains_with():
    params = [nn.Parameter(torch.randn(500))]
    optimizer = torch.optim.AdamW(params)
    from_torch_(optimizer, state_dtype="int8")
    for _ in range(3):
        params[0].grad = torch.randn(500)
        optimizer.step()
    found, state = compressed_state_dict(optimizer)["state"][0], optimizer.state[params[0]]
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        assert torch.equal(found[name]["codes"], state[name])
        widened = dequantize8(found[name]["codes"], found[name]["scale"], signed=signed)
        torch.testing.assert_close(
            widened, dequantize8(state[name], state[f"{name}_scale"], signed=signed), rtol=1e-6, atol=0
        )


def test_compressed_twice_it_is_the_same():
    optimizer = trained(Adam)
    once = compressed_state_dict(optimizer)
    twice = compressed_state_dict(optimizer, "int8", once)
    assert twice["state"][0]["exp_avg"] is once["state"][0]["exp_avg"]
    torch.testing.assert_close(compressed_state_dict(optimizer)["state"], once["state"], rtol=0, atol=0)


def test_fp64_state_is_left_alone():
    optimizer = trained(AdamW, params=[nn.Parameter(torch.ones(3, dtype=torch.float64))], steps=0)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert compressed_state_dict(optimizer)["state"][0]["exp_avg"].dtype == torch.float64


@pytest.mark.parametrize(
    ("cls", "dtype", "said"),
    [
        (
            torch.optim.Rprop,
            "int8",
            "compressed_state_dict(optimizer=<Rprop>): no one-pass rule for torch.optim.Rprop.",
        ),
        (AdamW, "int4", "compressed_state_dict(dtype='int4'): dtype must be one of 'int8', torch.bfloat16."),
        (AdamW, torch.float16, "dtype must be one of 'int8', torch.bfloat16."),
    ],
)
def test_what_cannot_be_compressed_is_refused(cls, dtype, said):
    with pytest.raises(ValueError) as refusal:
        compressed_state_dict(trained(cls), dtype)
    assert said in str(refusal.value)


DAMAGE = {
    "no codes": lambda e: e.pop("codes"),
    "no scale": lambda e: e.pop("scale"),
    "no sign": lambda e: e.pop("signed"),
    "another sign": lambda e: e.update(signed=not e["signed"]),
    "a sign of text": lambda e: e.update(signed="no"),
    "codes of another dtype": lambda e: e.update(codes=e["codes"].float()),
    "codes of another shape": lambda e: e.update(codes=e["codes"][:-1].clone()),
    "codes with gaps": lambda e: e.update(codes=e["codes"].repeat(1, 2)[:, ::2]),
    "no tensor": lambda e: e.update(codes=[1, 2]),
    "a short scale": lambda e: e.update(scale=e["scale"][:-1].clone()),
    "a scale that is not finite": lambda e: e["scale"].fill_(float("nan")),
    "a scale below zero": lambda e: e["scale"].fill_(-1.0),
    "a scale of text": lambda e: e.update(scale="1"),
}


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_refused_and_changes_nothing(damage, name, frozen):
    found = copy.deepcopy(compressed_state_dict(trained(AdamW)))
    DAMAGE[damage](found["state"][0][name])
    optimizer = trained(AdamW)
    before = frozen([optimizer.state_dict(), optimizer.param_groups[0]["params"]])
    with pytest.raises((TypeError, ValueError), match=rf"^AdamW\.load_state_dict\(.*{name}") as refusal:
        optimizer.load_state_dict(found)
    assert "\n" not in str(refusal.value)
    assert frozen([optimizer.state_dict(), optimizer.param_groups[0]["params"]]) == before
    if damage not in ("another sign", "codes of another shape", "codes with gaps"):  # unknown without an optimizer
        with pytest.raises((TypeError, ValueError), match=r"^widened_state_dict\(state_dict=\.\.\.\): the state of"):
            widened_state_dict(found)


@pytest.mark.parametrize("given", [None, [], {}, {"state": 1}, {"state": {0: 1}}], ids=repr)
def test_what_is_no_state_dict_is_refused(given):
    with pytest.raises((TypeError, ValueError), match=r"^widened_state_dict\("):
        widened_state_dict(given)


def test_momentum_that_is_missing_stays_missing():
    optimizer = trained(SGD)
    torch.testing.assert_close(
        compressed_state_dict(optimizer)["state"], optimizer.state_dict()["state"], rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "bad",
    [
        5,
        [],
        {},
        {"state": {}},
        {"state": 3, "param_groups": [{"params": [0]}]},
        {"state": {}, "param_groups": []},
        {"state": {0: 5}, "param_groups": [{"params": [0]}]},
        {"state": {9: {}}, "param_groups": [{"params": [0]}]},
    ],
    ids=str,
)
def test_what_is_no_state_dict_of_the_optimizer_is_refused(bad):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises((TypeError, ValueError), match=r"^compressed_state_dict\(state_dict=\.\.\.\): .*\.$"):
        compressed_state_dict(optimizer, "int8", bad)


@pytest.mark.parametrize("cls", [SGD, AdamW], ids=lambda cls: cls.__name__)
def test_state_that_a_step_keeps_in_8_bits_goes_to_torchs_class(cls):
    kwargs = dict(momentum=0.9, lr=0.01) if cls is SGD else {}
    ours = trained(cls, state_dtype="int8", **kwargs)
    params = ours.param_groups[0]["params"]
    theirs = getattr(torch.optim, cls.__name__)(params, **kwargs)
    theirs.load_state_dict(widened_state_dict(compressed_state_dict(ours)))
    names = ["momentum_buffer"] if cls is SGD else ["exp_avg", "exp_avg_sq"]
    for p in params:
        for name in names:
            codes, scale = ours.state[p][name], ours.state[p][f"{name}_scale"]
            wide = dequantize8(codes, scale, signed=name != "exp_avg_sq")
            assert torch.equal(theirs.state[p][name], wide)
    again = cls(params, state_dtype="int8", **kwargs)
    again.load_state_dict(compressed_state_dict(ours))
    assert all(torch.equal(again.state[p][name], ours.state[p][name]) for p in params for name in names)


def test_codes_of_which_nobody_knows_the_sign_are_refused():
    ours = trained(SGD, momentum=0.9, lr=0.01, state_dtype="int8")
    said = r"^widened_state_dict\(state_dict=\.\.\.\): the state of parameter 0, 'momentum_buffer', is in 8 bits; "
    with pytest.raises(ValueError, match=said):
        widened_state_dict(ours.state_dict())
