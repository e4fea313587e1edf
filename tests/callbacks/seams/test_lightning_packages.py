# SPDX-License-Identifier: Apache-2.0
"""Every callback under `import pytorch_lightning as pl`: the run, and the refusals, of `lightning.pytorch`."""

import importlib

import lightning.pytorch
import pytest
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.loops.fit_loop import _FitLoop
from test_after_a_fit import OPTIMIZERS, ROWS, SMALL, Classifier, loader
from torch import nn

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import (
    SAM,
    BatchRegime,
    Fuse,
    GradientClipping,
    GradientNoise,
    LRSchedule,
    WeightAveraging,
)
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.lightning_packages import is_a, is_overridden, loss_scaler, twins
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.schedules import constant

other = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")

PACKAGES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": other}
EACH_PACKAGE = pytest.mark.parametrize("package", PACKAGES)


def of_package(package, name):
    """`name`, such as "callbacks.Timer", in one of the packages."""
    path, _, last = name.rpartition(".")
    return getattr(importlib.import_module(f"{package}.{path}"), last)


def module_of(package, optimizer=torch.optim.SGD, **methods):
    """The Classifier, as a LightningModule of that package."""
    body = {name: value for name, value in vars(Classifier).items() if name not in ("__dict__", "__weakref__")}
    del body["__init__"]

    def init(self):
        super(made, self).__init__()
        self.net, self.optimizer, self.fails_at = Classifier().net, optimizer, None

    made = type("Classifier", (PACKAGES[package].LightningModule,), {**body, "__init__": init, **methods})
    return made()


def trainer_of(package, tmp_path, *callbacks, **arguments):
    given = {**SMALL, **arguments}
    return PACKAGES[package].Trainer(
        callbacks=[*callbacks], max_epochs=given.pop("epochs"), accelerator="cpu", default_root_dir=tmp_path,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **given,
    )  # fmt: skip


def fit(package, tmp_path, module, *callbacks, **arguments):
    trainer = trainer_of(package, tmp_path, *callbacks, **arguments)
    torch.manual_seed(0)
    trainer.fit(module, loader(), loader())
    return module


@pytest.mark.parametrize("name", ROWS)
def test_every_callback_gives_the_run_of_the_other_package(name, tmp_path):
    made = OPTIMIZERS.get(name, torch.optim.SGD)
    ours, theirs = (fit(package, tmp_path, module_of(package, made), ROWS[name]()) for package in PACKAGES)
    assert set(vars(theirs)) == set(vars(ours)), "nothing is left on the module"
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[key], value, rtol=0, atol=0)


# Objects of the user's package that a callback refuses by class.
REFUSED = {
    "SWA beside LRSchedule": (
        lambda package: [LRSchedule(constant()), of_package(package, "callbacks.StochasticWeightAveraging")(0.1)],
        r"^LRSchedule\(...\): StochasticWeightAveraging sets the learning rate itself",
    ),
    "SWA beside WeightAveraging": (
        lambda package: [
            WeightAveraging(EMA(0.9)), of_package(package, "callbacks.StochasticWeightAveraging")(0.1)
        ],
        r"StochasticWeightAveraging would put an average",
    ),
    "accumulation beside BatchRegime": (
        lambda package: [
            BatchRegime("full"), of_package(package, "callbacks.GradientAccumulationScheduler")({0: 1, 1: 2})
        ],
        "GradientAccumulationScheduler: both say when to step",
    ),
}  # fmt: skip


@EACH_PACKAGE
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_by_its_class_is_refused_of_either_package(package, case, tmp_path):
    callbacks, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        fit(package, tmp_path, module_of(package), *callbacks(package))


@EACH_PACKAGE
def test_a_module_that_clips_by_itself_is_seen(package, tmp_path):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        pass

    module = module_of(package, configure_gradient_clipping=configure_gradient_clipping)
    assert is_overridden("configure_gradient_clipping", module)
    assert not is_overridden("configure_gradient_clipping", module_of(package))
    with pytest.raises(ValueError, match="the module clips in configure_gradient_clipping; keep one"):
        fit(package, tmp_path, module, GradientClipping(ClipNorm(1.0)))


@EACH_PACKAGE
def test_a_callback_that_watches_gradients_is_seen(package):
    class Watches(PACKAGES[package].Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            pass

    assert is_overridden("on_before_optimizer_step", Watches())
    assert not is_overridden("on_before_optimizer_step", PACKAGES[package].Callback())
    assert not is_overridden("on_before_optimizer_step", Fuse())
    assert is_overridden("on_before_optimizer_step", GradientNoise())


@EACH_PACKAGE
def test_a_module_without_forward_is_refused(package, tmp_path):
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0].flatten(1)), batch[1])

    body = {
        "training_step": training_step,
        "validation_step": None,
        "forward": PACKAGES[package].LightningModule.forward,
    }
    averaging = WeightAveraging(EMA(0.9), update_bn=True)
    with pytest.raises(ValueError, match=r"\(update_bn=True\): Classifier must define forward\(x\)"):
        fit(package, tmp_path, module_of(package, **body), averaging, limit_val_batches=0)


@EACH_PACKAGE
def test_the_loss_scaler_is_found_and_used(package, tmp_path):
    precision = of_package(package, "plugins.precision.MixedPrecision")("16-mixed", "cpu")
    trainer = trainer_of(package, tmp_path, SAM(), plugins=[precision])
    assert loss_scaler(trainer) is precision.scaler is not None
    assert loss_scaler(trainer_of(package, tmp_path)) is None
    trainer.fit(module_of(package), loader(), loader())
    assert trainer.global_step == 6


def test_a_class_stands_for_that_of_the_other_package():
    theirs = other.callbacks.StochasticWeightAveraging
    assert twins(StochasticWeightAveraging) == (StochasticWeightAveraging, theirs)
    assert twins(_FitLoop) == (_FitLoop, of_package("pytorch_lightning", "loops.fit_loop._FitLoop"))
    assert twins(nn.Linear) == (nn.Linear,)
    swa = theirs(0.1)
    assert is_a(swa, StochasticWeightAveraging) and is_a(swa, nn.Module, Callback) and not is_a(swa, nn.Module)
    trainer = other.Trainer(callbacks=[swa], logger=False, enable_checkpointing=False, accelerator="cpu")
    assert callbacks_of(trainer, StochasticWeightAveraging) == [swa]


def test_without_the_other_package_a_class_stands_for_itself(monkeypatch):
    monkeypatch.setattr("sys.modules", {})
    assert twins(StochasticWeightAveraging) == (StochasticWeightAveraging,)
