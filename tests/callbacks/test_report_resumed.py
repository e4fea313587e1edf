# SPDX-License-Identifier: Apache-2.0
"""The record of Report is saved, resumed, pickled, and begun anew by a second fit."""

import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from report_cases import CLIP, STEPS, adamw, only_record

from lightning_optkit.callbacks import Fuse, Report


@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_has_the_record_of_the_whole_run(regression, fit, tmp_path, fused):
    def callbacks(report):
        return [*[Fuse(verbose=False)] * fused, report]

    kwargs = dict(gradient_clip_val=CLIP, limit_val_batches=1.0)
    whole, first, second = only_record(), only_record(), only_record()
    fit(regression(adamw), *callbacks(whole), **kwargs)

    def saving():
        return ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)

    fit(regression(adamw), *callbacks(first), saving(), epochs=1, enable_checkpointing=True, **kwargs)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert saved["callbacks"]["Report"]["num_steps"] == 2
    kwargs |= dict(enable_checkpointing=True, ckpt_path=tmp_path / "epoch=0.ckpt")
    fit(regression(adamw), *callbacks(second), saving(), **kwargs)
    for name in ("loss", "grad_norm", "grad_norm_clipped", "learning_rate", "num_steps"):
        assert getattr(second.record, name) == getattr(whole.record, name), name
    assert second.record.metrics["val_loss"].steps == whole.record.metrics["val_loss"].steps


def test_a_second_fit_starts_a_new_record(regression, fit):
    report = only_record()
    for _ in range(2):
        fit(regression(adamw), report, epochs=1)
    assert report.record.loss.steps == [1, 2]


def test_can_be_pickled(regression, fit):
    report = only_record()
    fit(regression(adamw), report)
    assert pickle.loads(pickle.dumps(report)).record == report.record


@pytest.mark.parametrize("state", [None, {}, {"name": 3}, [], {"loss": {}}], ids=str)
def test_a_damaged_state_is_refused_by_name(state):
    report = Report()
    before = report.record
    with pytest.raises((TypeError, ValueError), match=r"^Report\.load_state_dict\(state_dict"):
        report.load_state_dict(state)
    assert report.record is before


def test_seconds_go_on_when_a_run_is_resumed(regression, fit, tmp_path):
    first, second = only_record(), only_record()
    trainer = fit(regression(adamw), first, epochs=1)
    first.record.elapsed_s.values[-1] += 100.0
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(regression(adamw), second, ckpt_path=tmp_path / "half.ckpt")
    assert second.record.elapsed_s.values[2] > 100.0 and second.record.elapsed_s.steps == STEPS
    assert second.record.settings["date"] == first.record.settings["date"]
