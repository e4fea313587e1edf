# SPDX-License-Identifier: Apache-2.0
"""Fuse with split weights and narrow state in `bf16-true` runs: checkpoints, averages, exports."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import ExactResume, Fuse, GradientClipping, WeightAveraging
from lightning_optkit.clipping import AutoClip
from lightning_optkit.optimizers.convert import full_precision_state_dict

pytestmark = pytest.mark.filterwarnings(  # Lightning's, of runs whose only checkpoint is that of an exception
    "ignore:.*fit.ckpt_path=(None|.last.)"
)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.02)


class Exporter(Callback):
    """What the optimizer exports, and what the module holds, in validation and at the end of the training."""

    def __init__(self):
        self.in_validation = self.shown = self.trained = None

    def on_validation_batch_end(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            self.in_validation = trainer.optimizers[0].full_precision_state_dict(pl_module)
            self.shown = {name: t.clone() for name, t in pl_module.state_dict().items()}

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.trained = trainer.optimizers[0].full_precision_state_dict(pl_module)


class Saver(Callback):
    """Saves a checkpoint after the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def saved_by(fit, module, tmp_path, *callbacks):
    """The checkpoint after the first of two epochs, in bf16."""
    fit(module, *callbacks, Saver(tmp_path / "first.ckpt"), precision="bf16-true", epochs=2)
    return tmp_path / "first.ckpt"


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "split32"])
@pytest.mark.parametrize("wanted", ["nearest", "split24", "split32"])
def test_the_rounding_asked_for_wins_over_that_of_the_checkpoint(regression, fit, tmp_path, recwarn, rounding, wanted):
    path = saved_by(fit, regression(adamw), tmp_path, Fuse(rounding=rounding))
    exporter = Exporter()
    seen = []

    class Peek(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append({group["rounding"] for group in trainer.optimizers[0].param_groups})

    fit(regression(adamw), Fuse(rounding=wanted), exporter, Peek(), precision="bf16-true", epochs=2, ckpt_path=path)
    assert seen
    assert all(roundings == {wanted} for roundings in seen)
    said = f"continues rounding={rounding!r} of the checkpoint as {wanted!r}"
    assert any(said in str(warning.message) for warning in recwarn) == (rounding != wanted)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"])
@pytest.mark.parametrize("chain", ["without", "without, with"])
def test_a_checkpoint_continues_without_fuse_and_with_it_again(regression, fit, tmp_path, state_dtype, chain):
    fuse = dict(rounding="split32", state_dtype=state_dtype, verbose=False)
    path = saved_by(fit, regression(adamw), tmp_path, Fuse(**fuse))
    module = regression(adamw)
    trainer = fit(module, precision="bf16-true", epochs=2, ckpt_path=path)
    if chain == "without, with":
        trainer.save_checkpoint(tmp_path / "plain.ckpt")
        module = regression(adamw)
        fit(module, Fuse(**fuse), precision="bf16-true", epochs=3, ckpt_path=tmp_path / "plain.ckpt")
    for weight in module.parameters():
        assert weight.isfinite().all()
        assert weight.abs().max() < 3  # with codes as moments it runs away


def test_in_validation_the_average_is_exported_in_fp32(regression, fit):
    exporter, average = Exporter(), WeightAveraging(EMA(0.9))
    fit(regression(adamw), Fuse(rounding="split32"), average, exporter, precision="bf16-true", limit_val_batches=1)
    for name, value in exporter.in_validation.items():
        assert torch.equal(value.bfloat16(), exporter.shown[name]), name
    assert any((v != exporter.shown[n].float()).any() for n, v in exporter.in_validation.items())


def test_the_weights_can_be_exported_after_the_fit(regression, fit):
    exporter, module = Exporter(), regression(adamw)
    trainer = fit(module, Fuse(rounding="split32"), exporter, precision="bf16-true", epochs=2)
    exported = full_precision_state_dict(trainer.optimizers[0], module)
    assert all(torch.equal(value, exporter.trained[name]) for name, value in exported.items())
    with torch.no_grad():
        next(module.parameters()).zero_()
    exported = full_precision_state_dict(trainer.optimizers[0], module)
    assert not exported[next(iter(dict(module.named_parameters())))].any()


@pytest.mark.parametrize("average", [EMA(0.8), SWA(), LAWA(k=3, every=2)], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "split24", "split32"])
def test_the_average_can_be_exported_after_the_fit(regression, fit, rounding, average):
    callback, module = WeightAveraging(average), regression(adamw)
    trainer = fit(module, Fuse(rounding=rounding), callback, precision="bf16-true", epochs=2)
    averages = {name: value.float() for name, value in callback.averaged_parameters(module).items()}
    exported = full_precision_state_dict(trainer.optimizers[0], module)
    assert averages and all(torch.equal(exported[name], value) for name, value in averages.items())
    assert all(torch.equal(exported[name].bfloat16(), p) for name, p in module.named_parameters())
    with torch.no_grad():
        next(module.parameters()).zero_()
    exported = full_precision_state_dict(trainer.optimizers[0], module)
    assert not exported[next(iter(dict(module.named_parameters())))].any()


@pytest.mark.parametrize("rounding", ["kahan", "split32"])
def test_a_second_fit_starts_from_the_average_that_the_module_holds(regression, fit, rounding):
    module, exporter = regression(adamw), Exporter()
    fit(module, Fuse(rounding=rounding), WeightAveraging(EMA(0.8)), precision="bf16-true", epochs=2)
    held = {name: p.detach().float() for name, p in module.named_parameters()}
    seen = []

    class Peek(Callback):
        def on_train_start(self, trainer, pl_module):
            seen.append(full_precision_state_dict(trainer.optimizers[0], pl_module))

    fit(module, Fuse(rounding=rounding), Peek(), exporter, precision="bf16-true", epochs=1)
    assert all(torch.equal(seen[0][name], value) for name, value in held.items())


def test_what_fuse_was_given_is_named(regression, fit):
    with pytest.raises(ValueError, match=r"^Fuse\(rounding='split32'\): a parameter of shape .* is float16"):
        fit(regression(adamw), Fuse(rounding="split32"), precision="16-true")


class Failure(Exception):
    pass


class Fails(Callback):
    """Ends the fit in its second epoch."""

    def __init__(self, exception):
        self.exception = exception

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 2):
            raise self.exception


BESIDE = {
    "nothing": lambda: [],
    "EMA": lambda: [WeightAveraging(EMA(0.8))],
    "LAWA": lambda: [WeightAveraging(LAWA(k=3))],
    "AutoClip": lambda: [GradientClipping(AutoClip(20, window=4))],
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("state_dtype", [torch.float32, "int8"], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan", "split24", "split32"])
def test_a_checkpoint_saved_on_an_exception_has_the_state_of_the_fused_step(
    regression, fit, tmp_path, rounding, state_dtype, beside
):
    def callbacks():
        return [Fuse(rounding=rounding, state_dtype=state_dtype, verbose=False), *BESIDE[beside](), ExactResume()]

    end = same_end(regression, fit, tmp_path, callbacks, Failure())
    assert any(value.dtype == torch.float32 for state in end.values() for value in state.values() if value.ndim)


@pytest.mark.parametrize("exception", [KeyboardInterrupt(), SIGTERMException()], ids=repr)
def test_so_has_one_saved_on_a_signal(regression, fit, tmp_path, exception):
    same_end(regression, fit, tmp_path, lambda: [Fuse(verbose=False), ExactResume()], exception)


def same_end(regression, fit, tmp_path, callbacks, exception):
    """The state of the optimizer at the end of the run, after a check that the resumed one ends with the same."""
    run, ends = dict(precision="bf16-true"), []
    stopped = regression(adamw)
    with pytest.raises((Failure, SystemExit, SIGTERMException)):
        fit(
            stopped,
            *callbacks(),
            Fails(exception),
            OnExceptionCheckpoint(tmp_path, "x"),
            enable_checkpointing=True,
            **run,
        )
    assert type(stopped.trainer.optimizers[0]) is torch.optim.AdamW
    assert "configure_optimizers" not in vars(stopped)
    for path in (tmp_path / "x.ckpt", None):
        module, save = regression(adamw), AtEnd()
        torch.manual_seed(0)
        fit(module, *callbacks(), save, ckpt_path=path, **run)
        ends.append((module.state_dict(), save.state))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    return ends[1][1]


class AtEnd(Callback):
    """Keeps the state of the optimizer at the end of the training."""

    def on_train_end(self, trainer, pl_module):
        self.state = trainer.optimizers[0].state_dict()["state"]


def test_a_fit_after_one_whose_checkpoint_could_not_be_saved(regression, fit, printed):
    class CannotSave(Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise OSError("no space")

    fuse, module = Fuse(), regression(adamw)
    with pytest.raises(OSError, match="no space"):
        fit(module, fuse, Fails(Failure()), CannotSave())
    trainer = fit(module, fuse)
    assert "step moves" in printed()
    assert "one-pass already" not in printed()
    assert type(trainer.optimizers[0]) is torch.optim.AdamW
    assert "configure_optimizers" not in vars(module)
