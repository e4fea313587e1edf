# SPDX-License-Identifier: Apache-2.0
"""Whole Lightning runs on CUDA in each precision, and FSDP2 on one device."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def fit(precision, callbacks, steps=30):
    """Losses of a small net on a task that can be learned."""
    pl = pytest.importorskip("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(32, 256),
                nn.LayerNorm(256),
                nn.GELU(),
                nn.Linear(256, 256),
                nn.LayerNorm(256),
                nn.Linear(256, 8),
            )
            self.losses = []

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x.to(self.net[0].weight.dtype)).float(), y)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=3e-3)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64 * steps, 32, generator=generator)
    y = (x @ torch.randn(32, 8, generator=generator)).argmax(-1)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)
    net = Net()
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    trainer = pl.Trainer(
        max_epochs=1, precision=precision, accelerator=accelerator, devices=1, callbacks=callbacks, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(net, data)
    return torch.stack(net.losses).tolist()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_a_lightning_run_learns_as_without_us(precision):
    pytest.importorskip("lightning")
    from lightning_optkit.averaging import EMA
    from lightning_optkit.callbacks import Fuse, GradientClipping, WeightAveraging
    from lightning_optkit.clipping import ClipNorm

    rounding = "stochastic" if precision == "bf16-true" else "nearest"
    plain = fit(precision, [])
    fused = fit(
        precision,
        [Fuse(verbose=False, rounding=rounding), GradientClipping(ClipNorm(1e6)), WeightAveraging(EMA(0.9))],
    )
    assert all(torch.tensor(fused).isfinite())
    if precision == "32-true":
        assert max(abs(a - b) for a, b in zip(plain, fused, strict=True)) < 5e-3
    assert fused[-1] < 0.8 * fused[0]
    assert abs(fused[-1] - plain[-1]) < 0.3


def test_fsdp2_on_one_device_follows_a_plain_run():
    worker = Path(__file__).parent / "fsdp_worker.py"
    done = subprocess.run([sys.executable, worker], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
