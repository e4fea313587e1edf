# SPDX-License-Identifier: Apache-2.0
"""PlateauSchedule: torch's rule, once per measurement, with LRSchedule, resumed, and with clear errors."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau

from lightning_optkit.callbacks import Fuse, LRSchedule, PlateauSchedule
from lightning_optkit.schedules import constant, linear, warmup

pytestmark = [  # Lightning's warnings about these short runs
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric"),
]
LR = 0.1
LOSSES = [1.0, 0.9, 0.95, 0.93, 0.9, 0.8, 0.8, 0.8, 0.9, 0.9]


def adam(module):
    first, _, last = module.net
    return torch.optim.Adam([{"params": first.parameters()}, {"params": last.parameters(), "lr": 3 * LR}], lr=LR)


@pytest.fixture
def scripted(regression):
    """scripted(losses, ...): a module whose validations log these losses, one after another."""

    class Scripted(regression):
        def __init__(self, configure=adam, losses=LOSSES, train=False):
            super().__init__(configure)
            self.losses, self.train_logs = losses, train

        def training_step(self, batch, batch_idx):
            if self.train_logs:
                self.log("scripted", self.losses[self.current_epoch], on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_validation_epoch_end(self):
            if not self.trainer.sanity_checking:
                self.log("scripted", self.losses[self.trainer.current_epoch])

    return Scripted


def quiet(*args, **kwargs):
    return PlateauSchedule("scripted", *args, verbose=False, **kwargs)


def rates_of_torch(losses, scale=1.0, **arguments):
    """The rate in each epoch."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=scale * LR)
    judge, rates = ReduceLROnPlateau(optimizer, **arguments), []
    for loss in losses:
        rates.append(optimizer.param_groups[0]["lr"])
        judge.step(loss)
    return rates


ARGUMENTS = [
    dict(patience=1),
    dict(patience=0, factor=0.5, min_lr=0.02),
    dict(patience=0, cooldown=2),
    dict(patience=1, threshold=0.2),
    dict(patience=1, threshold=0.06, threshold_mode="abs"),
    dict(patience=1, mode="max", eps=0.05),
]


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_judges_as_torch_does(fit, scripted, recorder, arguments, fused):
    callbacks = [*[Fuse(verbose=False)] * fused, quiet(**arguments), recorder]
    fit(scripted(), *callbacks, epochs=len(LOSSES), limit_val_batches=1, num_sanity_val_steps=1)
    for group, scale in enumerate((1, 3)):
        expected = rates_of_torch(LOSSES, scale, **arguments)
        assert len(set(expected)) > 1
        assert recorder.values("lr", group=group)[::2] == pytest.approx(expected)


def with_lightning(module):
    """The same rule, stepped by Lightning."""
    optimizer = adam(module)
    judge = {"scheduler": ReduceLROnPlateau(optimizer, patience=1), "monitor": "scripted", "strict": False}
    return {"optimizer": optimizer, "lr_scheduler": judge}


def test_a_validation_is_judged_once_where_lightning_judges_it_every_epoch(fit, scripted, recorder):
    losses = [1.0, 1.0, 1.0, 1.0, 0.5, 0.5]  # validated in epochs 1, 3 and 5
    arguments = dict(epochs=6, limit_val_batches=1, check_val_every_n_epoch=2)
    fit(scripted(losses=losses), quiet(patience=1), recorder, **arguments)
    assert set(recorder.values("lr")) == {LR}
    trainer = fit(scripted(with_lightning, losses), **arguments)
    assert trainer.optimizers[0].param_groups[0]["lr"] < LR  # two measurements, four judgements


def test_the_checkpoint_of_an_epoch_has_its_judgement_where_that_of_lightning_has_not(fit, scripted, tmp_path):
    arguments = dict(epochs=4, limit_val_batches=1, num_sanity_val_steps=0)
    for configure, callbacks, is_exact in ((adam, [quiet(patience=1)], True), (with_lightning, [], False)):
        folder = tmp_path / configure.__name__
        save = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        losses = [1.0, 1.0, 1.0, 0.5]
        whole = fit(scripted(configure, losses), *callbacks, save, enable_checkpointing=True, **arguments)
        resumed = fit(scripted(configure, losses), *callbacks, ckpt_path=folder / "epoch=2.ckpt", **arguments)
        rates = [trainer.optimizers[0].param_groups[0]["lr"] for trainer in (whole, resumed)]
        assert (rates[0] == rates[1]) is is_exact


@pytest.mark.parametrize("explicit", [None, True])
def test_a_metric_of_the_training(fit, scripted, recorder, explicit):
    module = scripted(train=True)
    limit = 0 if explicit is None else 1
    callback = quiet(patience=1, check_on_train_epoch_end=explicit)
    fit(module, callback, recorder, epochs=len(LOSSES), limit_val_batches=limit)
    assert recorder.values("lr")[::2] == pytest.approx(rates_of_torch(LOSSES, patience=1))


@pytest.mark.parametrize("order", [1, -1])
def test_lowers_what_lr_schedule_multiplies(fit, scripted, recorder, order):
    schedule = warmup(constant(), 5, start_factor=0.2)
    callbacks = [LRSchedule(schedule, verbose=False), quiet(patience=1)][::order]
    fit(scripted(), *callbacks, recorder, epochs=len(LOSSES), limit_val_batches=1)
    bases = rates_of_torch(LOSSES, patience=1)
    expected = [base * schedule(2 * epoch + step, 20) for epoch, base in enumerate(bases) for step in range(2)]
    assert recorder.values("lr") == pytest.approx(expected)


def test_a_tensor_is_filled(fit, scripted):
    rate = torch.tensor(LR)
    module = scripted(lambda m: torch.optim.AdamW(m.parameters(), lr=rate, foreach=False))
    fit(module, quiet(patience=0, factor=0.5), epochs=4, limit_val_batches=1)
    assert rate.item() == pytest.approx(LR / 4)


@pytest.mark.parametrize("composed", [False, True], ids=["alone", "LRSchedule"])
@pytest.mark.parametrize("at_epoch_end", [False, True], ids=["validation", "training"])
def test_resumed_equals_uninterrupted(fit, scripted, tmp_path, composed, at_epoch_end):
    def callbacks():
        schedules = [LRSchedule(linear(1.0, 0.5), verbose=False)] if composed else []
        return [*schedules, quiet(patience=1, check_on_train_epoch_end=at_epoch_end)]

    arguments = dict(epochs=len(LOSSES), limit_val_batches=0 if at_epoch_end else 1, num_sanity_val_steps=0)
    whole = scripted(train=at_epoch_end)
    save = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = fit(whole, *callbacks(), save, enable_checkpointing=True, **arguments)
    for epoch in (2, 3, 6):
        resumed = scripted(train=at_epoch_end)
        again = fit(resumed, *callbacks(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", **arguments)
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, resumed.state_dict()[name])
        rates = [[group["lr"] for group in t.optimizers[0].param_groups] for t in (trainer, again)]
        assert rates[0] == rates[1] and rates[0][0] < 0.9 * LR


def test_says_when_it_lowers_the_rate(fit, scripted, printed):
    fit(scripted(losses=[1.0, 2.0, 0.5]), PlateauSchedule("scripted", patience=0), limit_val_batches=1)
    assert "PlateauSchedule: scripted is 2; lr of Adam from 0.1 to 0.01" in printed()


class Broken(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        raise RuntimeError("broken")


@pytest.mark.parametrize("breaks", [False, True])
def test_the_module_is_as_it_was(fit, scripted, breaks):
    module, control = scripted(), scripted()
    fit(control, limit_val_batches=1)
    if breaks:
        with pytest.raises(RuntimeError, match="broken"):
            fit(module, quiet(), Broken(), limit_val_batches=1)
    else:
        fit(module, quiet(), limit_val_batches=1)
    assert vars(module).keys() == vars(control).keys()


# --- bad input ---


def test_a_metric_that_nobody_logs(fit, scripted):
    sentence = r"^PlateauSchedule\(monitor='val_acc'\): no metric of this name was logged; the metrics are: scripted, "
    with pytest.raises(ValueError, match=sentence):
        fit(scripted(), PlateauSchedule("val_acc"), limit_val_batches=1)


def test_a_run_without_validation(fit, regression):
    sentence = r"^PlateauSchedule\(monitor='val_loss'\): .+; this run validates nothing; the metrics are: train_loss\.$"
    with pytest.raises(ValueError, match=sentence):
        fit(regression(adam), PlateauSchedule("val_loss"))
    sentence = r"^PlateauSchedule\(check_on_train_epoch_end=False\): this run validates nothing; give it validation"
    with pytest.raises(ValueError, match=sentence):
        fit(regression(adam), PlateauSchedule("val_loss", check_on_train_epoch_end=False))


def test_beside_a_scheduler_of_the_module(fit, scripted):
    def with_scheduler(module):
        optimizer = adam(module)
        return [optimizer], [LinearLR(optimizer)]

    with pytest.raises(
        ValueError, match=r"^PlateauSchedule\(replace_schedulers=False\): .+ returns LinearLR, and both"
    ):
        fit(scripted(with_scheduler), quiet(replace_schedulers=False), limit_val_batches=1)
    trainer = fit(scripted(with_scheduler), quiet(), limit_val_batches=1)
    assert len(trainer.lr_scheduler_configs) == 1
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([LR, 3 * LR])


def test_a_monitor_is_a_name():
    with pytest.raises(
        TypeError, match=r"^PlateauSchedule\(monitor=3\): monitor must be a metric, such as \"val_loss\"\.$"
    ):
        PlateauSchedule(3)


@pytest.mark.parametrize(
    ("name", "value", "requirement"),
    [
        ("mode", "least", "must be one of 'min', 'max'"),
        ("factor", 1.0, r"must be in \(0, 1\)"),
        ("patience", -1, "must be an integer >= 0"),
        ("threshold", -0.1, r"must be in \[0, inf\)"),
        ("threshold_mode", "relative", "must be one of 'rel', 'abs'"),
        ("cooldown", 0.5, "must be an integer >= 0"),
        ("min_lr", -1.0, r"must be in \[0, inf\)"),
        ("eps", -1.0, r"must be in \[0, inf\)"),
    ],
)
def test_rejects_bad_arguments(name, value, requirement):
    with pytest.raises(
        (TypeError, ValueError), match=rf"^PlateauSchedule\({name}={value!r}\): {name} {requirement}\.$"
    ):
        PlateauSchedule("val_loss", **{name: value})
