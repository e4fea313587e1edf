# SPDX-License-Identifier: Apache-2.0
"""What a SIGTERM, a signal of SLURM and an exception leave behind, in several processes."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import signal_worker
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from signal_worker import FAILS, KINDS, STOPS
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.callbacks import ExactResume
from tests.workers import launch

pytestmark = pytest.mark.filterwarnings("ignore")
SECONDS = 40  # on a busy machine; the time-out of the group is a minute here, half an hour by default


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    launch(Path(signal_worker.__file__), folder, timeout=280)
    return torch.load(folder / "result.pt", weights_only=False)


@pytest.mark.parametrize(("kind", "who"), STOPS)
def test_sigterm_stops_all_processes_at_the_same_step_and_leaves_an_exact_checkpoint(result, kind, who):
    stopped = result["stopped"][kind, who]
    assert [each["error"] for each in stopped["ended"]] == ["SIGTERMException"] * KINDS[kind]
    assert all(each["at"] - stopped["sent"] < SECONDS for each in stopped["ended"])
    assert len({each["step"] for each in stopped["ended"]}) == 1
    torch.testing.assert_close(stopped["resumed"], result["whole"][kind], rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "case"), FAILS)
def test_an_exception_under_fsdp2_leaves_a_file_only_if_all_have_it(result, kind, case):
    failed = result["failed"][kind, case]
    errors = {"all fail": ["KeyError", "KeyError"], "one fails": ["RuntimeError", "KeyError"]}[case]
    assert [each["error"] for each in failed["ended"]] == errors
    assert all(each["at"] - failed["begun"] < SECONDS for each in failed["ended"])
    said = failed["ended"][0]["said"]
    if case == "all fail":
        assert said == []
        torch.testing.assert_close(failed["resumed"], result["whole"][kind], rtol=0, atol=0)
    else:
        assert failed["resumed"] is None
        assert len(said) == 1 and "no checkpoint is written on this exception" in said[0]
        assert said[0].endswith("step step=8.ckpt.")  # the newest one


# --- SLURM, in one process ---


class Sends(pl.LightningModule):
    """Sends itself a signal within the second batch."""

    def __init__(self, signum=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.dropout, self.signum = nn.Linear(4, 4), nn.Dropout(0.5), signum

    def training_step(self, batch, batch_idx):
        if self.signum and (self.current_epoch, batch_idx) == (0, 1):
            os.kill(os.getpid(), self.signum)
        return self.dropout(self.net(batch[0])).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A job that may be requeued; the requests are written to a file."""
    requeue = tmp_path / "scontrol"
    requeue.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requests\n')
    requeue.chmod(0o755)
    variables = dict(SLURM_JOB_ID="7", SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    for name, value in {**variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


SLURM = (SLURMEnvironment(auto_requeue=True),)


def fit(folder, module, plugins=()):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[ExactResume()],
        plugins=[*plugins],
        max_epochs=2,
        default_root_dir=folder,
    )
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(12, 4)), 3, shuffle=True))
    return module


def test_a_run_that_sigterm_ends_says_so(tmp_path, printed):
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Sends(signal.SIGTERM))
    assert "ExactResume: SIGTERM; the run stops before its next batch, and goes on by ckpt_path=..." in printed()


def test_before_slurm_ends_a_job_it_saves_between_two_batches_and_requeues(slurm):
    before = signal.getsignal(signal.SIGUSR1)
    whole = fit(slurm / "other", Sends(), SLURM)
    told = fit(slurm, Sends(signal.SIGUSR1), SLURM)  # goes on until it is ended
    assert (slurm / "requests").read_text() == "requeue 7\n"
    saved = torch.load(slurm / "hpc_ckpt_1.ckpt", weights_only=True)
    progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert {*progress.values()} == {2} and saved["global_step"] == 2
    resumed = fit(slurm, Sends(), SLURM)  # Lightning finds the file
    for one in (told, resumed):
        torch.testing.assert_close(dict(one.named_parameters()), dict(whole.named_parameters()), rtol=0, atol=0)
    assert signal.getsignal(signal.SIGUSR1) == before
