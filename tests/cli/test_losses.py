# SPDX-License-Identifier: Apache-2.0
"""A loss of which there is no gradient is a sentence in what looks at a run, and torch's error in the fit itself."""

import pytest
import yaml

from lightning_optkit.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")

QUIET = dict(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, max_epochs=1)
NET = """
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

class Net(BoringModel):
    def training_step(self, batch, index):
        {step}

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(16, 32), 4)
"""
VECTOR = "return torch.nn.functional.mse_loss(self.layer(batch), torch.zeros(4, 2), reduction='none').mean(1)"
DETACHED = "return self.layer(batch).mean().detach()"
IN_THE_STEP = "self.layer(batch).mean(1).backward()"
SENTENCES = {
    VECTOR: 'the loss that training_step returns is not one number; take its mean, as with reduction="mean".',
    DETACHED: "the loss that training_step returns has no gradient: it was detached, or computed without one, or every "
    "parameter is frozen.",
}


@pytest.fixture
def run(users_net, tmp_path):
    def with_step(command, step):
        users_net(NET.format(step=step))
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"class_path": "users_net.Net"}, "trainer": QUIET}))
        main([command, "--config", "run.yaml"])

    return with_step


@pytest.mark.parametrize(("command", "step"), [("find-lr", VECTOR), ("find-lr", DETACHED), ("doctor", VECTOR)])
def test_what_looks_at_a_run_says_it_in_a_sentence(run, command, step):
    with pytest.raises(SystemExit) as exit_info:
        run(command, step)
    assert exit_info.value.code == f"optkit {command}: {SENTENCES[step]}"  # a text: status 1


def test_the_line_of_an_error_in_the_users_step_is_shown(run):
    with pytest.raises(SystemExit) as exit_info:
        run("find-lr", IN_THE_STEP)
    assert "users_net.py" in exit_info.value.code and "grad can be implicitly created" in exit_info.value.code


@pytest.mark.parametrize("step", SENTENCES)
def test_the_fit_ends_in_torchs_error(run, step):
    with pytest.raises(RuntimeError):
        run("fit", step)
