# SPDX-License-Identifier: Apache-2.0
"""The examples of docs/other_optimizers.md run as they stand, and do what the page says."""

import re
from pathlib import Path

import pytest
import torch

from lightning_optkit.optimizers.convert import why_not_convertible

PAGE = Path(__file__).parents[2] / "docs" / "other_optimizers.md"


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the code on the page leaves behind."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    in_trainer, in_loop = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
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
