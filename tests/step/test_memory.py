# SPDX-License-Identifier: Apache-2.0
"""State tensors in one arena of huge pages: zeroed, non-overlapping, and with the layout of their parameters."""

import pytest
import torch

from lightning_optkit._native import extension
from lightning_optkit.step.memory import zeros_like_all

LARGE = 2_000_000  # elements: 8 MB of fp32, more than the arena's minimum of 4 MiB
SIZES = [16, LARGE]


def parameters(size):
    rows = torch.ones(size // 8, 8)
    return [
        rows,
        rows.t(),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(7),
        torch.ones(()),
        torch.ones(0, 4),
    ]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float64, torch.float32]


@pytest.mark.parametrize("size", SIZES)
def test_gives_zeros_of_the_shape_layout_and_dtype_asked_for(size):
    params = parameters(size)
    for zeros, p, dtype in zip(zeros_like_all(params, DTYPES), params, DTYPES, strict=True):
        assert (zeros.shape, zeros.stride(), zeros.dtype) == (p.shape, p.stride(), dtype)
        assert not zeros.any()
        assert not zeros.requires_grad


@pytest.mark.parametrize("size", SIZES)
def test_no_two_overlap(size):
    tensors = zeros_like_all(parameters(size), DTYPES)
    for number, t in enumerate(tensors):
        t.fill_(number + 1)
    for number, t in enumerate(tensors):
        assert (t == number + 1).all()


@pytest.mark.parametrize("size", SIZES)
def test_a_parameter_with_gaps_gets_a_dense_state(size):
    (zeros,) = zeros_like_all([torch.ones(size, 2)[:, 0]], [torch.float32])
    assert zeros.is_contiguous()


@pytest.mark.skipif(extension is None, reason="arenas need the compiled extension")
def test_large_states_share_one_arena_on_lines_of_64_bytes():
    tensors = [t for t in zeros_like_all(parameters(LARGE), DTYPES) if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    assert all(t.data_ptr() % 64 == 0 for t in tensors)
    assert tensors[0].data_ptr() % 2**21 == 0


def test_small_states_are_allocated_one_by_one():
    tensors = [t for t in zeros_like_all(parameters(16), DTYPES) if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)


def test_no_tensors_give_no_states():
    assert zeros_like_all([], []) == []
