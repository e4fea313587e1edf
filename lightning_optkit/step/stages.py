# SPDX-License-Identifier: Apache-2.0
"""The stages of the step besides the rule: their names, types, descriptions and defaults, for every optimizer."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from typing_extensions import TypedDict, Unpack

from lightning_optkit.step.average import Average
from lightning_optkit.step.clip import Clip

__all__ = [
    "ADDED_ENTRIES",
    "OF_THE_OPTIMIZER",
    "STAGE_DEFAULTS",
    "STATE_DTYPES",
    "Stages",
    "completed",
    "group_stages",
    "written_out",
]


class Stages(TypedDict, total=False):
    """The stages of the step, which every optimizer of this package takes as keywords.

    Args:
        clip: Gradient clipping applied by the step, e.g. `ClipNorm(1.0)`.
        average: Average of the parameters updated by the step, e.g. `EMA(0.999)`.
        l1: Weight of the L1 proximal step, in [0, inf); the threshold is `lr * l1`, and zeros are exact.
        cautious: Apply decoupled decay only where the update does not move away from zero (cautious weight decay); no
            effect on L2. It masks the decay, `caution` the update.
        caution: Update only the elements whose update has the sign of their gradient, and divide what is left by their
            share of the tensor (Liang et al. 2024, C-Optim; `caution` of timm). Runs in PyTorch.
        decouple_lr: Multiply decoupled decay by `lr / decay_lr` instead of `lr`, so that a schedule changes it, but the
            base rate does not. `decay_lr`, in (0, inf), is an entry of each group: its `lr` (or `initial_lr`) when it
            was added.
        centralize: Subtract the mean of each row of the first dimension from its gradient (two dimensions or more).
        rounding: How 16-bit parameters are stored: "nearest", "stochastic", or "kahan" (one more 16-bit number per
            element for the low-order part). "split32" trains bf16 parameters as if they were fp32: the state keeps the
            low 16 bits of the fp32 number; "split24" keeps 8 bits. fp32 parameters lose nothing, so for them every
            choice but "kahan" is the same as "nearest".
        state_dtype: Dtype of the state; "int8" for one byte per number. State in 16 or 8 bits is rounded
            stochastically. State of fp64 parameters is fp64.
        statistics: Collect norms and lost updates of each tensor in the same pass; read them with
            `optimizer.statistics()`.
    """

    clip: Clip | None
    average: Average | None
    l1: float
    cautious: bool
    caution: bool
    decouple_lr: bool
    centralize: bool
    rounding: Literal["nearest", "stochastic", "kahan", "split24", "split32"]
    state_dtype: torch.dtype | Literal["int8"]
    statistics: bool


STAGE_DEFAULTS: Stages = {
    "clip": None,
    "average": None,
    "l1": 0.0,
    "cautious": False,
    "caution": False,
    "decouple_lr": False,
    "centralize": False,
    "rounding": "nearest",
    "state_dtype": torch.float32,
    "statistics": False,
}
STATE_DTYPES = (torch.float32, torch.bfloat16, "int8")

OF_THE_OPTIMIZER = ("clip", "average", "state_dtype", "statistics")
"""The stages that are not set per group."""

ADDED_ENTRIES = STAGE_DEFAULTS.keys() - {*OF_THE_OPTIMIZER} | {"rounding_seed", "average_decay", "decay_lr"}
"""Group entries that torch's classes lack: the per-group stages, and the entries they need."""


def completed(owner: str, stages: Mapping[str, Any]) -> Stages:
    """`stages` with the defaults of those that are missing.

    Raises:
        TypeError: for any other keyword, as in Python.
    """
    for name in stages:
        if name not in STAGE_DEFAULTS:
            raise TypeError(f"{owner}.__init__() got an unexpected keyword argument {name!r}")
    return {**STAGE_DEFAULTS, **stages}  # type: ignore[typeddict-item]


def group_stages(stages: Stages) -> dict[str, Any]:
    """The stages that are set per group, and the entries they need."""
    entries = {name: value for name, value in stages.items() if name in ADDED_ENTRIES} | {"rounding_seed": 0}
    average = stages["average"]
    return entries if average is None else {**entries, "average_decay": average.decay}


def written_out(cls: type) -> tuple[inspect.Signature, str | None]:
    """The signature and the docstring of a class, with every stage in place of `**stages`.

    A stage that the class documents itself is not documented twice.
    """
    signature, doc = inspect.signature(cls.__init__), cls.__doc__  # type: ignore[misc]
    _, *params = signature.parameters.values()
    if not params or params[-1].annotation != Unpack[Stages]:
        return signature.replace(parameters=params), doc
    hints = Stages.__annotations__
    stages = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in STAGE_DEFAULTS.items()
    ]
    missing = [line for name, line in _described().items() if doc and not re.search(rf"^ {{8}}{name}:", doc, re.M)]
    doc = doc and re.sub(r"^ {8}\*\*stages:.*\n(?: {9,}.*\n)*", lambda _: "".join(missing), doc, flags=re.M)
    return signature.replace(parameters=[*params[:-1], *stages]), doc


def _described() -> dict[str, str]:
    """The docstring lines of `Stages`, by stage."""
    return {found[1]: found[0] for found in re.finditer(r"^ {8}(\w+):.*\n(?: {9,}.*\n)*", Stages.__doc__ or "", re.M)}
