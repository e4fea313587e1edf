# SPDX-License-Identifier: Apache-2.0
"""State in 8 bits: the representable values, the documented error, and equality with the compiled codes."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.optimizers import SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Lion, NAdam, RAdam, RMSprop
from lightning_optkit.step.quantized_state import BLOCK, dequantize8, quantize8_, zero_scales

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "nonnegative"])


def coded(value, signed, step=1):
    codes = torch.zeros(value.shape, dtype=torch.uint8)
    scales = zero_scales(codes)
    quantize8_(codes, scales, value, signed=signed, key=(0, step, 0, 0))
    return codes, scales


def there_and_back(value, signed, step=1):
    return dequantize8(*coded(value, signed, step), signed=signed)


@SIGNED
def test_every_code_is_read_as_it_was_written(signed):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes != 128] if signed else codes  # there is no negative zero
    # One number of each block is the largest there is, so that the others are held as they are.
    largest = torch.full((len(codes), 1), 127 if signed else 255, dtype=torch.uint8)
    blocks = torch.cat([codes[:, None].expand(-1, BLOCK - 1), largest], 1).flatten()
    value = dequantize8(blocks, torch.full((len(codes),), 3.0), signed=signed)
    found, scales = coded(value, signed)
    assert torch.equal(found, blocks)
    assert scales.tolist() == [3.0] * len(codes)
    assert len(value.unique()) == len(codes)


@SIGNED
@given(seed=st.integers(0, 2**31), size=st.integers(1, 400), spread=st.integers(0, 12))
def test_the_error_is_at_most_an_eighth_of_the_number_or_the_least_code(signed, seed, size, spread):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-spread, 1, (size,), generator=generator)
    value = value if signed else value.abs()
    _, scales = coded(value, signed)
    largest = scales.repeat_interleave(BLOCK)[:size]
    least = largest * (1.125 / 1.875) * 2.0 ** (-15 if signed else -31)
    error = (there_and_back(value, signed) - value).abs()
    assert bool((error <= torch.maximum(value.abs() * 0.1251, least * 1.0001)).all())
    assert scales.tolist() == [block.abs().max().item() for block in value.split(BLOCK)]


@SIGNED
def test_rounding_is_right_in_the_mean(signed):
    value = torch.full((BLOCK,), 0.3)
    value[0] = 1.0
    mean = torch.stack([there_and_back(value, signed, step) for step in range(1, 500)]).mean(0)
    assert mean[1:].mean().item() == pytest.approx(0.3, rel=1e-3)
    assert mean[0] == 1.0


def test_a_square_never_becomes_zero_and_a_zero_never_anything_else():
    value = torch.full((BLOCK,), 1e-30)
    value[0], value[1] = 1.0, 0.0
    back = there_and_back(value, signed=False)
    assert (back[2:] > 0).all()
    assert back[1] == 0


def test_blocks_do_not_see_each_other():
    value = torch.cat([torch.full((BLOCK,), 1e-20), torch.full((BLOCK,), 1e20), torch.ones(3)])
    torch.testing.assert_close(there_and_back(value, signed=True), value, rtol=1e-6, atol=0)


@SIGNED
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_costs_its_block_nothing(bad, signed):
    value = torch.linspace(0.1, 1.0, 2 * BLOCK + 5)
    value = value * torch.linspace(-1, 1, len(value)).sign() if signed else value
    clean = value.clone()
    value[7] = value[BLOCK + 3] = value[-1] = bad
    clean[7] = clean[BLOCK + 3] = clean[-1] = 0.0
    found, expected = there_and_back(value, signed), there_and_back(clean, signed)
    is_bad = ~value.isfinite()
    assert torch.equal(found[~is_bad], expected[~is_bad])
    largest = torch.stack([block.abs().max() for block in clean.split(BLOCK)])
    torch.testing.assert_close(found[is_bad], torch.zeros(3) if signed else largest, rtol=0.126, atol=0)


@SIGNED
def test_a_block_of_nothing_finite_is_zeros(signed):
    codes, scales = coded(torch.tensor([math.nan, math.inf, -math.inf, 0.0]), signed)
    assert scales.tolist() == [0.0]
    assert dequantize8(codes, scales, signed=signed).tolist() == [0.0] * 4


@SIGNED
@pytest.mark.parametrize("largest", [3.4e38, 2.0**127, 2.0**126, 1e38, 1e-37, 2.0**-125, 1e-38, 1e-42, 0.0])
def test_scales_at_both_ends_of_fp32(largest, signed):
    value = torch.tensor([1.0, 0.5, 0.25, 0.0]) * largest
    found = there_and_back(value, signed)
    held = value.clamp(max=2.0**126) if largest >= 2.0**-125 else torch.zeros(4)
    torch.testing.assert_close(found, held, rtol=0.126, atol=0)


@SIGNED
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_scale_that_was_saved_as_not_finite_is_read_as_zeros(bad, signed):
    codes = torch.arange(256, dtype=torch.uint8)
    assert dequantize8(codes, torch.tensor([bad, bad]), signed=signed).tolist() == [0.0] * 256


# --- in the step ---

RULES = {
    "sgd": (SGD, dict(momentum=0.9)),
    "adam": (Adam, dict()),
    "amsgrad": (AdamW, dict(amsgrad=True)),
    "adagrad": (Adagrad, dict(initial_accumulator_value=0.1)),
    "rmsprop": (RMSprop, dict(centered=True, momentum=0.9)),
    "adadelta": (Adadelta, dict()),
    "adamax": (Adamax, dict()),
    "nadam": (NAdam, dict()),
    "radam": (RAdam, dict()),
    "lion": (Lion, dict()),
}


def run(name, fused, dtype=torch.float32, steps=5, **kwargs):
    torch.manual_seed(0)
    optimizer_class, arguments = RULES[name]
    shapes = [(), (7, 33), (20_000,), (5, 3, 4)]
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    params[3].data = params[3].data.permute(2, 0, 1)
    optimizer = optimizer_class(params, lr=0.01, state_dtype="int8", fused=fused, **arguments, **kwargs)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape).to(dtype)
        optimizer.step()
    return params, optimizer


@pytest.mark.skipif(extension is None, reason="no compiled extension")
@pytest.mark.parametrize("name", RULES)
def test_the_compiled_codes_are_the_reference_codes(name):
    (compiled, ours), (expected, reference) = run(name, None), run(name, False)
    for p, q in zip(compiled, expected, strict=True):
        for key, value in reference.state[q].items():
            assert ours.state[p][key].dtype == value.dtype
            if value.dtype == torch.uint8:
                # A last bit of the number before rounding may fall on the other side: one code apart, seldom.
                apart = (ours.state[p][key].int() - value.int()).abs()
                assert apart.max() <= 1
                assert (apart > 0).float().mean() < 2e-3 or value.numel() < 1000
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("name", RULES)
def test_a_state_dict_goes_to_8_bits_and_back(name, fused):
    _, optimizer = run(name, fused, steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    again, plain = (run(name, fused, steps=0)[1] for _ in range(2))
    again.load_state_dict(copy.deepcopy(saved))
    for old, new in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
    plain.state_dtype = torch.float32
    plain.load_state_dict(copy.deepcopy(saved))
    for key, value in next(iter(plain.state.values())).items():
        assert value.dtype == torch.float32, key
    wide = plain.state_dict()
    again.load_state_dict(wide)
    assert any(value.dtype == torch.uint8 for value in next(iter(again.state.values())).values())


def test_one_byte_per_number_and_a_scale_for_128():
    params, optimizer = run("adam", None, steps=1)
    held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    numbers = sum(p.numel() for p in params)
    assert held / numbers == pytest.approx(2 * (1 + 4 / 128), rel=2e-3)
    assert [plan.state_dtype for plan in optimizer.explain().groups] == ["int8"]


def test_state_of_double_precision_stays_in_double_precision():
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = Adam([p], state_dtype="int8")
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].dtype == torch.float64


def test_training_follows_that_with_fp32_state():
    def train(state_dtype):
        torch.manual_seed(0)
        x = torch.randn(256, 20)
        y = torch.randn(20, 3).T @ x.T
        net = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
        optimizer = AdamW(net.parameters(), lr=3e-3, state_dtype=state_dtype)
        for _ in range(300):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(net(x), y.T)
            loss.backward()
            optimizer.step()
        return loss.item()

    exact, coded_loss = train(torch.float32), train("int8")
    assert coded_loss < 1.3 * exact


def test_the_bits_do_not_depend_on_the_number_of_threads(threads):
    results = []
    for count in (1, 2):
        threads(count)
        results.append(run("adam", None)[0])
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_refuses_another_state_dtype():
    with pytest.raises(ValueError, match=r"^Adam\(state_dtype='int4'\): state_dtype must be one of "):
        Adam([torch.ones(1, requires_grad=True)], state_dtype="int4")


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop", "lion"])
def test_a_bad_gradient_of_one_element_costs_the_others_of_its_block_nothing(name, bad, fused):
    optimizer_class, arguments = RULES[name]
    results = []
    for element in (bad, 0.0):
        torch.manual_seed(0)
        p = torch.randn(300, requires_grad=True)
        optimizer = optimizer_class([p], lr=0.01, state_dtype="int8", fused=fused, **arguments)
        for step in range(6):
            p.grad = torch.randn(300)
            p.grad[9] = element if step == 2 else 0.0
            optimizer.step()
            with torch.no_grad():
                p[9] = 0.5
        results.append((p.detach(), optimizer.state[p]))
    (found, state), (expected, untouched) = results
    others = torch.arange(300) != 9
    assert torch.equal(found[others], expected[others])
    for key, value in untouched.items():
        if value.dtype == torch.uint8:
            assert torch.equal(state[key][others], value[others])
    p, last = results[0][0].clone(), 0.5
    assert p.isfinite().all() and p[9] == last


@pytest.mark.skipif(extension is None, reason="no compiled extension")
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "nonnegative"])
def test_both_paths_code_extremes_alike(signed):
    results = []
    for fused in (None, False):
        torch.manual_seed(0)
        p = torch.zeros(5 * BLOCK, requires_grad=True)
        kwargs = dict(momentum=0.5) if signed else dict(alpha=0.5)
        optimizer = (SGD if signed else RMSprop)([p], lr=0.0, state_dtype="int8", fused=fused, **kwargs)
        for seen in (math.inf, math.nan, 1.0):
            size = torch.tensor([1.0, 1e19, 1e-19, 3e-30, 0.0]).repeat_interleave(BLOCK)
            p.grad = torch.randn(5 * BLOCK).clamp(-1.5, 1.5) * (size * 1e19 if signed else size)
            p.grad[3] = seen
            optimizer.step()
        state = optimizer.state[p]
        key = "momentum_buffer" if signed else "square_avg"
        results.append((state[key], state[f"{key}_scale"]))
    (codes, scales), (codes_reference, scales_reference) = results
    assert scales.isfinite().all()
    torch.testing.assert_close(scales, scales_reference, rtol=1e-6, atol=0)
    apart = (codes.int() - codes_reference.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 2e-3


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_torchs_default_dtype_changes_nothing(default, fused):
    results = []
    for dtype in (torch.float32, default):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(0)
            p = torch.randn(300, dtype=torch.float32, requires_grad=True)
            optimizer = NAdam([p], lr=0.01, state_dtype="int8", average=EMA(0.9), fused=fused)
            for _ in range(5):
                p.grad = torch.randn(300, dtype=torch.float32)
                optimizer.step()
        finally:
            torch.set_default_dtype(before)
        results.append((p.detach(), optimizer.state[p]))
    (expected, state), (found, state_found) = results
    assert torch.equal(found, expected)
    for key, value in state.items():
        assert state_found[key].dtype == value.dtype
        assert torch.equal(state_found[key], value)
