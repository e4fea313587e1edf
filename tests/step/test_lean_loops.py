# SPDX-License-Identifier: Apache-2.0
"""The loops for the stages and precisions that most runs have, against the loop with every stage."""

import pytest
import torch

from lightning_optkit import optimizers
from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA

pytestmark = pytest.mark.skipif(extension is None, reason="no compiled extension")

AVERAGED = ["SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Lion", "Adan",
            "ADOPT", "AdEMAMix", "AdaBelief", "MARS", "Signum", "SophiaG", "StableAdamW"]  # fmt: skip
LEAN = [(rule, None) for rule in [*AVERAGED, "ScheduleFreeSGD", "ScheduleFreeAdamW"]]
LEAN += [(rule, EMA(0.9)) for rule in AVERAGED]
PRECISIONS = {
    "fp32": (torch.float32, {}),
    "fp32, bf16 state": (torch.float32, dict(state_dtype=torch.bfloat16)),
    "fp32, int8 state": (torch.float32, dict(state_dtype="int8")),
    "bf16": (torch.bfloat16, {}),
    "bf16, bf16 state, stochastic": (torch.bfloat16, dict(state_dtype=torch.bfloat16, rounding="stochastic")),
    "bf16, int8 state, Kahan": (torch.bfloat16, dict(state_dtype="int8", rounding="kahan")),
    "bf16, int8 state, split": (torch.bfloat16, dict(state_dtype="int8", rounding="split24")),
}


def test_the_lean_loops_of_all_rules_are_tested():
    rules = {name for name in optimizers.__all__ if hasattr(getattr(optimizers, name), "_torch_class")}
    own_loops = {
        "LAMB",
        "LARS",
        "Adafactor",
        "Prodigy",
        "Muon",
        "CAME",
        "SOAP",
        "DAdaptAdam",
    }  # norms, factors or an estimate
    assert {*AVERAGED, "ScheduleFreeSGD", "ScheduleFreeAdamW", *own_loops} == rules


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("rule", "average"), LEAN)
def test_the_lean_loop_gives_the_bits_of_the_whole_one(rule, weight_decay, average, precision, frozen):
    """Counting statistics takes the loop with every stage; without them, the one with the stages that are on."""
    (dtype, kwargs), done = PRECISIONS[precision], []
    if rule == "ScheduleFreeSGD" and "state_dtype" in kwargs:
        pytest.skip("its state is in fp32")
    for statistics in (False, True):
        torch.manual_seed(0)
        params = [torch.randn(shape).to(dtype).requires_grad_() for shape in ((100, 41), (7,), (), (3, 32), (0,))]
        make = getattr(optimizers, rule)
        optimizer = make(params, weight_decay=weight_decay, average=average, statistics=statistics, **kwargs)
        if rule.startswith("ScheduleFree"):
            optimizer.train()
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            optimizer.step()
        done.append(frozen([params, [list(state.values()) for state in optimizer.state.values()]]))
    assert done[0] == done[1]
