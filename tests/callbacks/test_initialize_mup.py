# SPDX-License-Identifier: Apache-2.0
"""Initialize(mup_width(...)) gives every parameter its rate, in groups that stand when schedulers count them."""

from functools import partial

import pytest
import torch
from initialize_cases import Classifier, sgd, starting, weights

from lightning_optkit.callbacks import Fuse, Initialize
from lightning_optkit.init import mup_width
from lightning_optkit.optimizers import AdamW

start = pytest.fixture(starting)


def scheduled(make):
    def configure(module):
        optimizer = make(module)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]

    return configure


OPTIMIZERS = {
    "SGD": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), {4.0, 1.0, 0.25}),
    "Adam": (lambda m: torch.optim.Adam(m.parameters(), lr=0.1), {1.0, 0.25}),
    "named, grouped": (
        lambda m: torch.optim.AdamW(
            [{"params": list(m.net[0].named_parameters()), "lr": 0.1}, {"params": list(m.net[2:].named_parameters())}],
            lr=0.1,
        ),
        {1.0, 0.25},
    ),
    "one-pass": (lambda m: AdamW(m.parameters(), lr=0.1), {1.0, 0.25}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("fused", [False, True])
def test_mup_gives_every_parameter_its_rate_before_schedulers_count_the_groups(start, kind, fused):
    make, factors = OPTIMIZERS[kind]
    narrow, module = Classifier(8, norm=False), Classifier(32, scheduled(make), norm=False)
    callbacks = [Fuse(verbose=False)] if fused else []
    trainer = start(module, *callbacks, Initialize(partial(mup_width, base=narrow), seed=0), steps=2)
    column = "sgd" if kind == "SGD" else "adam"
    rows = mup_width(Classifier(32, norm=False), narrow, generator=torch.Generator().manual_seed(0))
    wanted = {f"{row.module}.{row.parameter}": 0.1 * getattr(row, column) for row in rows}
    names = {param: name for name, param in module.named_parameters()}
    found = {names[p]: group["lr"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert found == pytest.approx(wanted) and {round(lr / 0.1, 6) for lr in found.values()} == factors


def test_decay_apart_from_the_rate_is_the_same_for_all_of_mups_groups(start):
    narrow = Classifier(8, norm=False)
    module = Classifier(32, lambda m: AdamW(m.parameters(), lr=0.1, weight_decay=0.01, decouple_lr=True), norm=False)
    trainer = start(module, Initialize(partial(mup_width, base=narrow), seed=0), steps=2)
    groups = trainer.optimizers[0].param_groups
    assert [group["decay_lr"] for group in groups] == pytest.approx([group["lr"] for group in groups])
    assert len({group["decay_lr"] for group in groups}) > 1


def test_mup_on_resuming_splits_the_groups_and_draws_nothing(start, tmp_path):
    def train(steps, ckpt_path=None):
        module = Classifier(32, sgd, norm=False)
        trainer = start(
            module, Initialize(partial(mup_width, base=Classifier(8, norm=False))), steps=steps, ckpt_path=ckpt_path
        )
        return trainer, module

    trainer, module = train(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed, again = train(2, tmp_path / "two.ckpt")
    torch.testing.assert_close(weights(again), weights(module), rtol=0, atol=0)
    rates = [[group["lr"] for group in t.optimizers[0].param_groups] for t in (trainer, resumed)]
    assert rates[0] == rates[1] and len(set(rates[0])) == 3


def test_a_scheduler_that_overrides_the_rates_is_refused(start):
    def configure(module):
        optimizer = sgd(module)
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)]

    add_param_group = torch.optim.Optimizer.add_param_group
    with pytest.raises(
        ValueError, match=r"Initialize\(scheme=mup_width\): a scheduler has set a group's learning rate to"
    ):
        start(Classifier(32, configure, norm=False), Initialize(partial(mup_width, base=Classifier(8, norm=False))))
    assert torch.optim.Optimizer.add_param_group is add_param_group
