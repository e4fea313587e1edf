# SPDX-License-Identifier: Apache-2.0
"""What is seen of a run, as the rules about learning take it."""

import math
from dataclasses import replace

from lightning_optkit.diagnostics._observations import Check, Losses, RunSeen
from lightning_optkit.diagnostics._signals import (
    InputSeen,
    LayerSeen,
    LossSeen,
    ProbeSeen,
)

NAN = math.nan

LOSS = LossSeen("cross_entropy", None, 10, True, False, "(8, 10) and (8,)", 0.0, NAN, NAN, 0.5, 2.4, 2.3)

LAYERS = tuple(LayerSeen(f"net.{i}", 1.0, 1.0, 1e-3, 1.4) for i in range(4))

INPUT = InputSeen("net.0", 1.0, 2.0, 0.0, False)

PROBE = ProbeSeen(
    0.1, before=2.3, tenth=2.29, full=2.2, ten=2.4, thirty=9.0, permuted=2.3, other_before=NAN, other_thirty=NAN
)


def seen(loss=2.3, steps=100, validations=(), nonfinite=None, first=None, **parts):
    """A run of 100 steps that ends with this loss and had the same check five times."""
    check = Check(0, 0.1, **{"losses": (LOSS,), "layers": LAYERS, "first_input": INPUT, **parts})
    checks = [replace(check, step=step, **(first or {} if step == 0 else {})) for step in range(5)]
    losses = Losses()
    for value in loss if isinstance(loss, list) else [loss] * steps:
        losses.append(value)
    return RunSeen(
        steps=steps, steps_planned=100, losses=losses, checks=checks, validations=[*validations], nonfinite=nonfinite
    )  # fmt: skip
