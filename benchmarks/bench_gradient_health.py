# SPDX-License-Identifier: Apache-2.0
"""What GradientHealth costs at its default interval: processor time of steps with and without it, in turn in one fit.

Two fits differ by some percent even where they do the same, by where their tensors lie; so the callback is put into the
run for some steps and out for the next, and the first of them, which finds nothing in the caches, does not count.
Prints one JSON row per network: the time of a step, what an empty callback adds to it (Lightning's own price of any
callback), what GradientHealth adds to a step that is not measured and to one that is, what its beginning costs in all,
and the share of the step's time in a long run. Medians over the steps of a fit, then over the fits.

python benchmarks/bench_gradient_health.py --rounds 5
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
from lightning_optkit.callbacks.seams.steps import StepListener, watch_steps
from lightning_optkit.cli.demo_command import DigitClassifier, digits

WARM, FIRST, STEPS, BLOCK = 50, 105, 795, 10  # steps without it; its first; then steps with each, so many in a row
INTERVAL = 200  # the default


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


class Switched(ok.GradientHealth):
    """GradientHealth that can be out of the run for some steps."""

    def on_fit_start(self, trainer, pl_module):
        """Waits outside."""
        self._at_end(self._close)

    def join(self, trainer):
        """Watches from the next step on."""
        self._watch = watch_steps(trainer, StepListener(type(self).__name__, counts=self._after_step))

    def leave(self):
        """Watches no longer."""
        self._watch.remove()


class Switch(pl.Callback):
    """Puts each of `states` into the run in turn, and takes the time of each step. Must be the last callback."""

    def __init__(self, states):
        self.states, self.times, self.steps = states, {name: [] for name in states}, 0
        self.present, self.since = "plain", None

    def due(self):
        """What the next step is taken with."""
        if self.steps < WARM + FIRST:
            return "plain" if self.steps < WARM else "watched"
        return [*self.states][(self.steps - WARM - FIRST) // BLOCK % len(self.states)]

    def on_train_batch_end(self, trainer, pl_module, *args):
        """Takes the time of this process alone, on its one thread: other work on the machine does not count."""
        if self.since is not None:
            self.times[self.present].append(1e3 * (time.process_time() - self.since))
        self.steps += 1
        if self.due() != self.present:
            self.change(trainer, self.states[self.present], self.states[self.due()])
            self.present = self.due()
        self.since = time.process_time()

    def change(self, trainer, before, after):
        """One state for another."""
        if isinstance(before, Switched):
            before.leave()
        if isinstance(after, Switched):
            after.join(trainer)
        others = [each for each in trainer.callbacks if each not in self.states.values()]
        trainer.callbacks = [*others[:-1], *([after] if after else []), self]  # a new list: the old one is in use


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


def fit(make, fused):
    """What was found in one fit, in milliseconds: step, empty callback, unmeasured step, measured step, beginning."""
    torch.manual_seed(0)
    net, x, y = make()
    states = {"plain": None, "empty": pl.Callback(), "watched": Switched()}
    switch = Switch(states)
    callbacks = [*([ok.Fuse(verbose=False)] if fused else []), states["watched"], switch]
    trainer = pl.Trainer(
        max_steps=WARM + FIRST + len(states) * STEPS, max_epochs=-1, callbacks=callbacks, logger=False,
        enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(net), DataLoader(TensorDataset(x, y), 32, shuffle=True))
    times = switch.times
    warm = {name: [t for place, t in enumerate(times[name][-STEPS:]) if place % BLOCK] for name in states}
    plain, empty, watched = (statistics.median(warm[name]) for name in states)
    measured = [times["watched"][place] - watched for place in range(INTERVAL, FIRST + STEPS, INTERVAL)]
    return dict(
        step=plain, empty_callback=empty - plain, unmeasured=watched - plain, measured=statistics.median(measured),
        beginning=sum(times["watched"][:FIRST]) - FIRST * watched,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="*", default=["demo", "mlp", "transformer"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for name in arguments.networks:
        for fused in (False, True):
            rounds = [fit(globals()[name], fused) for _ in range(arguments.rounds)]
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
