# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D101, D102  (Lightning documents its hooks)
"""What `PruneTrial` saves in a search over a recipe by Optuna, and whether it ends good trials.

Random settings of a small network on scikit-learn's digits: depth, width, activation, scale of the initial weights,
optimizer, rate, warm-up, clip, decay, average. Random search, so that every pruner judges the same trials and a trial
that is ended can be compared with what it would have become. Each pruner is a study of its own; the trials of all
studies take turns. One JSON line per trial and study, then one per study. "Equal best" is the accuracy that the study
without pruning reaches; a good trial is one within 2 points of it. Times are processor time of one thread.

Usage: python benchmarks/search_pruning.py [--trials 50] [--seed 20] [--epochs 12]
"""

import argparse
import itertools
import json
import logging
import time
import warnings

import lightning.pytorch as pl
import optuna
import torch
from harness import environment
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok

GOOD = 0.02  # of accuracy, from the best
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class Network(pl.LightningModule):
    def __init__(self, setting):
        super().__init__()
        self.setting, self.accuracy = setting, 0.0
        widths = [64, *[setting["width"]] * setting["depth"]]
        layers = [[nn.Linear(a, b), ACTIVATIONS[setting["activation"]]()] for a, b in itertools.pairwise(widths)]
        self.net = nn.Sequential(*[part for pair in layers for part in pair], nn.Linear(widths[-1], 10))
        with torch.no_grad():
            for param in self.net.parameters():
                param.mul_(setting["init_scale"])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.accuracy = float((self.net(batch[0]).argmax(dim=1) == batch[1]).float().mean())
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self):
        kinds = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
        more = {"momentum": 0.9} if self.setting["optimizer"] == "SGD" else {}
        return kinds[self.setting["optimizer"]](self.parameters(), lr=self.setting["lr"], **more)


class Reports(Callback):
    """Optuna's own pruners compare the accuracies of the epochs."""

    def __init__(self, trial):
        self.trial = trial

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.trial.report(pl_module.accuracy, trainer.current_epoch)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def suggested(trial):
    return {
        "depth": trial.suggest_int("depth", 1, 6),
        "width": trial.suggest_categorical("width", [16, 64, 128]),
        "activation": trial.suggest_categorical("activation", [*ACTIVATIONS]),
        "init_scale": trial.suggest_float("init_scale", 0.05, 10, log=True),
        "optimizer": trial.suggest_categorical("optimizer", ["AdamW", "SGD"]),
        "lr": trial.suggest_float("lr", 1e-5, 3, log=True),
        "warmup": trial.suggest_float("warmup", 0.01, 0.3),
        "clip": trial.suggest_float("clip", 0.1, 10, log=True),
        "decay": trial.suggest_float("decay", 1e-4, 1, log=True),
        "std": trial.suggest_float("std", 0.02, 0.2),
    }


def data():
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = (images.float() - images.float().mean()) / images.float().std()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = [TensorDataset(images[rows], labels[rows]) for rows in (order[:1297], order[1297:])]
    return parts


def loaders(parts):
    shuffled = torch.Generator().manual_seed(0)
    return DataLoader(parts[0], batch_size=32, shuffle=True, generator=shuffled), DataLoader(parts[1], batch_size=500)


def train(setting, epochs, parts, callbacks):
    pl.seed_everything(0, verbose=False)
    module = Network(setting)
    recipe = [
        ok.Fuse(verbose=False),
        ok.ParameterGroups(weight_decay=setting["decay"], verbose=False),
        ok.GradientClipping(ok.ClipNorm(setting["clip"])),
        ok.LRSchedule(ok.schedules.warmup_cosine(warmup=setting["warmup"]), verbose=False),
        ok.WeightAveraging(ok.PowerEMA(std=setting["std"])),
    ]
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", num_sanity_val_steps=0, callbacks=[*recipe, *callbacks], **quiet
    )
    trainer.fit(module, *loaders(parts))
    return module.accuracy


def studies(seed):
    median = optuna.pruners.MedianPruner(n_startup_trials=5)
    for name, pruner in {"no pruning": None, "diagnosis": None, "median": median}.items():
        sampler = optuna.samplers.RandomSampler(seed=seed)
        yield (
            name,
            optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner or optuna.pruners.NopPruner()),
        )


def run_one(name, study, epochs, parts):
    trial = study.ask()
    setting = suggested(trial)
    extra = {"no pruning": [], "diagnosis": [ok.PruneTrial(trial)], "median": [Reports(trial)]}[name]
    started = time.process_time()
    try:
        accuracy = train(setting, epochs, parts, extra)
        study.tell(trial, accuracy)
    except optuna.TrialPruned:
        accuracy = None
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    verdict = trial.user_attrs.get("verdict", "").partition(" ")[0]
    seconds = round(time.process_time() - started, 3)
    return dict(accuracy=None if accuracy is None else round(accuracy, 4), seconds=seconds, verdict=verdict)


def summary(name, rows, whole):
    best = max(row["accuracy"] for row in whole)
    ended = [place for place, row in enumerate(rows) if row["accuracy"] is None]
    reached = next((p for p, row in enumerate(rows) if row["accuracy"] is not None and row["accuracy"] >= best), None)
    seconds = None if reached is None else sum(row["seconds"] for row in rows[: reached + 1])
    good = [place for place in ended if whole[place]["accuracy"] >= best - GOOD]
    return dict(
        case="search", pruner=name, trials=len(rows), best=round(max(r["accuracy"] or 0 for r in rows), 4),
        seconds=round(sum(row["seconds"] for row in rows), 1), trial_of_best=reached,
        seconds_to_equal_best=None if seconds is None else round(seconds, 1), pruned=len(ended),
        good_trials=sum(row["accuracy"] >= best - GOOD for row in whole), good_trials_pruned=len(good),
        best_of_pruned=round(max((whole[place]["accuracy"] for place in ended), default=0.0), 4),
    )  # fmt: skip


def main(options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    parts, kinds = data(), dict(studies(options.seed))
    rows = {name: [] for name in kinds}
    train({**suggested(optuna.trial.FixedTrial(WARM)), "width": 16}, 1, parts, [])  # imports and caches
    for number in range(options.trials):
        for name, study in kinds.items():
            row = run_one(name, study, options.epochs, parts)
            rows[name].append(row)
            print(
                json.dumps({"case": "trial", "trial": number, "pruner": name, "seed": options.seed, **row}), flush=True
            )
    facts = environment()
    for name in kinds:
        print(json.dumps({**facts, **summary(name, rows[name], rows["no pruning"]), "seed": options.seed}), flush=True)


WARM = {
    "depth": 1, "width": 16, "activation": "relu", "init_scale": 1.0, "optimizer": "SGD", "lr": 0.1, "warmup": 0.1,
    "clip": 1.0, "decay": 0.01, "std": 0.1,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=50, help="trials of each study")
    parser.add_argument("--seed", type=int, default=20, help="of the random settings")
    parser.add_argument("--epochs", type=int, default=12, help="of each trial")
    main(parser.parse_args())
