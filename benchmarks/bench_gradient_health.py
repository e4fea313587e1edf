# SPDX-License-Identifier: Apache-2.0
"""What GradientHealth costs at its default interval: processor time of whole fits with and without it, in turn.

Prints one JSON row per network and kind of step. "first" are the steps up to the 100th, in which measured steps are
dense; "later" those behind, in which every 200th is measured.

python benchmarks/bench_gradient_health.py --rounds 7 --steps 500
"""

import argparse
import json
import logging
import statistics
import time
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok

FIRST = 100


class Classifier(pl.LightningModule):
    """A network of tokens or features, on targets that it can learn."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, batch_idx):
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Tokens(nn.Module):
    """A transformer of 2 blocks of width 128."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(128, 10)

    def forward(self, x):
        """Logits of the mean over the tokens."""
        return self.head(self.blocks(self.embed(x)).mean(1))


class Clock(pl.Callback):
    """Processor time from step to step."""

    def __init__(self):
        self.times = []

    def on_train_batch_end(self, *args):
        """Takes the time of this process alone, on its one thread: other work on the machine does not count."""
        self.times.append(time.process_time())


def mlp():
    """A network of the size of the demo's, on 64 features."""
    x = torch.randn(2048, 64)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return net, x, x[:, :10].argmax(1)


def transformer():
    """Sequences of 32 tokens; the first tells the class."""
    x = torch.randint(256, (512, 32))
    return Tokens(), x, x[:, 0] % 10


def fit(make, watched, fused, steps):
    """Seconds of the first steps, and of those behind."""
    torch.manual_seed(0)
    net, x, y = make()
    clock = Clock()
    callbacks = [clock, *([ok.Fuse(verbose=False)] if fused else []), *([ok.GradientHealth()] if watched else [])]
    trainer = pl.Trainer(
        max_steps=steps, max_epochs=-1, callbacks=callbacks, logger=False, enable_checkpointing=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(net), DataLoader(TensorDataset(x, y), 32, shuffle=True))
    return clock.times[FIRST] - clock.times[0], clock.times[-1] - clock.times[FIRST]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for make in (mlp, transformer):
        for fused in (False, True):
            ratios = {"first": [], "later": []}
            for _ in range(arguments.rounds):
                without, within = (fit(make, watched, fused, arguments.steps) for watched in (False, True))
                for name, before, after in zip(ratios, without, within, strict=True):
                    ratios[name].append(after / before)
            for name, each in ratios.items():
                low, middle, high = statistics.quantiles(each, n=4)
                row = dict(
                    network=make.__name__, fused=fused, steps=name, rounds=arguments.rounds, torch=torch.__version__,
                    cost=round(middle - 1, 4), quartiles=[round(low - 1, 4), round(high - 1, 4)],
                )  # fmt: skip
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
