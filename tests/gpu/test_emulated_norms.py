# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the norms, emulated on the CPU thread by thread, against fp64 formulas."""

import pytest
import torch

pytest.importorskip("ninja")
import emulated
from norm_calls import Case, run

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

# Each kernel once, and both sides of its limits; odd, and too long for the sums in shared memory.
SIZES = [
    1,
    3,
    32,
    33,
    64,
    128,
    136,
    255,
    256,
    264,
    512,
    768,
    1000,
    1024,
    1032,
    2048,
    2056,
    4096,
    5000,
    8192,
    8200,
    16384,
]
ROWS = {1: 70, 3: 300, 64: 70, 255: 19, 1024: 9}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check(case):
    found, exact = run(emulated.library(), case)
    for name, value in found.items():
        error = (value.double() - exact[name]).abs().max().item()
        largest = max(1.0, exact[name].abs().max().item())
        # One rounding to store, and sums in fp32, or for fp64 in fp64.
        steps = 1e-12 if case.dtype == torch.float64 else 2e-6 * (1.0 + case.rows**0.5)
        if case.size <= 3:
            steps *= 2 / 1e-5**0.5  # nearly equal numbers: rounding is stretched by 1 / deviation, which eps bounds
        assert error <= (torch.finfo(value.dtype).eps + steps) * largest, (name, case, error)
    assert case.untouched(), case
    return found


@pytest.mark.parametrize("size", SIZES)
def test_every_length_and_dtype(size):
    for dtype in DTYPES:
        if dtype == torch.float64 and size > 4096:
            continue
        for centered in (True, False):
            check(Case(ROWS.get(size, 5), size, dtype, centered=centered))


@pytest.mark.parametrize("size", [3, 64, 255, 1000, 1024, 4096, 9001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addition_and_dropout(size, dtype):
    for dropout in (0.0, 0.3):
        found = check(Case(ROWS.get(size, 5), size, dtype, adds=True, dropout=dropout))
    check(Case(3, size, dtype, adds=True, dropout=1.0, centered=False))
    # The same bits live as on the CPU: where the residual is all that is left, so is it there.
    dropped = (found["d_input"] == 0).double().mean()
    assert abs(dropped - 0.3) < 0.1 or size < 64


@pytest.mark.parametrize(
    "case",
    [
        Case(9, 96, torch.bfloat16, adds=True, residual_dtype=torch.float32),
        Case(9, 96, torch.float32, adds=True, residual_dtype=torch.float16, dropout=0.5),
        Case(9, 96, torch.bfloat16, weight_dtype=torch.float32),
        Case(9, 768, torch.float16, weight_dtype=torch.float32, gap=8),
        Case(9, 768, torch.bfloat16, gap=5),
        Case(9, 768, torch.float32, offset=1),
        Case(9, 767, torch.bfloat16, offset=3, gap=1),
        Case(9, 1024, torch.float32, affine=False),
        Case(40, 24, torch.bfloat16, offset=1, gap=3, adds=True, dropout=0.2),
        Case(2, 10000, torch.bfloat16, offset=1, adds=True),
        Case(2, 40000, torch.float32),
        Case(2, 30001, torch.float64),
        Case(1, 8, torch.float32),
        Case(2001, 17, torch.bfloat16),
    ],
    ids=lambda c: f"{c.rows}x{c.size}",
)
def test_mixed_dtypes_gaps_and_odd_addresses(case):
    check(case)


@pytest.mark.parametrize("size", [17, 300, 1024, 9000])
def test_the_order_of_threads_and_blocks_changes_no_bit(size):
    expected = run(emulated.library(), Case(37, size, torch.float32, adds=True, dropout=0.1))[0]
    for seed in (1, 2):
        with emulated.order(seed):
            found = run(emulated.library(), Case(37, size, torch.float32, adds=True, dropout=0.1))[0]
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def test_dropout_lets_the_same_elements_live_as_on_the_cpu():
    for size, dtype in ((255, torch.float32), (1024, torch.bfloat16)):
        case = Case(7, size, dtype, adds=True, dropout=0.4)
        found, _ = run(emulated.library(), case)
        generator = torch.Generator().manual_seed(7 * 7919 + size)
        x = (torch.randn(7, size, generator=generator, dtype=torch.float64) * 2.0 + 0.5).to(dtype)
        residual = torch.randn(7, size, generator=generator, dtype=torch.float64).to(dtype)
        add_norm = torch.ops.lightning_optkit._add_norm.default
        total = add_norm(True, x, residual, None, None, 1, 1e-5, 0.4, torch.tensor(case.seed))[1]
        assert torch.equal(total, found["total"])
