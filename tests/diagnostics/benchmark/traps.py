# SPDX-License-Identifier: Apache-2.0
"""Healthy runs that rules of thumb take for ill: each must stay without a verdict."""

from collections.abc import Callable
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning, EarlyStopping, EMAWeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

import lightning_optkit as ok
from tests.diagnostics.benchmark.faults import has_body, layers_of
from tests.diagnostics.benchmark.faults_of_data import dominant_class, few_samples, weighted


@dataclass(frozen=True)
class Trap:
    """A healthy variant; `fits` tells for which setups."""

    name: str
    apply: Callable
    fits: Callable = lambda setup: True


def _is_classes(setup):
    return setup.kind == "classes"


def _zero_head(setup):
    last = [m for m in setup.head.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


class _LoRA(nn.Module):
    def __init__(self, layer, rank=4):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x):
        return self.layer(x) + x @ self.a.T @ self.b.T


def _lora(setup):
    for module in [*setup.body.modules()]:
        for name, child in [*module.named_children()]:
            if type(child) is nn.Linear and not isinstance(module, nn.TransformerEncoderLayer):
                setattr(module, name, _LoRA(child))
    setup.lr_factor = 3.0


class _Squared(nn.Module):
    def forward(self, x):
        return F.relu(x).square()


class _TopK(nn.Module):
    def forward(self, x):
        kept = x.topk(max(2, x.shape[1] // 8), dim=1)
        return torch.zeros_like(x).scatter(1, kept.indices, F.relu(kept.values))


def _replace(kind):
    def apply(setup):
        setup.body = nn.Sequential(*[kind() if isinstance(m, nn.ReLU) else m for m in setup.body])

    return apply


def _squared(setup):
    _replace(_Squared)(setup)
    setup.lr_factor = 0.2  # it diverges at the rate of its family


def _full_batch(setup):
    setup.optimizer, setup.batch_size, setup.epochs, setup.lrs = "sgd_plain", 4096, 150, (0.0, 0.06)


def _fine_tuning(setup):
    from tests.diagnostics.benchmark.runs import train

    def pretrain(setup):
        train(setup)
        setup.lr_factor, setup.epochs = 1e-5 / setup.lrs[0], 3

    setup.optimizer, setup.prepare = "adamw", pretrain


def _smoothing(setup):
    setup.callbacks.append(ok.LabelSmoothing(0.1))


def _frozen_norm(setup):
    from tests.diagnostics.benchmark.runs import train

    def pretrain(setup):
        train(setup)
        setup.at_start = lambda module: [m.eval() for m in module.modules() if isinstance(m, nn.BatchNorm2d)]

    setup.prepare, setup.epochs = pretrain, 4


def _scaler(setup):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**38, growth_interval=40)
    setup.trainer["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    setup.trainer.pop("precision", None)


def _accumulation(setup):
    setup.trainer["accumulate_grad_batches"] = 4
    setup.batch_size, setup.lr_factor, setup.epochs = setup.batch_size // 4, 1.5, setup.epochs + 4


def _average(setup):
    setup.callbacks.append(ok.WeightAveraging(ok.EMA(0.95)))


def _their_average(setup):
    setup.callbacks.append(EMAWeightAveraging(decay=0.95))


def _decay(setup):
    setup.optimizer, setup.weight_decay = "adamw", 1.0


def _warmup(setup):
    setup.callbacks.append(ok.LRSchedule(ok.schedules.warmup_cosine(warmup=0.2), verbose=False))


def _torch_schedule(setup):
    def schedule(optimizer, steps, epochs):
        schedulers = torch.optim.lr_scheduler
        warm = schedulers.LinearLR(optimizer, 0.01, total_iters=epochs)
        scheduler = schedulers.SequentialLR(
            optimizer, [warm, schedulers.CosineAnnealingLR(optimizer, steps - epochs)], [epochs]
        )
        return {"scheduler": scheduler, "interval": "step"}

    setup.schedule = schedule


def _by_epoch(setup):
    def schedule(optimizer, steps, epochs):
        return {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), "interval": "epoch"}

    setup.schedule = schedule


def _one_cycle(setup):
    def schedule(optimizer, steps, epochs):
        rate = optimizer.param_groups[0]["lr"]
        return {
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps),
            "interval": "step",
        }

    setup.schedule = schedule


def _restarts(setup):
    def schedule(optimizer, steps, epochs):
        scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, epochs)
        return {"scheduler": scheduler, "interval": "step"}

    setup.schedule = schedule


def _manual(setup):
    setup.manual = True


def _manual_in_place(setup):
    setup.manual, setup.manual_zero = True, lambda optimizer: optimizer.zero_grad(set_to_none=False)


def _clipped(setup):
    setup.callbacks.append(ok.GradientClipping(ok.ClipNorm(0.05)))


def _small_batches(setup):
    setup.batch_size, setup.epochs, setup.lr_factor = 8, max(2, setup.epochs // 4), 0.3


def _frozen_part(setup):
    first = layers_of(setup)[0]
    first.requires_grad_(False)


class _Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=optimizer.param_groups[0]["lr"])


def _staged(setup):
    setup.optimizer, setup.callbacks = "adam", [*setup.callbacks, _Unfreeze()]
    setup.optimized = lambda module: [p for p in module.parameters() if p.requires_grad]


def _unused_branch(setup):
    setup.body.unused = nn.Linear(4, 4)
    body = setup.body
    if isinstance(body, nn.Sequential):  # registered, but not part of the chain
        del body.unused
        setup.head = _WithUnused(setup.head)


class _WithUnused(nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head, self.auxiliary = head, nn.Linear(4, 4)

    def forward(self, x):
        return self.head(x)


class _Skipped(nn.Module):
    """A residual branch that is left out of half of the steps, as in stochastic depth."""

    def __init__(self, width):
        super().__init__()
        self.branch = nn.Linear(width, width)

    def forward(self, x):
        return x + self.branch(x) if torch.rand(()) < 0.5 else x


def _skipping(setup):
    width = next(m for m in setup.head.modules() if isinstance(m, nn.Linear)).in_features
    setup.head = nn.Sequential(_Skipped(width), _Skipped(width), setup.head)


def _bf16(setup):
    setup.trainer["precision"] = "bf16-true"
    setup.optimizer = "adamw" if setup.optimizer.startswith("sgd") else setup.optimizer


def _bf16_decayed(setup):
    _bf16(setup)
    setup.callbacks.append(ok.LRSchedule(ok.schedules.warmup_cosine(warmup=0.1), verbose=False))


def _sam(setup):
    setup.callbacks.append(ok.SAM(rho=0.02))


def _mixup(setup):
    setup.callbacks.append(ok.Augment(ok.Mixup(0.2)))


def _noisy_labels(setup):
    x, y, x_val, y_val = setup.data
    flip = torch.rand(len(y), generator=torch.Generator().manual_seed(setup.seed)) < 0.1
    setup.data = (x, torch.where(flip, y[torch.randperm(len(y))], y), x_val, y_val)


def _raw_pixels(setup):
    x, y, x_val, y_val = setup.data
    setup.data = (x * 6 + 4.9, y, x_val * 6 + 4.9, y_val)


def _few_steps(setup):
    setup.epochs = 1


def _long(setup):
    setup.epochs *= 3


def _stopped(setup):
    few_samples(setup, 100)
    setup.callbacks.append(ok.EarlyStoppingCriterion("GL", alpha=5.0, verbose=False))


def _stopped_by_patience(setup):
    few_samples(setup, 100)
    setup.callbacks.append(EarlyStopping("val_loss", patience=3))


def _weighted(setup):
    weighted(setup, 0.9)


def _rare_but_learned(setup):
    dominant_class(setup, 0.9)
    setup.epochs *= 3


TRAPS = (
    Trap("plain", lambda setup: None),
    Trap("zero head", _zero_head),
    Trap("LoRA", _lora, lambda s: s.family in ("mlp", "tanh_mlp", "deep_mlp", "wine", "residual", "tabular")),
    Trap("ReLU^2", _squared, lambda s: s.family in ("mlp", "cnn", "bn_cnn")),
    Trap("top-k", _replace(_TopK), lambda s: s.family == "mlp"),
    Trap("edge of stability", _full_batch, lambda s: s.family in ("mlp", "tanh_mlp")),
    Trap("fine-tuning at 1e-5", _fine_tuning),
    Trap("label smoothing", _smoothing, _is_classes),
    Trap("frozen batch norm", _frozen_norm, lambda s: s.family == "bn_cnn"),
    Trap("scaler skips", _scaler, lambda s: s.family in ("mlp", "cnn", "wine", "tabular", "residual")),
    Trap("accumulation", _accumulation),
    Trap("EMA", _average),
    Trap("Lightning's EMA", _their_average, lambda s: s.optimizer != "fuse"),
    Trap("weight decay", _decay),
    Trap("warm-up and decay", _warmup),
    Trap("torch's warm-up and cosine", _torch_schedule),
    Trap("cosine by epoch", _by_epoch),
    Trap("one cycle", _one_cycle),
    Trap("restarts", _restarts),
    Trap("manual optimization", _manual),
    Trap("zeroed in place", _manual_in_place),
    Trap("tight clipping", _clipped, lambda s: not s.optimizer.startswith("sgd")),
    Trap("small batches", _small_batches),
    Trap("frozen part", _frozen_part, has_body),
    Trap("staged unfreezing", _staged, lambda s: has_body(s) and s.family != "embedding"),
    Trap("unused branch", _unused_branch),
    Trap("skipped branches", _skipping, lambda s: s.family not in ("logistic", "autoencoder")),
    Trap("bf16 weights", _bf16),
    Trap("bf16 weights, decayed", _bf16_decayed),
    Trap("SAM", _sam, lambda s: s.family != "bn_cnn"),
    Trap("Mixup", _mixup, lambda s: _is_classes(s) and s.family != "embedding"),
    Trap("noisy labels", _noisy_labels, _is_classes),
    Trap("raw pixels", _raw_pixels, lambda s: s.family == "bn_cnn"),
    Trap("one epoch", _few_steps),
    Trap("long run", _long, lambda s: _is_classes(s) and s.family != "wine"),  # of which a long one does overfit
    Trap("few samples, early stopping", _stopped, lambda s: s.family != "autoencoder"),
    Trap("few samples, Lightning's early stopping", _stopped_by_patience, lambda s: s.family != "autoencoder"),
    Trap("dominant class, weighted loss", _weighted, _is_classes),
    Trap("dominant class, learned", _rare_but_learned, lambda s: s.family in ("mlp", "cnn", "bn_cnn", "logistic")),
)


class GAN(pl.LightningModule):
    """Two optimizers stepped by hand: it learns the first two features of the wine data."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        real = batch[0][:, :2]
        step_generator, step_critic = self.optimizers()
        fake = self.generator(torch.randn(len(real), 4))
        step_critic.zero_grad()
        self.manual_backward((F.softplus(-self.critic(real)) + F.softplus(self.critic(fake.detach()))).mean())
        step_critic.step()
        step_generator.zero_grad()
        self.manual_backward(F.softplus(-self.critic(fake)).mean())
        step_generator.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(each.parameters(), 2e-3, betas=(0.5, 0.9)) for each in (self.generator, self.critic)]
