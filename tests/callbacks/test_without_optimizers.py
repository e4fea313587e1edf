# SPDX-License-Identifier: Apache-2.0
"""A module whose `configure_optimizers` returns None runs as it would alone, or a sentence says what is missing."""

import pytest
import torch
from test_after_a_fit import EACH, ROWS, SMALL, Classifier, loader

import lightning_optkit as ok

pytestmark = pytest.mark.filterwarnings("ignore")
NEEDS_ONE = {"HyperparameterSchedule", "LRFinder", "ScheduleFree"}  # the first: of an entry of its groups


@EACH
def test_a_run_that_trains_nothing(make_trainer, name):
    module, callback = Classifier(), ROWS[name]()
    module.configure_optimizers = lambda: None
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer = make_trainer(callback, **SMALL)
    if name in NEEDS_ONE:
        with pytest.raises(ValueError, match=type(callback).__name__):
            trainer.fit(module, loader(), loader())
        return
    trainer.fit(module, loader(), loader())
    assert trainer.current_epoch == SMALL["epochs"]
    if not name.startswith("Initialize"):
        torch.testing.assert_close(dict(module.named_parameters()), before, rtol=0, atol=0)


def test_a_schedule_has_no_rate_to_name(make_trainer, printed):
    module = Classifier()
    module.configure_optimizers = lambda: None
    make_trainer(ok.Fuse(), ok.LRSchedule(ok.schedules.warmup_cosine(0.05)), **SMALL).fit(module, loader())
    assert "LRSchedule: " not in printed() and "Fuse" in printed()
