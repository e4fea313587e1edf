# SPDX-License-Identifier: Apache-2.0
"""Runs with Fuse are resumed, with it or without it, from checkpoints of either."""

import pytest
from fuse_cases import FORMS, OPTIMIZERS, PRECISIONS, assert_close, assert_equal, assert_moments_close, configured
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optkit.callbacks import Fuse

# The runs that save keep every epoch; those that resume keep none.
resuming = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks.*ModelCheckpoint")


def checkpointed(fit, regression, tmp_path, folder, *callbacks, configure, **kwargs):
    """An uninterrupted run of four epochs, and the checkpoint of its second."""
    keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
    module = regression(configure)
    trainer = fit(module, *callbacks, keep, epochs=4, enable_checkpointing=True, **kwargs)
    return module, trainer, tmp_path / folder / "epoch=1.ckpt"


@resuming
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", ["dict with a config", "one cycle"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resumed_equals_uninterrupted_bit_for_bit(regression, fit, tmp_path, name, form, precision):
    def configure(module):
        return FORMS[form](configured(name, fused=True)(module))

    arguments = dict(configure=configure, precision=precision, gradient_clip_val=0.1)
    whole, trainer, half = checkpointed(fit, regression, tmp_path, "fused", Fuse(), **arguments)
    resumed = regression(arguments.pop("configure"))
    resumed_trainer = fit(resumed, Fuse(), epochs=4, ckpt_path=half, **arguments)
    assert resumed_trainer.global_step == trainer.global_step == 8
    assert_equal(resumed, whole)
    assert_moments_close(resumed_trainer, trainer, tolerance=0)


@resuming
@pytest.mark.parametrize("with_fuse", ["before", "after"])
@pytest.mark.parametrize(
    "name, form",
    [*((name, "dict with a config") for name in OPTIMIZERS), ("sgd", "one cycle"), ("adamw", "one cycle")],
)
def test_a_checkpoint_continues_with_or_without_fuse(regression, fit, tmp_path, name, form, with_fuse):
    def configure(module):
        return FORMS[form](configured(name)(module))

    callbacks = [[Fuse()], []] if with_fuse == "before" else [[], [Fuse()]]
    whole, trainer, half = checkpointed(fit, regression, tmp_path, "first", *callbacks[0], configure=configure)
    resumed = regression(configure)
    resumed_trainer = fit(resumed, *callbacks[1], epochs=4, ckpt_path=half)
    assert resumed_trainer.global_step == trainer.global_step == 8
    assert_close(resumed, whole)


@resuming
@pytest.mark.parametrize("with_fuse", ["before", "after"])
@pytest.mark.parametrize("implementation", [dict(fused=True), dict(foreach=True), dict(fused=False)], ids=str)
def test_a_checkpoint_continues_in_torchs_own_implementation(regression, fit, tmp_path, implementation, with_fuse):
    """Under 16-mixed, where the loss scaler asks the optimizer whether it unscales by itself."""
    arguments = dict(configure=configured("adamw", **implementation), precision="16-mixed")
    callbacks = [[Fuse()], []] if with_fuse == "before" else [[], [Fuse()]]
    whole, _, half = checkpointed(fit, regression, tmp_path, "first", *callbacks[0], **arguments)
    resumed = regression(arguments.pop("configure"))
    fit(resumed, *callbacks[1], epochs=4, ckpt_path=half, **arguments)
    assert_close(resumed, whole)


@pytest.mark.parametrize("form", ["dict with a config", "one cycle"])
def test_a_checkpoint_saved_after_the_fit_resumes_too(regression, fit, tmp_path, form):
    def configure(module):
        return FORMS[form](configured("adamw")(module))

    whole, half = regression(configure), regression(configure)
    fit(whole, Fuse(), epochs=4)
    fit(half, Fuse(), epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    resumed = regression(configure)
    fit(resumed, Fuse(), epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert_equal(resumed, whole)
