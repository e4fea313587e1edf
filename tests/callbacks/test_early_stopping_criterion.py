# SPDX-License-Identifier: Apache-2.0
"""The stopping epoch on given curves, the restored weights, and equal decisions of a resumed run."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ModelPruning

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import EarlyStoppingCriterion, WeightAveraging

#           1    2    3    4     5     6    7    8    9    10
ERRORS = [3.0, 2.0, 1.0, 1.02, 1.04, 1.2, 1.3, 1.4, 0.9, 0.8]
TRAINING = [9.0, 8.0, 7.0, 6.0, 5.0, 4.99, 4.98, 4.97, 4.96, 4.95]


def curves(regression, errors=ERRORS, training=TRAINING, **arguments):
    class Curves(regression):
        """Given losses per epoch, over weights that change by one step of SGD each."""

        def training_step(self, batch, batch_idx):
            return (
                self.loss(batch) * 0
                + sum(p.sum() for p in self.parameters()) * 0
                + training[self.current_epoch]
                + (sum(p.sum() for p in self.parameters()) - sum(p.detach().sum() for p in self.parameters()))
            )

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", torch.tensor(errors[self.current_epoch]))

    return Curves(lambda m: torch.optim.SGD(m.parameters(), lr=0.01), **arguments)


class Weights(Callback):
    """The weights in validation, by epoch."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking and batch_idx == 0:
            self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def stopped(fit, module, *callbacks, **arguments):
    return fit(module, *callbacks, epochs=10, limit_val_batches=1.0, **arguments)


@pytest.mark.parametrize(
    ("criterion", "stop"),
    [
        (EarlyStoppingCriterion("GL", alpha=3.0), 5),
        (EarlyStoppingCriterion("GL", alpha=10.0), 6),
        (EarlyStoppingCriterion("GL", alpha=100.0), 10),
        # strips end at 2, 4, 6: PQ = 0, 2 / 83.3, 20 / 1.002
        (EarlyStoppingCriterion("PQ", alpha=0.02, strip=2), 4),
        (EarlyStoppingCriterion("PQ", alpha=0.03, strip=2), 6),  # in the middle of a strip, after 5, it is 4 / 100
        (EarlyStoppingCriterion("PQ", alpha=0.1, strip=2), 6),
        # ends of strips: 2.0, 1.02, 1.2, 1.4
        (EarlyStoppingCriterion("UP", successive=1, strip=2), 6),
        (EarlyStoppingCriterion("UP", successive=2, strip=2), 8),
        (EarlyStoppingCriterion("UP", successive=3, strip=2), 10),
        (EarlyStoppingCriterion("UP", successive=2, strip=1), 5),
    ],
    ids=lambda value: value.state_key if isinstance(value, EarlyStoppingCriterion) else None,
)
def test_it_stops_where_the_paper_says(regression, fit, criterion, stop):
    trainer = stopped(fit, curves(regression), criterion)
    assert trainer.current_epoch == stop
    assert criterion.stopped_at == (stop if stop < 10 else None)
    assert criterion.errors == pytest.approx(ERRORS[:stop])
    # Lightning divides by the two batches of an accumulation.
    assert criterion.training_errors == pytest.approx([error / 2 for error in TRAINING[:stop]], abs=1e-5)


@pytest.mark.parametrize("average", [[], [WeightAveraging(EMA(0.5))]], ids=["trained", "averaged"])
@pytest.mark.parametrize("order", [1, -1])
def test_the_best_weights_come_back_as_they_were_validated(regression, fit, average, order, printed):
    module, weights = curves(regression), Weights()
    stopped(fit, module, *[*average, EarlyStoppingCriterion("GL", alpha=10.0)][::order], weights)
    assert len(weights.seen) == 6
    torch.testing.assert_close(dict(module.named_parameters()), weights.seen[2], rtol=0, atol=0)
    assert "stops after validation 6: 20 % above the minimum." in printed()
    assert "weights of validation 3 of 6 restored, val_loss 1." in printed()


def test_the_last_weights_stay_if_asked(regression, fit):
    module, weights = curves(regression), Weights()
    stopped(fit, module, EarlyStoppingCriterion("GL", alpha=10.0, restore_best=False), weights)
    torch.testing.assert_close(dict(module.named_parameters()), weights.seen[5], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*ModelCheckpoint")
@pytest.mark.parametrize("criterion", ["GL", "PQ", "UP"])
@pytest.mark.parametrize("epoch", [0, 2, 4])
def test_a_resumed_run_stops_and_restores_as_the_uninterrupted_one(regression, fit, tmp_path, criterion, epoch):
    def make():
        return EarlyStoppingCriterion(criterion, alpha=10.0 if criterion == "GL" else 0.1, successive=1, strip=2)

    whole, resumed, uninterrupted, again = curves(regression), curves(regression), make(), make()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    stopped(fit, whole, uninterrupted, keep, enable_checkpointing=True)
    stopped(fit, resumed, again, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert uninterrupted.stopped_at == again.stopped_at == 6
    assert again.errors == uninterrupted.errors and again.training_errors == uninterrupted.training_errors
    torch.testing.assert_close(dict(resumed.state_dict()), dict(whole.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize(("restores", "best"), [(True, 2), (True, 5), (False, 2)])
def test_going_on_from_the_best_weights_is_said(regression, fit, tmp_path, restores, best):
    errors = [1.0 if epoch == best else 2.0 for epoch in range(10)]
    make = lambda: EarlyStoppingCriterion("GL", alpha=1e3, restore_best=restores)  # noqa: E731
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = fit(curves(regression, errors), make(), epochs=6, limit_val_batches=1.0)
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        fit(curves(regression, errors), make(), epochs=7, limit_val_batches=1.0, ckpt_path=tmp_path / "after.ckpt")
    said = [str(each.message) for each in said if "restore_best" in str(each.message)]
    assert len(said) == (restores and best == 2)
    assert all("resume from one that was saved during the fit." in each for each in said)


def test_a_second_fit_starts_anew(regression, fit):
    criterion = EarlyStoppingCriterion("GL", alpha=10.0)
    for _ in range(2):
        stopped(fit, curves(regression), criterion)
        assert criterion.stopped_at == 6 and len(criterion.errors) == 6


def test_an_error_that_is_not_finite_stops_at_once(regression, fit):
    criterion = EarlyStoppingCriterion("UP")
    stopped(fit, curves(regression, errors=[2.0, 1.0, math.nan, *ERRORS]), criterion)
    assert criterion.stopped_at == 3 and criterion._best


def test_lightnings_minimum_of_epochs_is_kept(regression, fit):
    assert stopped(fit, curves(regression), EarlyStoppingCriterion("GL", alpha=3.0), min_epochs=8).current_epoch == 8


@pytest.mark.parametrize("criterion", [EarlyStoppingCriterion("GL", monitor="loss"), EarlyStoppingCriterion("UP")])
def test_a_run_that_validates_nothing_is_told_so(regression, fit, criterion):
    said = (
        rf"^EarlyStoppingCriterion\(monitor='{criterion.monitor}'\): this run validates nothing, so that it is never "
    )
    with pytest.warns(UserWarning, match=said):
        fit(curves(regression), criterion, limit_val_batches=0)


def test_an_error_that_is_missing_or_not_positive_is_refused(regression, fit):
    with pytest.raises(
        RuntimeError, match=r"^EarlyStoppingCriterion\(monitor='x'\): .* not log it; it logs val_loss\.$"
    ):
        stopped(fit, curves(regression), EarlyStoppingCriterion(monitor="x"))
    with pytest.raises(ValueError, match=r"^generalization_loss\(errors=\[\.\.\., -1, \.\.\.\]\): every error must"):
        stopped(fit, curves(regression, errors=[-1.0] * 10), EarlyStoppingCriterion("GL"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(criterion="gl"), r"\(criterion='gl'\): criterion must be one of 'GL', 'PQ', 'UP'\.$"),
        (dict(alpha=0.0), r"\(alpha=0\.0\): alpha must be in \(0, inf\)\.$"),
        (dict(successive=0), r"\(successive=0\): successive must be an integer >= 1\.$"),
        (dict(strip=0), r"\(strip=0\): strip must be an integer >= 1\.$"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=r"^EarlyStoppingCriterion" + message):
        EarlyStoppingCriterion(**arguments)


def test_a_checkpoint_in_the_middle_of_an_epoch_keeps_its_training_losses():
    one, other = EarlyStoppingCriterion(), EarlyStoppingCriterion()
    one.on_train_batch_end(None, None, {"loss": torch.tensor(2.0)}, None, 0)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict() and one.state_dict()["losses"] == [2.0]


class Judged(pl.LightningModule):
    """Its validation error is lowest in epoch `best`; a snapshot of what it computes then is kept."""

    def __init__(self, best):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        self.best, self.outputs = best, []

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.outputs.append(self.net(batch[0]).clone())
        self.log("val_loss", 1.0 + abs(self.current_epoch - self.best))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("permanent", [True, False], ids=["made permanent", "masks stay"])
@pytest.mark.parametrize("best", [0, 1, 2])
def test_restores_weights_that_were_pruned_before_or_after(fit, data, best, permanent):
    module = Judged(best)
    pruning = ModelPruning("l1_unstructured", amount=0.3, make_pruning_permanent=permanent)
    fit(module, pruning, EarlyStoppingCriterion("GL", alpha=1e9, verbose=False), limit_val_batches=1.0, epochs=4)
    x = next(iter(data(4)))[0]
    module.net(x)  # the hook of a pruned layer writes its weight
    torch.testing.assert_close(module.net(x), module.outputs[best], rtol=0, atol=0)


class Adds(pl.Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            pl_module.net.register_buffer("extra", torch.zeros(1))


def test_says_when_the_module_has_become_another(fit):
    stopping = EarlyStoppingCriterion("GL", alpha=1e9, verbose=False)
    with pytest.raises(RuntimeError, match=r"^EarlyStoppingCriterion\(restore_best=True\): Judged .*'net.extra'"):
        fit(Judged(0), Adds(), stopping, limit_val_batches=1.0, epochs=4)
    fit(Judged(0), Adds(), EarlyStoppingCriterion("GL", alpha=1e9, restore_best=False), limit_val_batches=1.0, epochs=4)
