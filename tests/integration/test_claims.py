# SPDX-License-Identifier: Apache-2.0
"""docs/claims.md matches the measurements, and networks trained together train as if alone."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[2]
CLAIMS = ROOT / "examples" / "claims"


def load(name):
    spec = importlib.util.spec_from_file_location(f"claims_{name}", CLAIMS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


common, run = load("_common"), load("run")
FRAGMENTS = sorted((ROOT / "docs" / "claims").glob("*.json"))


def test_the_page_is_what_the_fragments_make():
    fragments = [json.loads(path.read_text()) for path in FRAGMENTS]
    assert (ROOT / "docs" / "claims.md").read_text() == run.assemble(fragments)


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_every_fragment_has_its_script_and_figure(path):
    fragment = json.loads(path.read_text())
    assert (ROOT / fragment["script"]).stem == path.stem and (ROOT / fragment["script"]).exists()
    assert (ROOT / "docs" / fragment["figure"]).exists() and fragment["findings"]
    assert all(len(row) == len(fragment["header"]) for row in fragment["rows"])


def test_an_unknown_claim_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "nothing"])
    with pytest.raises(SystemExit):
        run.main()
    assert "no claim is called 'nothing'; there are averaging, calibration" in capsys.readouterr().err


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_networks_side_by_side_train_as_alone(norm):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 6), norm(6), nn.ReLU(), nn.Linear(6, 3)) for _ in range(2)]
    data = [(torch.randn(20, 4), torch.randn(8, 4), torch.randint(3, (20,)), torch.randint(3, (8,))) for _ in nets]
    rates = torch.tensor([0.1, 0.03])
    arguments = dict(steps=6, batch_size=5, every=2, what="")
    accuracies, losses = common.train(common.SideBySide(nets), rates, data, whole_loss=True, **arguments)
    for index, (net, (x, x_test, y, y_test)) in enumerate(zip(nets, data, strict=True)):
        optimizer = torch.optim.SGD(net.parameters(), lr=float(rates[index]), momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        for step in range(1, 7):
            rows = torch.randint(20, (5,), generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(net.train()(x[rows]), y[rows]).backward()
            optimizer.step()
            if step % 2 == 0:
                accuracy = (net.eval()(x_test).argmax(dim=1) == y_test).double().mean()
                torch.testing.assert_close(accuracies[step // 2 - 1, index], accuracy)
                torch.testing.assert_close(losses[step // 2 - 1, index], F.cross_entropy(net(x), y).detach())
