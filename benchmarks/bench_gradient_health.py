# SPDX-License-Identifier: Apache-2.0
"""What GradientHealth costs at its default interval: processor time of steps with and without it, fits in turn.

Prints one JSON row per network: the time of a step, what an empty callback adds to it (Lightning's own price of any
callback), what GradientHealth adds to a step that is not measured and to one that is, what its beginning costs in all,
and the share of the step's time in a long run. Medians over the steps of a fit, then over the fits.

python benchmarks/bench_gradient_health.py --rounds 7
"""

import argparse
import json
import logging
import statistics
import time
import warnings
from itertools import pairwise

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok
from lightning_optkit.cli.demo_command import DigitClassifier, digits

FIRST, STEPS, INTERVAL = 100, 450, 200  # the default interval


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


def demo():
    """The network and the data of `optkit demo`."""
    return DigitClassifier(), *digits()[0].dataset.tensors


def mlp():
    """A small network, on 64 features."""
    x = torch.randn(2048, 64)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return net, x, x[:, :10].argmax(1)


def transformer():
    """Sequences of 32 tokens; the first tells the class."""
    x = torch.randint(256, (512, 32))
    return Tokens(), x, x[:, 0] % 10


def fit(make, callback, fused):
    """Milliseconds of each step."""
    torch.manual_seed(0)
    net, x, y = make()
    clock = Clock()
    callbacks = [clock, *([ok.Fuse(verbose=False)] if fused else []), *([callback()] if callback else [])]
    trainer = pl.Trainer(
        max_steps=STEPS, max_epochs=-1, callbacks=callbacks, logger=False, enable_checkpointing=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(net), DataLoader(TensorDataset(x, y), 32, shuffle=True))
    return [1e3 * (after - before) for before, after in pairwise(clock.times)]


def costs(plain, empty, watched):
    """Of one fit each, in milliseconds: step, empty callback, unmeasured step, measured step, beginning."""
    step, with_empty, within = (statistics.median(times[FIRST:]) for times in (plain, empty, watched))
    # Callbacks behind the clock count for the step after it: times[i] is step i + 1, up to its clock.
    measured = [watched[i - 1] + watched[i] - 2 * within for i in range(INTERVAL, STEPS - 1, INTERVAL)]
    return dict(
        step=step, empty_callback=with_empty - step, unmeasured=within - step, measured=statistics.median(measured),
        beginning=sum(watched[:FIRST]) - within / step * sum(plain[:FIRST]),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--networks", nargs="*", default=["demo", "mlp", "transformer"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in arguments.networks:
        for fused in (False, True):
            rounds = [
                costs(*(fit(globals()[name], callback, fused) for callback in (None, pl.Callback, ok.GradientHealth)))
                for _ in range(arguments.rounds)
            ]
            row = {each: round(statistics.median(found[each] for found in rounds), 3) for each in rounds[0]}
            shares = [(r["unmeasured"] + r["measured"] / INTERVAL) / r["step"] for r in rounds]
            own = [share - r["empty_callback"] / r["step"] for share, r in zip(shares, rounds, strict=True)]
            spread = dict(
                cost=round(statistics.median(shares), 4), lowest=round(min(shares), 4), highest=round(max(shares), 4),
                beyond_an_empty_callback=round(statistics.median(own), 4),
            )  # fmt: skip
            setting = dict(network=name, fused=fused, rounds=arguments.rounds, torch=torch.__version__)
            print(json.dumps({**setting, **row, **spread}), flush=True)


if __name__ == "__main__":
    main()
