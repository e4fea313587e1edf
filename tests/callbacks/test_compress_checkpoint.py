# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of whole fits with compressed moments: smaller, resumed by every kind of optimizer, damage refused."""

import copy
import re
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from test_after_a_fit import Classifier, loader

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import CompressCheckpoint, ExactResume, Fuse, WeightAveraging
from lightning_optkit.optimizers import AdamW

pytestmark = pytest.mark.filterwarnings("ignore")
ONE = dict(accumulate_grad_batches=1)
KINDS = {
    "torch's": (torch.optim.AdamW, []),
    "torch's SGD": (partial(torch.optim.SGD, momentum=0.9), []),
    "by Fuse": (torch.optim.AdamW, [partial(Fuse, verbose=False)]),
    "ours": (AdamW, []),
    "ours, int8": (partial(AdamW, state_dtype="int8"), []),
    "by Fuse, int8": (torch.optim.AdamW, [partial(Fuse, state_dtype="int8", verbose=False)]),
}
EACH = pytest.mark.parametrize("kind", KINDS)
INT8 = {"ours, int8", "by Fuse, int8"}


def written(make_trainer, folder, kind, dtype=None, beside=(), steps=4):
    """The checkpoint of step 4, written with compressed moments, and the module then."""
    cls, own = KINDS[kind]
    compress = [] if dtype is None else [CompressCheckpoint(dtype)]
    keep = ModelCheckpoint(folder, every_n_train_steps=4, save_top_k=-1, filename=f"{dtype} {{step}}")
    callbacks = [*(make() for make in own), *beside, *compress, keep]
    torch.manual_seed(0)
    module = Classifier(cls)
    make_trainer(*callbacks, **ONE, max_steps=steps, enable_checkpointing=True).fit(module, loader(), loader())
    return folder / f"{dtype} step=4.ckpt", module


def resumed(make_trainer, path, kind, beside=(), compresses=True):
    """The module of the fit that a checkpoint continues, and the state that it began with."""
    cls, own = KINDS[kind]
    module, began = Classifier(cls), {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            states = [trainer.optimizers[0].state[p] for p in pl_module.parameters()]
            began["states"] = copy.deepcopy(states)

    compress = [CompressCheckpoint()] if compresses else []
    trainer = make_trainer(*(make() for make in own), *beside, *compress, Look(), **ONE)
    torch.manual_seed(1)
    trainer.fit(module, loader(), loader(), ckpt_path=path)
    assert trainer.global_step == 9
    return module, began["states"]


def difference(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


def distance(one, other):
    """L2; a bias in front of a norm has gradients near 0, whose sign Adam amplifies."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum(float((p - q).detach().square().sum()) for p, q in pairs) ** 0.5


@EACH
@pytest.mark.parametrize("dtype", ["int8", torch.bfloat16], ids=str)
def test_a_checkpoint_is_smaller_and_a_run_goes_on_from_it(make_trainer, tmp_path, kind, dtype):
    path, before = written(make_trainer, tmp_path, kind, dtype, beside=[ExactResume()])
    plain, same = written(make_trainer, tmp_path, kind, beside=[ExactResume()])
    assert difference(before, same) == 0
    sizes = [each.stat().st_size / sum(p.numel() for p in before.parameters()) for each in (path, plain)]
    assert sizes[0] < sizes[1] or kind == "ours, int8"
    if kind in ("torch's", "ours", "by Fuse"):
        assert sizes[1] - sizes[0] == pytest.approx(8 - 2 - 8 / 128 if dtype == "int8" else 4, abs=0.1)
    module, _ = resumed(make_trainer, path, kind, [ExactResume()])
    exact, _ = resumed(make_trainer, plain, kind, [ExactResume()], compresses=False)
    assert distance(module, exact) < 0.2 * distance(exact, before)
    assert (difference(module, exact) > 0) == (kind not in INT8)


@EACH
def test_the_moments_are_those_that_were_saved_within_their_bounds(make_trainer, tmp_path, kind):
    path, _ = written(make_trainer, tmp_path, kind, "int8")
    plain, _ = written(make_trainer, tmp_path, kind)
    compressed, exact = (resumed(make_trainer, each, kind)[1] for each in (path, plain))
    for one, other in zip(compressed, exact, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if not isinstance(value, torch.Tensor) or name == "step" or value.dtype == torch.uint8:
                assert torch.equal(torch.as_tensor(one[name]), torch.as_tensor(value))
            else:
                least = float(value.abs().max()) * 2.0**-14
                torch.testing.assert_close(one[name], value, rtol=1 / 16 + 1e-6, atol=least)


@pytest.mark.parametrize("kind", ["ours", "by Fuse"])
def test_optimizers_of_this_package_load_it_without_the_callback(make_trainer, tmp_path, kind):
    path, _ = written(make_trainer, tmp_path, kind, "int8", [WeightAveraging(EMA(0.9))])
    found = [resumed(make_trainer, path, kind, [WeightAveraging(EMA(0.9))], compresses)[0] for compresses in (0, 1)]
    assert difference(*found) == 0


def test_an_average_and_a_correction_are_saved_as_they_are(make_trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    module = Classifier(partial(AdamW, rounding="split32", average=EMA(0.9)))
    trainer = make_trainer(
        CompressCheckpoint(), keep, **ONE, epochs=1, precision="bf16-true", enable_checkpointing=True
    )
    trainer.fit(module, loader(), loader())
    (states,) = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["optimizer_states"]
    for number, param in enumerate(module.parameters()):
        mine, state = states["state"][number], trainer.optimizers[0].state[param]
        assert torch.equal(mine["ema"], state["ema"]) and mine["exp_avg"].keys() == {"codes", "scale", "signed"}
        rest = mine.keys() - {"exp_avg", "exp_avg_sq"}
        assert all(torch.equal(mine[name], state[name]) for name in rest) and len(rest) == 4


class Two(Classifier):
    """Two optimizers of two kinds, by manual optimization."""

    automatic_optimization = False

    def configure_optimizers(self):
        params = list(self.parameters())
        return torch.optim.AdamW(params[:4], lr=0.01), AdamW(params[4:], lr=0.01)

    def training_step(self, batch, batch_idx):
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()


def test_several_optimizers(make_trainer, tmp_path):
    def fit(path=None, **kwargs):
        keep = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        torch.manual_seed(0)
        module = Two()
        trainer = make_trainer(CompressCheckpoint(), ExactResume(), keep, **ONE, enable_checkpointing=True, **kwargs)
        trainer.fit(module, loader(), loader(), ckpt_path=path)
        return module

    whole = fit(epochs=2)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["optimizer_states"]
    # The numbers are those of the module, so those of the second optimizer do not begin at 0.
    first = [next(iter(states["state"].values())) for states in saved]
    assert [state["exp_avg_sq"]["signed"] for state in first] == [False, False]
    assert 0 < difference(fit(tmp_path / "epoch=0.ckpt", epochs=2), whole) < 0.01


@pytest.mark.parametrize("kind", ["torch's", "ours"])
def test_a_damaged_file_is_refused_before_the_training(make_trainer, tmp_path, kind):
    path, _ = written(make_trainer, tmp_path, kind, "int8")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["optimizer_states"][0]["state"][0]["exp_avg"]["scale"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"the state .*'exp_avg'.* must hold 'scale'\.$"):
        resumed(make_trainer, path, kind)


@pytest.mark.parametrize("cls", [torch.optim.Rprop, torch.optim.LBFGS])
def test_an_optimizer_whose_state_is_not_known_is_refused(make_trainer, cls):
    with pytest.raises(ValueError) as refusal:
        make_trainer(CompressCheckpoint(), **ONE).fit(Classifier(cls), loader(), loader())
    assert str(refusal.value) == (
        f"CompressCheckpoint(state_dtype='int8'): of the state of {cls.__name__} it is not known which numbers are "
        f"moments (no one-pass rule for torch.optim.{cls.__name__}); use an optimizer of lightning_optkit."
    )


def test_a_strategy_that_splits_parameters_is_refused(make_trainer):
    callback = CompressCheckpoint()
    trainer = make_trainer(callback, **ONE)
    trainer.strategy.__class__ = ModelParallelStrategy
    with pytest.raises(ValueError, match=re.escape("CompressCheckpoint(...): ModelParallelStrategy is not supported")):
        callback.setup(trainer, Classifier(), "fit")


@pytest.mark.parametrize("dtype", ["int4", torch.float16, None, 8], ids=str)
def test_a_bad_dtype_is_refused(dtype):
    with pytest.raises((TypeError, ValueError), match=r"^CompressCheckpoint\(state_dtype=.*must be"):
        CompressCheckpoint(dtype)


def test_after_the_fit_torchs_optimizer_has_no_hook_left(make_trainer):
    trainer = make_trainer(CompressCheckpoint(), **ONE, epochs=1)
    trainer.fit(Classifier(torch.optim.AdamW), loader(), loader())
    assert not trainer.optimizers[0]._optimizer_load_state_dict_pre_hooks
