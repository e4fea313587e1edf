# SPDX-License-Identifier: Apache-2.0
"""HyperparameterSchedule of the entries of groups: the value that each optimizer step saw, or a refusal."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from hyperparameter_schedule_cases import RUN, adamw, expected, scheduled, sgd, with_dropouts
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_optkit.callbacks import Fuse, LRSchedule, ScheduleFree
from lightning_optkit.optimizers import (
    SGD,
    Adafactor,
    Adagrad,
    AdEMAMix,
    Lion,
    Muon,
    Prodigy,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
)
from lightning_optkit.schedules import constant, cosine, linear, one_cycle, piecewise_constant, warmup

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

regularized = pytest.fixture(with_dropouts)

ENTRIES = {
    "weight_decay": (adamw, "weight_decay", None, 0.2),
    "beta1": (adamw, "betas", 0, 0.8),
    "betas[1]": (adamw, "betas", 1, 0.99),
    "momentum": (sgd, "momentum", None, 0.9),
    "alpha": (lambda m: torch.optim.RMSprop(m.parameters()), "alpha", None, 0.99),
    "alpha of AdEMAMix": (lambda m: AdEMAMix(m.parameters(), alpha=2.0), "alpha", None, 2.0),
    "rho": (lambda m: torch.optim.Adadelta(m.parameters()), "rho", None, 0.9),
    "beta2_decay": (lambda m: Adafactor(m.parameters()), "beta2_decay", None, -0.8),
    "eps": (adamw, "eps", None, 1e-8),
    "l1": (lambda m: Lion(m.parameters(), l1=0.01), "l1", None, 0.01),
}


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
@pytest.mark.parametrize("name", ENTRIES)
def test_each_step_sees_its_value(fit, regression, recorder, name, fused):
    configure, key, index, base = ENTRIES[name]
    schedule = warmup(cosine(0.5), 2)
    entry = name.removesuffix(" of AdEMAMix")
    fit(regression(configure), *[Fuse(verbose=False)] * fused, scheduled(entry, schedule), recorder)
    seen = recorder.values(key)
    assert (seen if index is None else [pair[index] for pair in seen]) == expected(schedule, base)
    if index is not None:
        kept = {pair[1 - index] for pair in seen}
        assert kept == {(0.8, 0.99)[1 - index]} and {type(pair) for pair in seen} == {tuple}


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_the_weights_are_those_of_torch_with_the_value_set_by_hand(fit, regression, fused):
    class ByHand(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            group = trainer.optimizers[0].param_groups[0]
            group["weight_decay"] = 0.2 * linear()(trainer.global_step, RUN)
            group["betas"] = (0.8 * linear()(trainer.global_step, RUN), 0.99)

    ours, theirs = regression(adamw), regression(adamw)
    callbacks = [scheduled("weight_decay", linear()), scheduled("beta1", linear())]
    fit(ours, *[Fuse(verbose=False)] * fused, *callbacks)
    fit(theirs, ByHand())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-6, atol=1e-7)


def test_momentum_moves_against_the_rate_in_one_cycle(fit, regression, recorder):
    module = regression(sgd)
    down = scheduled("momentum", one_cycle(div_factor=0.85 / 0.95, final_div_factor=1.0), base=0.85)
    fit(module, LRSchedule(one_cycle(), verbose=False), down, recorder)
    by_torch = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(by_torch, max_lr=0.1, total_steps=RUN)
    for rate, momentum in zip(recorder.values("lr"), recorder.values("momentum"), strict=True):
        assert rate == pytest.approx(by_torch.param_groups[0]["lr"])
        assert momentum == pytest.approx(by_torch.param_groups[0]["momentum"])
        by_torch.step()
        cycle.step()


def test_each_group_keeps_its_own_base(fit, regression, recorder):
    def two_groups(module):
        first, _, last = module.net
        return torch.optim.AdamW(
            [{"params": first.parameters()}, {"params": last.parameters(), "weight_decay": 0.0}], weight_decay=0.4
        )

    fit(regression(two_groups), scheduled("weight_decay", linear()), recorder)
    assert recorder.values("weight_decay") == expected(linear(), 0.4)
    assert recorder.values("weight_decay", group=1) == [0.0] * RUN


def test_a_base_serves_all_groups(fit, regression, recorder):
    fit(regression(sgd), scheduled("weight_decay", linear(0.0, 1.0), base=0.1), recorder)
    assert recorder.values("weight_decay") == expected(linear(0.0, 1.0), 0.1)


def test_counts_in_epochs(fit, regression, recorder):
    fit(regression(adamw), scheduled("weight_decay", linear(), "epoch"), recorder)
    assert recorder.values("weight_decay") == expected(linear(), 0.2, [0, 0, 1, 1, 2, 2], 3)


# --- resuming, logging ---


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_resumed_equals_uninterrupted(fit, regression, tmp_path, fused):
    def callbacks():
        names = ("weight_decay", "beta1", "beta2")
        return [*[Fuse(verbose=False)] * fused, *(scheduled(name, warmup(linear(), 0.3), "sample") for name in names)]

    whole, resumed = regression(adamw), regression(adamw)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = fit(whole, *callbacks(), save, enable_checkpointing=True)
    again = fit(resumed, *callbacks(), ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name])
    first, second = (t.optimizers[0].param_groups[0] for t in (trainer, again))
    assert (first["weight_decay"], first["betas"]) == (second["weight_decay"], second["betas"])


def test_logs_the_value_of_each_step(fit, regression, tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [scheduled("beta1", linear()), scheduled("eps", linear(), log=False)]
    fit(regression(adamw), *callbacks, logger=logger, log_every_n_steps=1)
    with open(logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    assert "eps" not in rows[0]
    logged = [float(row["betas[0]"]) for row in rows if row["betas[0]"]]
    assert list(dict.fromkeys(logged)) == pytest.approx([0.8 * linear()(t, RUN) for t in range(RUN)], rel=1e-6)


# --- bad input ---


def test_an_unknown_name_lists_those_that_exist(fit, regression, regularized):
    sentence = (
        r"^HyperparameterSchedule\(name='wd'\): nothing here has it; there are momentum, dampening, weight_decay, "
        r"dropout, gradient_clip_val\.$"
    )
    with pytest.raises(ValueError, match=sentence):
        fit(regularized, scheduled("wd", linear()), gradient_clip_val=1.0)
    with pytest.raises(ValueError, match=r"there are betas\[0\], betas\[1\], eps, weight_decay\.$"):
        fit(regression(adamw), scheduled("betas[2]", linear()))


@pytest.mark.parametrize("name", ["nesterov", "ns_steps", "params", "gradient_clip_val", "dropout", "average_decay"])
def test_what_is_no_number_or_not_there_is_unknown(fit, regression, name):
    with pytest.raises(ValueError, match=rf"^HyperparameterSchedule\(name='{name}'\): nothing here has it"):
        fit(regression(sgd), scheduled(name, linear()))


KEPT = {  # what a rule learns or starts from, and counts
    "d": Prodigy,
    "d_max": Prodigy,
    "d_numerator": Prodigy,
    "d0": Prodigy,
    "slice_p": Prodigy,
    "lr_max": ScheduleFreeAdamW,
    "train_mode": ScheduleFreeSGD,
    "warmup_steps": ScheduleFreeSGD,
    "beta3_warmup": AdEMAMix,
    "alpha_warmup": AdEMAMix,
    "ns_steps": Muon,
    "initial_accumulator_value": Adagrad,
    "rounding_seed": SGD,
}


@pytest.mark.parametrize("base", [None, 0.5])
@pytest.mark.parametrize("name", KEPT)
def test_what_a_rule_keeps_for_itself_is_refused_before_anything_runs(fit, regression, recorder, name, base):
    rule = KEPT[name]
    sentence = (
        rf"^HyperparameterSchedule\(name='{name}'\): {rule.__name__} keeps it for itself; there are [^.]*weight_decay"
    )
    module = regression(lambda m: rule([p for p in m.parameters() if rule is not Muon or p.ndim == 2]))
    with pytest.raises(ValueError, match=sentence) as caught:
        fit(module, scheduled(name, linear(), base=base), ScheduleFree(), recorder)
    offered = str(caught.value).split("there are ")[1]
    assert not set(KEPT) & set(offered.rstrip(".").split(", "))
    assert not recorder.steps


@pytest.mark.parametrize(
    ("configure", "name"),
    [
        (lambda m: torch.optim.Adagrad(m.parameters(), initial_accumulator_value=0.1), "initial_accumulator_value"),
        (lambda m: torch.optim.Muon([p for p in m.parameters() if p.ndim == 2]), "ns_steps"),
        (lambda m: Unknown(m.parameters(), dict(lr=0.1, lr_max=0.5, d=1.0, weight_decay=0.1)), "lr_max"),
        (lambda m: Unknown(m.parameters(), dict(lr=0.1, lr_max=0.5, d=1.0, weight_decay=0.1)), "d"),
    ],
)
def test_what_a_rule_of_another_package_keeps_is_refused_too(fit, regression, configure, name):
    with pytest.raises(ValueError, match=rf"^HyperparameterSchedule\(name='{name}'\): \w+ keeps it for itself; "):
        fit(regression(configure), scheduled(name, linear()))


class Unknown(torch.optim.Optimizer):
    """A rule that nobody here knows."""


def test_a_setting_of_one_rule_may_have_the_name_of_what_another_learns(fit, regression, recorder):
    configure = lambda m: Adafactor(m.parameters(), d=2.0)  # noqa: E731
    fit(regression(configure), scheduled("d", constant()), recorder)
    assert recorder.values("d") == [2.0] * RUN


def test_a_base_of_zero_needs_a_value(fit, regression):
    with pytest.raises(ValueError, match=r"^HyperparameterSchedule\(name='weight_decay'\): it is 0 everywhere, and"):
        fit(regression(sgd), scheduled("weight_decay", linear()))


def test_a_value_outside_its_range_raises_before_training(fit, regression, recorder):
    upward = piecewise_constant([3], [1.0, 1.2])
    sentence = r"momentum would be 1.08 at step 3; it must be in \[0, 1\)\.$"
    with pytest.raises(ValueError, match=rf"^HyperparameterSchedule\(schedule=piecewise_constant\(.+\)\): {sentence}"):
        fit(regression(sgd), scheduled("momentum", upward), recorder)
    assert not recorder.steps


def test_a_value_behind_the_last_step_must_be_in_its_range_too(fit, regression, recorder):
    with pytest.raises(ValueError, match=r"gradient_clip_val would be 0 at step 6; it must be in \(0, inf\)\.$"):
        fit(regression(sgd), scheduled("gradient_clip_val", cosine()), recorder, gradient_clip_val=1.0)
    assert not recorder.steps


@pytest.mark.parametrize(
    ("name", "base", "interval"),
    [("momentum", 1.0, r"\[0, 1\)"), ("dropout", 1.5, r"\[0, 1\]"), ("gradient_clip_val", 0.0, r"\(0, inf\)")],
)
def test_rejects_a_base_outside_its_range(name, base, interval):
    with pytest.raises(ValueError, match=rf"^HyperparameterSchedule\(base={base}\): base must be in {interval}\.$"):
        scheduled(name, linear(), base=base)


def test_a_name_is_a_string():
    with pytest.raises(
        TypeError,
        match=r"^HyperparameterSchedule\(name=3\): name must be a hyper-parameter, such as \"weight_decay\"\.$",
    ):
        scheduled(3, linear())


def test_the_learning_rate_has_a_callback_of_its_own():
    with pytest.raises(ValueError, match=r"^HyperparameterSchedule\(name='lr'\): use LRSchedule for the learning rate"):
        scheduled("lr", linear())


def test_two_of_one_name_raise(fit, regression):
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `HyperparameterSchedule`"):
        fit(regression(adamw), scheduled("beta1", linear()), scheduled("betas[0]", linear()))


def test_a_schedule_longer_than_the_run(fit, regression):
    with pytest.raises(
        ValueError, match=r"^HyperparameterSchedule\(schedule=cosine\(.+\)\): the run has 6 optimizer st"
    ):
        fit(regression(adamw), scheduled("eps", cosine(steps=7)))
