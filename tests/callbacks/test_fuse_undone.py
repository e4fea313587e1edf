# SPDX-License-Identifier: Apache-2.0
"""After a fit with Fuse, however it ended, the module and its optimizers are as before."""

import contextlib

import pytest
import torch
from fuse_cases import assert_close, configured, keys_after_a_plain_fit
from lightning.pytorch.callbacks import Callback

from lightning_optkit.callbacks import Fuse


class Stop(Exception):
    pass


class Failing(Callback):
    """Raises in one hook."""

    def __init__(self, hook):
        setattr(self, hook, self._fail)

    def _fail(self, *args, **kwargs):
        raise Stop


def torch_again(optimizer):
    groups = [set(group) for group in optimizer.param_groups]
    expected = torch.optim.AdamW([torch.ones(1, requires_grad=True)]).param_groups[0]
    return type(optimizer) is torch.optim.AdamW and all(group == set(expected) for group in groups)


@pytest.mark.parametrize("hook", [None, "setup", "on_fit_start", "on_train_batch_end", "on_train_end", "teardown"])
def test_leaves_module_and_optimizers_as_they_were(regression, fit, hook):
    """Also if the fit fails, in any hook."""
    built = []

    def configure(module):
        built.append(configured()(module))
        return built[-1]

    module = regression(configure)
    failing = [Failing(hook)] if hook else []
    with pytest.raises(Stop) if hook else contextlib.nullcontext():
        fit(module, Fuse(), *failing, gradient_clip_val=0.1)
    assert set(vars(module)) <= keys_after_a_plain_fit(regression, fit)
    assert all(torch_again(optimizer) for optimizer in built)


def test_leaves_the_module_as_it_was_after_an_exception_in_training_step(regression, fit):
    class Raising(regression):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise Stop
            return super().training_step(batch, batch_idx)

    module = Raising(configured())
    with pytest.raises(Stop):
        fit(module, Fuse(), gradient_clip_val=0.1)
    assert set(vars(module)) <= keys_after_a_plain_fit(regression, fit)
    assert torch_again(module.trainer.optimizers[0])


def test_fit_twice_with_one_callback(regression, fit):
    modules, fuse = [regression(configured()) for _ in range(2)], Fuse()
    for _ in range(2):
        fit(modules[0], gradient_clip_val=0.1)
        fit(modules[1], fuse, gradient_clip_val=0.1)
    assert_close(modules[1], modules[0])


def test_one_trainer_fits_on(regression, fit, data):
    modules = [regression(configured()) for _ in range(2)]
    for module, callbacks in zip(modules, ([], [Fuse()]), strict=True):
        trainer = fit(module, *callbacks, epochs=2)
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, data(), data())
    assert_close(modules[1], modules[0])


def test_an_optimizer_that_the_module_keeps_is_converted_anew_in_every_fit(regression, fit):
    """Its second fit has no clip: the folded clip of the first must be gone."""

    class Keeping(regression):
        def __init__(self):
            super().__init__(None)
            self.optimizer = configured("adamw")(self)

        def configure_optimizers(self):
            return self.optimizer

    modules = [Keeping(), Keeping()]
    fit(modules[0], gradient_clip_val=1e-3, precision="16-mixed")
    fit(modules[1], Fuse(), gradient_clip_val=1e-3, precision="16-mixed")
    assert not getattr(modules[1].optimizer, "clip", None)
    assert not getattr(modules[1].optimizer, "_step_supports_amp_scaling", False)
    fit(modules[0], precision="16-mixed")
    fit(modules[1], Fuse(), precision="16-mixed")
    assert_close(modules[1], modules[0])


def test_validation_alone_converts_nothing(regression, make_trainer, data):
    module = regression(configured())
    make_trainer(Fuse(), limit_val_batches=1.0).validate(module, data(), verbose=False)
    assert "configure_optimizers" not in vars(module)


def test_a_failing_configure_optimizers_shows_its_own_error(regression, fit):
    def configure(module):
        raise Stop

    module = regression(configure)
    with pytest.raises(Stop):
        fit(module, Fuse())
    assert "configure_optimizers" not in vars(module)
