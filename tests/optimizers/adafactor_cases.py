# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of Adafactor: parameters of every shape, and the states that torch keeps of them."""

import pytest
import torch

from lightning_optkit._native import extension

needs_extension = pytest.mark.skipif(extension is None, reason="no compiled extension")

SHAPES = [(), (1,), (7,), (16, 33), (1, 5), (5, 1), (3, 4, 2, 3)]  # the last: a convolution
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
STATES = {0: {"variance"}, 1: {"variance"}, 2: {"row_var", "col_var"}, 4: {"row_var", "col_var"}}


def short(kwargs):
    return "-".join(f"{name}={value}" for name, value in kwargs.items())


def parameters(dtype, count=2, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [[v.clone().requires_grad_() for v in values] for _ in range(count)]


def assert_state_close(one, ours, other, theirs, tolerance):
    for p, q in zip(ours, theirs, strict=True):
        assert set(one.state[p]) == set(other.state[q]) == STATES[p.ndim] | {"step"}
        for name, expected in other.state[q].items():
            torch.testing.assert_close(one.state[p][name], expected, rtol=tolerance, atol=tolerance)
