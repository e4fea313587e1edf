# SPDX-License-Identifier: Apache-2.0
"""docs/troubleshooting.md: every message it names is really said, in the situation that it names."""

import contextlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel, DemoModel
from lightning_utilities.core import rank_zero
from torch.optim.lr_scheduler import CyclicLR, StepLR

import lightning_optkit as ok
from lightning_optkit.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()


class Mine(torch.optim.AdamW):
    pass


class Module(BoringModel):
    def __init__(self, optimizer=torch.optim.AdamW, scheduler=None):
        super().__init__()
        self.of, self.by = optimizer, scheduler

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.binary_cross_entropy_with_logits(self(batch), torch.ones(1, 2))

    def configure_optimizers(self):
        optimizer = self.of(self.parameters(), lr=0.01)
        return optimizer if self.by is None else ([optimizer], [self.by(optimizer)])


def fit(*callbacks, module=None, ckpt_path=None, **arguments):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(callbacks=[*callbacks], accelerator="cpu", max_steps=8, **quiet, **arguments)
    trainer.fit(module or Module(), ckpt_path=ckpt_path)


def resumed(first, second, other=None):
    """A run that is saved after it has stopped within its first epoch, and one that goes on from it."""
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(callbacks=first, accelerator="cpu", max_steps=8, **quiet)
    trainer.fit(Module())
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(f"{folder}/saved.ckpt")
        again = pl.Trainer(callbacks=second, accelerator="cpu", max_steps=16, **quiet)
        again.fit(other or Module(), ckpt_path=f"{folder}/saved.ckpt")


class Fails(Module):
    """Saves and fails within its first window, once the gradients of half a batch are in it."""

    def on_after_backward(self):
        if self.trainer.fit_loop.batch_idx == 2:
            self.trainer.save_checkpoint(self.path)
            raise MemoryError


def resumed_within_a_window():
    with tempfile.TemporaryDirectory() as folder:
        module = Fails()
        module.path = f"{folder}/saved.ckpt"
        with contextlib.suppress(MemoryError):
            fit(ok.ExactResume(), module=module, accumulate_grad_batches=4)
        fit(ok.ExactResume(), ckpt_path=module.path, accumulate_grad_batches=4)


class Frozen(Module):
    def configure_optimizers(self):
        return self.of([self.layer.weight], lr=0.01)


class Renamed(Module):
    def __init__(self):
        super().__init__()
        self.other, self.layer = self.layer, None


class Wider(Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(32, 3)


def with_content(content):
    with tempfile.TemporaryDirectory() as folder:
        torch.save(content, f"{folder}/x.ckpt")
        fit(ok.Fuse(), ckpt_path=f"{folder}/x.ckpt")


def damaged_beside_weights():
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(callbacks=[ok.ExactResume()], accelerator="cpu", max_steps=1, **quiet)
    trainer.fit(Module())
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(f"{folder}/weights.ckpt", weights_only=True)
        Path(f"{folder}/damaged.ckpt").write_bytes(b"")
        fit(ok.ExactResume(), ckpt_path=f"{folder}/damaged.ckpt")


def average():
    return ok.WeightAveraging(ok.EMA(0.9))


def rate(**arguments):
    return ok.LRSchedule(ok.schedules.cosine(), **arguments)


def program(**content):
    args = {"trainer": {"logger": False}, **content}
    LightningCLI(DemoModel, BoringDataModule, run=False, save_config_callback=None, args=args)


def command(name, *words):
    boring = "lightning.pytorch.demos.boring_classes.BoringModel"
    with tempfile.TemporaryDirectory() as folder:
        main([name, "--model", boring, "--trainer.accelerator=cpu", f"--trainer.default_root_dir={folder}", *words])


# What the page has in the first column -> what brings it about.
CASES = {
    "Trainer(gradient_clip_val=1.0) clips too; keep one": lambda: fit(
        ok.GradientClipping(ok.ClipNorm(1.0)), gradient_clip_val=1.0
    ),
    "given twice": lambda: fit(ok.Fuse(), ok.Fuse()),
    "would put an average into the module too; use one of the two.": lambda: fit(average(), EMAWeightAveraging()),
    "CyclicLR has overwritten the optimizer's own learning rate and momentum": lambda: fit(
        rate(), module=Module(scheduler=lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=False))
    ),
    "configure_optimizers returns StepLR, and both would set the same learning rate": lambda: fit(
        rate(replace_schedulers=False), module=Module(scheduler=lambda optimizer: StepLR(optimizer, 1))
    ),
    "object has no attribute 'on_exception'": lambda: fit(ok.ClipNorm(1.0)),
    "on_exception() missing 1 required positional argument": lambda: fit(ok.Fuse),
    "more than one stateful callback of type": lambda: fit(rate(), rate()),
    "which folds in EMA(decay=0.9, start=1, every=1) and would average them unchanged": lambda: fit(
        ok.Fuse(), average(), ok.MaxNorm()
    ),
    "AdamW has no one-pass step; add Fuse()": lambda: fit(ok.ReleaseGradients()),
    "are in one group here, and in groups of the checkpoint with": lambda: resumed(
        [ok.ParameterGroups(), ok.Fuse()], [ok.Fuse()]
    ),
    "which this one lacks; resume with the parameters": lambda: resumed([ok.Fuse()], [ok.Fuse()], other=Frozen()),
    "its parameters are others than those of the checkpoint": lambda: resumed(
        [ok.Fuse()], [ok.Fuse()], other=Renamed()
    ),
    "have other shapes than those of the checkpoint": lambda: resumed([ok.Fuse()], [ok.Fuse()], other=Wider()),
    "and no checkpoint of Lightning": lambda: with_content({}),
    "that this run can use": damaged_beside_weights,
    "the optimizer state of the checkpoint is of AdamW": lambda: resumed(
        [ok.Fuse()], [ok.Fuse()], other=Module(torch.optim.SGD)
    ),
    "and this run leaves it out": lambda: resumed([average()], [ok.ExactResume()]),
    "goes on with the settings given here": lambda: resumed([average()], [ok.WeightAveraging(ok.EMA(0.75))]),
    "has learned of the norms is lost": lambda: resumed(
        [ok.GradientClipping(ok.AutoClip(10))], [ok.Fuse(), ok.GradientClipping(ok.ZClip())]
    ),
    "your dataloader is not resumable": lambda: resumed([], []),
    "goes on with the next epoch, and is not exact": lambda: resumed([], [ok.ExactResume()]),
    "the first step misses the gradients of its batches": resumed_within_a_window,
    "it is a folder, and none of a sharded checkpoint": lambda: fit(ok.Fuse(), ckpt_path="."),
    "the average reaches back over 1,000 steps, but sees 8": lambda: fit(ok.WeightAveraging(ok.EMA(0.999))),
    "percentiles go to 100": lambda: ok.AutoClip(0.1),
    "it runs as it is": lambda: fit(ok.Fuse(), module=Module(torch.optim.Rprop)),
    "changes torch.optim.AdamW": lambda: fit(ok.Fuse(), module=Module(Mine)),
    "the two passes agree exactly": lambda: fit(ok.RDrop()),
    "reference": lambda: print(ok.CAME(torch.nn.Linear(2, 2).parameters()).explain()),
    "Multiple subclasses with name AdamW": lambda: program(optimizer={"class_path": "AdamW", "init_args": {"lr": 0.1}}),
    "Expected a dot import path string": lambda: program(optimizer={"class_path": "NoSuchRule"}),
    "No --ckpt_path is given": lambda: command("test"),
    "--ckpt_path last: there is none": lambda: command("test", "--ckpt_path=last"),
    "nothing has these words": lambda: main(["list", "xyzzy"]),
}
OF_INFO = {"CUDA kernels", "autograd node"}
ELSEWHERE = {  # tested there
    "lightning_optkit runs without its compiled extension",
    "must be one of",
    "without their gradients of the open accumulation window",
}


def test_every_row_is_a_case():
    rows = [line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("| ")]
    named = {code for row in rows for code in re.findall(r"`([^`]+)`", row)}
    assert named - {"optkit info", "OPTKIT_CPU_ISA", "Fuse"} == {*CASES} | OF_INFO | ELSEWHERE


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("message", CASES)
def test_the_message_is_said(message, capsys, caplog, recwarn, monkeypatch):
    monkeypatch.setattr(rank_zero.log, "handlers", [caplog.handler])
    monkeypatch.setattr(rank_zero.log, "level", logging.INFO)
    said = ""
    try:
        CASES[message]()
    except (Exception, SystemExit) as error:
        said = str(error)
    shown = capsys.readouterr()
    said = "\n".join([said, shown.out, shown.err, caplog.text, *(str(warning.message) for warning in recwarn)])
    assert message in " ".join(said.split())


def test_what_belongs_to_the_installation():
    facts = ok.diagnostics.environment()
    assert OF_INFO <= {*facts}
    code = "import sys; sys.modules['lightning_optkit._C'] = None; import lightning_optkit as ok, torch; "
    code += "ok.AdamW(torch.nn.Linear(2, 2).parameters())"
    without = subprocess.run([sys.executable, "-c", code], env={**os.environ}, capture_output=True, text=True)
    assert "lightning_optkit runs without its compiled extension" in without.stderr, without.stderr
    if facts["extension"].startswith("compiled"):
        words = [sys.executable, "-m", "lightning_optkit", "info"]
        wrong = subprocess.run(words, env={**os.environ, "OPTKIT_CPU_ISA": "sse"}, capture_output=True, text=True)
        assert "must be one of" in wrong.stderr
