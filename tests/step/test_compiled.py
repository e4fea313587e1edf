# SPDX-License-Identifier: Apache-2.0
"""The compiled walk with gradients in other layouts than their parameters."""

from pathlib import Path

import pytest
import torch

from lightning_optkit._native import extension, node, why_no_node
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import SGD, AdamW

pytestmark = pytest.mark.skipif(extension is None, reason="no compiled extension")


@pytest.fixture(params=["by torch's headers", "by DLPack"], autouse=True)
def looks_at_tensors(request):
    """Both ways that the plan has of looking at tensors."""
    if request.param == "by torch's headers":
        if node is None:
            pytest.skip(why_no_node)
        yield
        return
    extension.use_look(None)
    yield
    if node is not None:
        extension.use_look(node.look)


def borrowing(grad):
    """A parameter of two ones that returns `grad`, whatever its dtype and device."""

    class Borrowing(torch.nn.Parameter):
        pass

    Borrowing.grad = property(lambda self: grad)
    return Borrowing(torch.ones(2))


def test_a_gradient_on_another_device_is_refused():
    optimizer = SGD([borrowing(torch.empty(2, device="meta"))])
    with pytest.raises(ValueError, match=r"^SGD\.step: a gradient is on meta, but its parameter is on cpu\.$"):
        optimizer.step()


def test_a_complex_gradient_of_a_real_parameter_is_refused():
    optimizer = SGD([borrowing(torch.ones(2, dtype=torch.complex64))])
    with pytest.raises(
        ValueError, match=r"^SGD\.step: a gradient is torch\.complex64, but its parameter is torch\.float32\.$"
    ):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int32], ids=str)
def test_a_gradient_of_another_dtype_is_taken_at_its_value(dtype):
    p = borrowing(torch.tensor([2, -4], dtype=dtype))
    optimizer = SGD([p], lr=0.25, clip=ClipNorm(100.0))
    optimizer.step()
    assert p.tolist() == [0.5, 2.0]
    assert optimizer.grad_norm == pytest.approx(20**0.5)


BLOCK = torch.arange(120.0).view(2, 3, 4, 5)
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "gapped": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", ["contiguous", "transposed", "channels last"])
def test_a_gradient_in_another_order_meets_its_own_elements(param_layout, grad_layout):
    p = torch.nn.Parameter(LAYOUTS[param_layout](BLOCK.clone()))
    p.grad = LAYOUTS[grad_layout](BLOCK.clone())
    SGD([p], lr=1.0).step()
    assert not p.any()


def test_the_copy_of_an_expanded_gradient_is_not_kept():
    p = torch.ones(1000, requires_grad=True)
    p.grad = torch.ones(1).expand(1000)
    optimizer = SGD([p])
    optimizer.step()
    plan = optimizer._engine.plan.segments[0]._plan
    with pytest.raises(ValueError, match="call bind before"):
        plan.check()  # it holds nothing


def test_gradients_may_come_and_go_and_move():
    params = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    oracle = [p.detach().clone().requires_grad_() for p in params]
    optimizers = [AdamW(params, lr=0.1), torch.optim.AdamW(oracle, lr=0.1)]
    torch.manual_seed(0)
    for present in ("1000", "1010", "0110", "0000", "1111", "0001", "1111"):
        for p, q, bit in zip(params, oracle, present, strict=True):
            p.grad = torch.randn(3, dtype=torch.float64) if bit == "1" else None
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(params, oracle, rtol=0, atol=1e-13)


def test_walks_every_element_of_many_chunks_and_nothing_beyond():
    room = torch.full((3 * 16384 + 100,), 7.0)
    inside = room[64 : 64 + 2 * 16384 + 5]
    p = torch.nn.Parameter(inside)
    p.grad = torch.ones_like(p)
    SGD([p], lr=1.0).step()
    assert (room[:64] == 7).all()
    assert (room[64 : 64 + 2 * 16384 + 5] == 6).all()
    assert (room[64 + 2 * 16384 + 5 :] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [*range(1, 36), 63, 64, 65, 95])
def test_a_short_last_vector_writes_nothing_past_the_end(size, dtype):
    """Parameter and moments lie between sevens: any element that a vector writes too many shows."""
    rooms = [torch.full((size + 64,), 7.0).to(dtype), *(torch.full((size + 64,), 7.0) for _ in range(2))]
    if dtype == torch.float64:
        rooms = [room.double() for room in rooms]
    inside = [room[32 : 32 + size] for room in rooms]
    p = torch.nn.Parameter(inside[0])
    optimizer = AdamW([p], lr=0.5)
    optimizer.state[p] = dict(step=torch.zeros(()), exp_avg=inside[1], exp_avg_sq=inside[2])
    p.grad = torch.ones_like(p)
    optimizer.step()
    for room in rooms:
        assert (room[:32] == 7).all()
        assert (room[32 + size :] == 7).all()
        assert (room[32 : 32 + size] != 7).all()


def available_bytes():
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    num = 2**31 + 37
    if available_bytes() < 6 * num:
        pytest.skip("needs 13 GB of memory: 2 bytes for each element and each gradient, and room to spare")
    p = torch.zeros(num, dtype=torch.bfloat16, requires_grad=True)
    p.grad = torch.ones_like(p)
    p.grad[2**31 - 1 :: 19] = -3.0  # the last before the limit and two behind it
    optimizer = SGD([p], lr=0.5, clip=ClipNorm(1e9), statistics=True)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx((num + 8 * 2) ** 0.5, rel=1e-9)
    assert optimizer.statistics()[0].grad_norm == pytest.approx(optimizer.grad_norm, rel=1e-5)
    assert p[2**31 - 2 : 2**31 + 1].tolist() == [-0.5, 1.5, -0.5]
    assert p[-1].item() == -0.5
    assert (p[: 2**31 - 1].max().item(), p[: 2**31 - 1].min().item()) == (-0.5, -0.5)
