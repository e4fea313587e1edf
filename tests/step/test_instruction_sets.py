# SPDX-License-Identifier: Apache-2.0
"""Weights and state in few bits have the same bits on every instruction set and on the reference path."""

import pytest
import torch

from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipUnitwise
from lightning_optkit.optimizers import SGD

pytestmark = pytest.mark.skipif(extension is None, reason="the extension is not built")

NARROW_EMA = EMA(0.5, dtype=torch.bfloat16)


@pytest.fixture(params=extension.cpu_isas() if extension else [])
def instruction_set(request):
    before = extension.cpu_isa()
    extension.use_cpu_isa(request.param)
    yield request.param
    extension.use_cpu_isa(before)


def contents(shape, fused, stages):
    """Parameter and state after three steps whose products are exact, so that a fused operation rounds as two do."""
    generator = torch.Generator().manual_seed(0)

    def sixty_fourths():
        return torch.randint(-64, 65, shape, generator=generator).div(64).bfloat16()

    weight = sixty_fourths().requires_grad_()
    optimizer = SGD([weight], lr=2**-7, momentum=0.5, fused=fused, **stages)
    for _ in range(3):
        weight.grad = sixty_fourths()
        optimizer.step()
    return [weight.detach(), *(value for _, value in sorted(optimizer.state[weight].items()))]


# Units of an odd number of elements begin in the middle of a random word, and of a pair of 16-bit numbers.
@pytest.mark.parametrize("clip", [None, ClipUnitwise(1e9)], ids=["whole", "by unit"])
@pytest.mark.parametrize("shape", [(33, 35), (7, 1001)], ids=str)
@pytest.mark.parametrize("average", [None, EMA(0.5), NARROW_EMA], ids=["alone", "fp32 EMA", "bf16 EMA"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "split24", "split32"])
def test_all_give_the_bits_of_the_reference(rounding, state_dtype, average, shape, clip, instruction_set, frozen):
    stages = dict(rounding=rounding, state_dtype=state_dtype, average=average, clip=clip)
    assert frozen(contents(shape, None, stages)) == frozen(contents(shape, False, stages))
