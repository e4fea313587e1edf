# SPDX-License-Identifier: Apache-2.0
"""docs/configuration.md: its program and its files run, and every fragment makes what it names."""

import logging
import re
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning_utilities.core import rank_zero
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok
from lightning_optkit.cli import main
from lightning_optkit.diagnostics import RunRecord
from lightning_optkit.recipes import recipe_text

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
FILES = {match[1]: text for _, text in BLOCKS if (match := re.match(r"# (\S+)\n", text))}
FRAGMENTS = [text for kind, text in BLOCKS if kind == "yaml" and not text.startswith("#")]
LINES = [line.partition("#")[0].split() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
COMMANDS = [words for words in LINES if words]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false"]
QUIET += ["--trainer.enable_progress_bar=false", "--trainer.limit_train_batches=4"]

pytestmark = pytest.mark.filterwarnings("ignore")


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.l1, self.l2 = nn.Linear(8, 16), nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.l2(self.l1(batch[0]).relu()), batch[1])

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 8), torch.randint(0, 3, (32,))), batch_size=8)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)


def test_the_page_has_what_the_tests_expect():
    assert set(FILES) == {"train.py", "config.yaml", "optkit.yaml"} and len(FRAGMENTS) == 6
    assert len(COMMANDS) == 13 and all(words[0] == "optkit" for words in COMMANDS)


def test_the_program_trains_by_its_file(monkeypatch):
    seen = []
    monkeypatch.setattr(pl.Trainer, "fit", with_callbacks(pl.Trainer.fit, seen))
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", "config.yaml", *QUIET])
    exec(compile(FILES["train.py"], "train.py", "exec"), {"__name__": "__main__"})
    assert seen[:4] == [ok.Fuse, ok.GradientClipping, ok.LRSchedule, ok.WeightAveraging]
    assert len(list(Path().rglob("*.ckpt"))) == 1


def with_callbacks(fit, seen):
    def spied(trainer, *args, **kwargs):
        seen.extend(type(callback) for callback in trainer.callbacks)
        return fit(trainer, *args, **kwargs)

    return spied


def test_optkit_fits_by_the_other_file(monkeypatch, caplog):
    monkeypatch.setattr(rank_zero.log, "handlers", [caplog.handler])
    monkeypatch.setattr(rank_zero.log, "level", logging.INFO)
    seen = []
    monkeypatch.setattr(pl.Trainer, "fit", with_callbacks(pl.Trainer.fit, seen))
    main(["fit", "--config", "optkit.yaml", *QUIET])
    assert seen[:2] == [ok.Fuse, ok.GradientClipping]
    assert "Fuse: lightning_optkit.AdamW" in caplog.text and "ClipNorm(max_norm=1.0)" in caplog.text


@pytest.mark.parametrize("text", FRAGMENTS, ids=range(len(FRAGMENTS)))
def test_a_fragment_makes_what_it_names_and_trains(text, tmp_path):
    content = yaml.safe_load(text)
    (tmp_path / "fragment.yaml").write_text(text)
    args = ["--config", str(tmp_path / "fragment.yaml"), *QUIET, "--trainer.max_epochs=3"]
    args += [] if "optimizer" in content else ["--optimizer=torch.optim.AdamW"]
    arguments = dict(run=False, save_config_callback=None, seed_everything_default=0, args=args)
    cli = LightningCLI(Classifier, **arguments)
    named = content.get("trainer", {}).get("callbacks", [])
    made = [type(callback) for callback in cli.trainer.callbacks[: len(named)]]
    assert [f"lightning_optkit.{cls.__name__}" for cls in made] == [entry["class_path"] for entry in named]
    cli.trainer.fit(cli.model)
    (optimizer,) = cli.trainer.optimizers
    if "optimizer" in content:
        assert type(optimizer) is ok.AdamW and optimizer.clip == ok.ClipNorm(1.0) and optimizer.average == ok.EMA(0.9)
        assert all(optimizer.state[p]["exp_avg"].dtype == torch.bfloat16 for p in cli.model.parameters())
    if "plugins" in content.get("trainer", {}):
        assert type(cli.trainer.strategy.checkpoint_io) is ok.SafeCheckpointIO


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_of_the_page_does_its_work(words, capsys, monkeypatch):
    words = ["optkit.yaml" if word in ("config.yaml", "mine.yaml") else word for word in words[1:]]
    if ">" in words:
        words = words[: words.index(">")]
    Path("recipe.yaml").write_text(recipe_text("gan"))
    RunRecord("over").save(Path("lightning_logs", "report.json"))
    if "--ckpt_path" in words:
        main(["fit", "--config", "optkit.yaml", *QUIET])
        next(Path("lightning_logs").rglob("*.ckpt")).rename(words[words.index("--ckpt_path") + 1])
    main([*words, *(QUIET if "--config" in words else [])])
    said = capsys.readouterr().out
    if words[0] in ("explain", "find-lr"):
        assert "one pass" in said if words[0] == "explain" else "middle" in said
    if words[0] == "predict":
        assert len(torch.load("lightning_logs/version_1/predictions.pt")) == 64 and "version_1/predictions.pt" in said
    if words[0] == "recipe":
        assert said == recipe_text("mlp") if words[1:] else "mlp" in said and "timeseries" in said
    if words[0] == "list":
        assert "ok.AutoClip" in said and "ok.GradientClipping" in said
    if words[0] == "plot-schedule":
        assert Path("schedule.svg").read_text().count("<path") > 3
    if words[0] == "compare":
        assert "as it is, seed 1: " in said and Path("compared.html").exists()
    if words[0] == "report":
        assert "Report: " in said and "over" in Path("runs.html").read_text()
