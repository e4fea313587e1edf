# SPDX-License-Identifier: Apache-2.0
"""A clip with other settings, or of another kind, than in the run that saved the checkpoint."""

import warnings

import lightning.pytorch as pl
import pytest
import torch

import lightning_optkit as ok
from tests.callbacks.seams.line import Line, eight_batches

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 8  # of an epoch
FUSED = pytest.mark.parametrize("fused", [True, False], ids=["fused", "own pass"])


def fit(clip, fused, epochs=2, ckpt_path=None):
    """The Trainer, the weights, what the clip has learned, and what is said of it."""
    data = eight_batches()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    clipping = ok.GradientClipping(clip)
    callbacks = [*([ok.Fuse(verbose=False)] if fused else []), clipping]
    trainer, module = (
        pl.Trainer(callbacks=callbacks, accelerator="cpu", max_epochs=epochs, **quiet),
        Line(torch.optim.SGD),
    )
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        trainer.fit(module, data, ckpt_path=ckpt_path)
    said = [str(each.message) for each in records if "the checkpoint was saved with" in str(each.message)]
    return trainer, module.net.weight.detach(), clipping.state_dict()["learned"], said


class Saves(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


@pytest.fixture(params=[True, False], ids=["saved fused", "saved own pass"])
def saved(request, tmp_path):
    """saved(clip): a file after the first epoch, saved within the fit."""

    def save(clip):
        path = tmp_path / "saved.ckpt"
        data = eight_batches()
        quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        fuse = [ok.Fuse(verbose=False)] if request.param else []
        callbacks = [*fuse, ok.GradientClipping(clip), Saves(path)]
        pl.Trainer(callbacks=callbacks, accelerator="cpu", max_epochs=1, **quiet).fit(Line(torch.optim.SGD), data)
        return path

    return save


@pytest.mark.parametrize(
    "before, now",
    [
        ("AutoClip(percentile=30, window=1000)", ok.AutoClip(60)),
        ("AutoClip(percentile=30, window=1000)", ok.AutoClip(30, window=5)),
        ("AutoClip(percentile=30, window=5)", ok.AutoClip(30)),
    ],
    ids=str,
)
def test_a_history_goes_on_with_the_settings_given_now(saved, before, now):
    file = saved(eval(before, {"AutoClip": ok.AutoClip}))
    (_, fused, learned, said), (_, own_pass, learned_apart, said_apart) = (
        fit(now, fused, ckpt_path=file) for fused in (True, False)
    )
    torch.testing.assert_close(fused, own_pass, rtol=0, atol=1e-6)
    assert said_apart == said
    assert said == [
        f"GradientClipping({now!r}): the checkpoint was saved with {before}; what that has learned of the norms goes "
        "on with the settings given here."
    ]
    held = min(now.window, 2 * STEPS if "1000" in before else 5 + STEPS)
    for each in (learned, learned_apart):
        assert int(each[0]["history"].isfinite().sum()) == held


def test_so_does_what_zclip_has_learned(saved):
    file = saved(ok.ZClip(warmup_steps=3))
    for fused in (True, False):
        _, _, learned, said = fit(ok.ZClip(z_threshold=1.0, warmup_steps=3), fused, ckpt_path=file)
        assert learned[0]["learned"][2] == 2 * STEPS and len(said) == 1


@FUSED
def test_another_kind_begins_anew_and_says_what_is_lost(saved, fused):
    _, _, learned, said = fit(ok.ZClip(warmup_steps=3), fused, ckpt_path=saved(ok.AutoClip(30)))
    assert learned[0]["learned"][2] == STEPS
    assert said == [
        "GradientClipping(ZClip(z_threshold=2.5, alpha=0.97, warmup_steps=3)): the checkpoint was saved with AutoClip("
        "percentile=30, window=1000), and what that has learned of the norms is lost: this one begins anew; give the "
        "same clip to keep it."
    ]


@FUSED
@pytest.mark.parametrize("before", [ok.ClipNorm(0.1), ok.AutoClip(30)], ids=str)
def test_nothing_is_said_where_nothing_is_lost(saved, fused, before):
    file = saved(before)
    for now in (ok.ClipNorm(0.2), before):
        assert fit(now, fused, ckpt_path=file)[3] == []
