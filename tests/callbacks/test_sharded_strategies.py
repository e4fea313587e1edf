# SPDX-License-Identifier: Apache-2.0
"""Callbacks under strategies that split parameters over processes: taken, or refused before the first step."""

import pytest
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_optkit.callbacks import (
    GSAM,
    SAM,
    WSAM,
    CompressCheckpoint,
    GradientNoise,
    Grokfast,
    Lookahead,
    LookSAM,
    MaxNorm,
    QKClip,
    ScheduleFreeWrapper,
)

REFUSED = (CompressCheckpoint, ScheduleFreeWrapper)
TAKEN = (GSAM, SAM, WSAM, GradientNoise, Grokfast, LookSAM, Lookahead, MaxNorm, QKClip)


def set_up(make_trainer, callback, strategy):
    trainer = make_trainer(callback)
    trainer.strategy.__class__ = strategy
    module = nn.Linear(2, 2)
    module.automatic_optimization = True
    callback.setup(trainer, module, "fit")


def made(cls):
    return cls(0.3) if cls is MaxNorm else cls()


@pytest.mark.parametrize("cls", REFUSED)
def test_what_needs_whole_parameters_is_refused_when_the_fit_starts(make_trainer, cls):
    expected = (
        f"{cls.__name__}(...): ModelParallelStrategy is not supported; every process must hold all parameters, as on a "
        "single device or under DDP."
    )
    with pytest.raises(ValueError) as error:
        set_up(make_trainer, made(cls), ModelParallelStrategy)
    assert str(error.value) == expected


@pytest.mark.parametrize("cls", TAKEN)
def test_what_takes_dtensors_refuses_other_shards(make_trainer, cls):
    set_up(make_trainer, made(cls), ModelParallelStrategy)
    with pytest.raises(ValueError) as error:
        set_up(make_trainer, made(cls), FSDPStrategy)
    assert str(error.value) == (
        f"{cls.__name__}(...): FSDPStrategy is not supported; parameters must be whole, or sharded by "
        "ModelParallelStrategy (FSDP2)."
    )
