# SPDX-License-Identifier: Apache-2.0
"""The examples of README and docs/ run unchanged, and do what the page says."""

import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

import lightning_optkit as ok
from lightning_optkit.optimizers.convert import why_not_convertible

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "other_optimizers.md"


class AnyModule(BoringModel):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_front_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"any_lightning_module": AnyModule(), "model": nn.Linear(2, 2)}
    for example in examples(ROOT / page):
        exec(compile(example.replace("max_epochs=10", "max_epochs=1"), page, "exec"), names)
    assert [type(callback) for callback in names["trainer"].callbacks[:4]] == [
        ok.Fuse,
        ok.GradientClipping,
        ok.LRSchedule,
        ok.WeightAveraging,
    ]
    assert names["trainer"].global_step == 64
    assert ("optimizer" in names) == (page == "README.md")


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_what_a_page_takes_from_the_package_is_there(page):
    for path in re.findall(r"\bok((?:\.\w+)+)", (ROOT / "docs" / page).read_text()):
        found = ok
        for name in path[1:].split("."):
            found = getattr(found, name)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the code on the page leaves behind."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    in_trainer, in_loop = examples(PAGE)
    names = {"__name__": "page"}
    exec(compile(in_trainer, str(PAGE), "exec"), names)
    names["after_fit"] = {key: value.clone() for key, value in names["net"].state_dict().items()}
    exec(compile(in_loop, str(PAGE), "exec"), names)
    return names


def test_callbacks_work_around_the_optimizer_of_another_package(names, tmp_path):
    trainer, net = names["trainer"], names["net"]
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is names["Adafactor"]
    assert why_not_convertible(optimizer) == "no one-pass rule for transformers.optimization.Adafactor"
    for param in net.parameters():
        average = optimizer.state[param]["ema"]
        assert average.shape == param.shape and not torch.equal(average, param)
    assert trainer.callback_metrics["loss"] < 1.3  # 1.39 by chance: four classes
    logged = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "grad_norm" in logged and "clip_fraction" in logged
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "grad" in page


def test_clip_and_average_work_in_a_loop_of_ones_own(names):
    assert names["norm"] > 0
    assert set(names["averaged"]) == set(names["net"].parameters())
    for param, average in names["averaged"].items():
        assert 0 < (average - param).abs().max() < 1
    assert any(not torch.equal(value, names["after_fit"][key]) for key, value in names["net"].state_dict().items())


def test_every_row_of_the_comparison_has_thirteen_peers_and_a_reason_where_we_lack_it():
    tables = [
        table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs" / "compared.md").read_text(), re.M)
    ]
    assert len(tables) == 7
    for header, _, *rows in tables:
        assert [cell.strip() for cell in header.split("|")[2:4]] == ["lightning_optkit", "torch"]
        for row in rows:
            feature, ours, *peers, note = (cell.strip() for cell in row.strip("|").split("|"))
            assert feature and ours and len(peers) == 13 and set(peers) <= {"", "x", "(x)"}, row
            assert ours != "**no**" or (note and any(peers)), row
            assert "(x)" not in peers or note, row
