# SPDX-License-Identifier: Apache-2.0
"""The noise scale of a run is that of its gradients, and the run is the one without it."""

import copy
import csv
import random
from collections import namedtuple
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.utils.checkpoint
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA
from lightning_optkit.callbacks import (
    GSAM,
    SAM,
    Augment,
    ExactAccumulation,
    Fuse,
    GradientClipping,
    LabelSmoothing,
    NoiseScale,
    RDrop,
    WeightAveraging,
)
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.data import GaussianNoise, Mixup
from lightning_optkit.diagnostics import gradient_noise_scale

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)


class Net(pl.LightningModule):
    """Draws from every generator in each step, and has running statistics, a metric and lists of its own."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.metric, self.losses, self.calls = torchmetrics.MeanMetric(), [], 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = random.random() + np.random.rand()
        loss = nn.functional.cross_entropy(self.net(x + 0.01 * noise), y)
        self.metric(loss)
        self.calls += 1
        self.losses.append(float(loss.detach()))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def rows(count=64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def loader(batch_size=8, count=64):
    return DataLoader(TensorDataset(*rows(count)), batch_size=batch_size, shuffle=True)


def fit(module, *callbacks, train=None, **kwargs):
    pl.seed_everything(3, verbose=False)
    trainer = pl.Trainer(**{"max_epochs": 2, **QUIET, **kwargs}, callbacks=list(callbacks), accelerator="cpu")
    trainer.fit(module, train or loader())
    return trainer


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


STRATEGIES = {
    "alone": list,
    "Fuse, EMA, clip": lambda: [Fuse(verbose=False), GradientClipping(ClipNorm(0.1)), WeightAveraging(EMA(0.9))],
    "losses": lambda: [LabelSmoothing(0.1), RDrop(0.5)],
    "accumulation": lambda: [ExactAccumulation()],
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    "kwargs", [{}, {"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}], ids=["", "3", "bf16"]
)
def test_the_run_is_the_one_without_it(name, kwargs):
    measured = NoiseScale(every=1, verbose=False)
    fit(module := Net(), measured, *STRATEGIES[name](), **kwargs)
    fit(plain := Net(), *STRATEGIES[name](), **kwargs)
    assert measured.scale is not None
    assert same(module, plain) and module.losses == plain.losses and module.calls == plain.calls
    assert module.metric.compute() == plain.metric.compute()


class Linear(pl.LightningModule):
    """No dropout and no statistics: its gradients can be computed beside it."""

    def __init__(self, lr=0.1):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.lr, self.seen = nn.Linear(4, 3), lr, []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.append((copy.deepcopy(self.net), batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def by_hand(net, batch, parts):
    found = []
    for x, y in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
        found.append(torch.autograd.grad(nn.functional.cross_entropy(net(x), y), list(net.parameters())))
    return gradient_noise_scale(found, len(batch[1]) // parts)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("every", [1, 3])
def test_as_by_hand(parts, every):
    measured = NoiseScale(every=every, parts=parts, window=1000, verbose=False)
    fit(module := Linear(), measured, max_epochs=3)
    expected = [by_hand(net, batch, parts) for net, batch in module.seen[::every]]
    assert len(measured.state_dict()["measured"]) == len(expected)
    noise, square = (sum(getattr(e, name) for e in expected) for name in ("noise", "gradient_square"))
    assert measured.scale == pytest.approx(noise / square, rel=1e-4)
    low, high = measured.interval
    assert low < measured.scale < high
    assert measured.suggestion == 2 ** round(np.log2(measured.scale))


def test_only_at_the_first_batch_of_a_window():
    measured = NoiseScale(every=2, window=1000, verbose=False)
    fit(module := Linear(), measured, max_epochs=2, accumulate_grad_batches=3)  # 3 steps of 8 batches
    expected = [by_hand(*module.seen[place], 2) for place in (0, 6, 11)]
    found = measured.state_dict()["measured"]
    assert [pair[0] for pair in found] == pytest.approx([e.noise for e in expected], rel=1e-4)


def test_the_last_measurements_count():
    measured = NoiseScale(every=1, window=4, verbose=False)
    fit(module := Linear(), measured)
    expected = [by_hand(net, batch, 2) for net, batch in module.seen[-4:]]
    assert measured.scale == pytest.approx(
        sum(e.noise for e in expected) / sum(e.gradient_square for e in expected), rel=1e-4
    )


def test_fp16_is_scaled():
    """Gradients of 1e-9 are zero in fp16; the loss scale lifts them."""

    class Scaled(Linear):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 1e-3

    plain, half = (NoiseScale(every=1, window=1000, verbose=False) for _ in range(2))
    fit(Scaled(lr=0.0), plain)
    fit(
        Scaled(lr=0.0),
        half,
        plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**24))],
    )
    assert half.scale == pytest.approx(plain.scale, rel=0.05)


def test_lazy_layers_draw_their_weights_in_the_step_of_the_run():
    def lazy():
        module = Net()
        module.net[0] = nn.LazyLinear(16)
        return module

    fit(module := lazy(), measured := NoiseScale(every=2, verbose=False))
    fit(plain := lazy())
    assert measured.scale is not None and same(module, plain)


def test_reentrant_checkpoints_are_refused():
    class Checkpointed(Linear):
        use_reentrant = True

        def training_step(self, batch, batch_idx):
            x = batch[0].detach().requires_grad_()
            out = torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=self.use_reentrant)
            return nn.functional.cross_entropy(out, batch[1])

    for callback in (NoiseScale(), SAM(), GSAM()):
        with pytest.raises(
            ValueError, match=rf"^{type(callback).__name__}\(\.\.\.\): .*use_reentrant=True, which hides"
        ):
            fit(Checkpointed(), callback)
    module, measured = Checkpointed(), NoiseScale(every=1, verbose=False)
    module.use_reentrant = False
    fit(module, measured)
    assert measured.scale > 0 and np.isfinite(measured.scale)


def test_frozen_and_unused_parameters():
    class Partly(Linear):
        def __init__(self):
            super().__init__()
            self.frozen, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)
            self.frozen.requires_grad_(False)

    measured, plain = NoiseScale(every=1, verbose=False), NoiseScale(every=1, verbose=False)
    fit(Partly(), measured)
    fit(Linear(), plain)
    assert measured.state_dict() == plain.state_dict()


Rows = namedtuple("Rows", "x y")


@pytest.mark.parametrize("kind", ["dict", "named", "nested", "split"])
def test_batches_of_other_types(kind):
    make = {
        "dict": lambda x, y: {"x": x, "y": y, "name": "batch", "scale": torch.tensor(1.0)},
        "named": Rows,
        "nested": lambda x, y: [{"x": (x, [x])}, y],
        "split": lambda x, y: {"x": x, "y": y.tolist()},
    }[kind]
    read = {
        "dict": lambda b: (b["x"], b["y"]),
        "named": lambda b: (b.x, b.y),
        "nested": lambda b: (b[0]["x"][1][0], b[1]),
        "split": lambda b: (b["x"], torch.tensor(b["y"])),
    }[kind]

    def halves(batch, parts):
        size = len(batch["y"]) // parts
        cuts = [slice(place * size, (place + 1) * size) for place in range(parts)]
        return [{"x": batch["x"][cut], "y": batch["y"][cut]} for cut in cuts]

    class Other(Linear):
        def training_step(self, batch, batch_idx):
            return super().training_step(read(batch), batch_idx)

    def collate(items):
        return make(torch.stack([x for x, _ in items]), torch.stack([y for _, y in items]))

    data = DataLoader(TensorDataset(*rows()), batch_size=8, shuffle=True, collate_fn=collate)
    measured, plain = NoiseScale(every=1, split=halves if kind == "split" else None), NoiseScale(every=1)
    fit(Other(), measured, train=data)
    fit(Linear(), plain)
    assert measured.scale == pytest.approx(plain.scale, rel=1e-6)


def test_a_batch_that_cannot_be_cut():
    class Other(Linear):
        def training_step(self, batch, batch_idx):
            return super().training_step((torch.zeros(8, 4), torch.zeros(8).long()), batch_idx)

    data = DataLoader([object()] * 8, batch_size=8, collate_fn=lambda items: items[0])
    with pytest.raises(ValueError, match=r"^NoiseScale\(split=None\): a batch of type object has no tensors"):
        fit(Other(), NoiseScale(), train=data)


def test_parts_that_the_step_refuses():
    class Fixed(Linear):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[0].reshape(8, 4), batch[1]), batch_idx)

    with pytest.raises(RuntimeError, match=r"^NoiseScale\(split=None\): training_step could not be run on a part"):
        fit(Fixed(), NoiseScale())


def test_too_small_batches_are_said():
    with pytest.warns(UserWarning, match="nothing was measured"):
        fit(Linear(), measured := NoiseScale(), train=loader(batch_size=1))
    assert measured.scale is None and measured.suggestion is None


def test_it_grows_as_the_gradient_fades():
    """Near the optimum the noise stays and the gradient fades: that is what it is for."""
    x, y = rows(512)
    data = DataLoader(TensorDataset(x, torch.where(torch.rand(512) < 0.3, torch.randint(3, (512,)), y)), 32, True)
    early, late = (NoiseScale(every=1, window=32, verbose=False) for _ in range(2))
    fit(Linear(), early, train=data, max_epochs=1)
    fit(Linear(), late, train=data, max_epochs=30)
    assert late.scale > 5 * early.scale


@pytest.mark.parametrize(
    ("batch_size", "says"), [(2, "larger steps, up to about"), (256, "would need fewer samples in all")]
)
def test_what_it_says(batch_size, says, caplog):
    x, y = rows(512)
    data = DataLoader(TensorDataset(x, y), batch_size, shuffle=True)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        fit(Linear(1e-3), measured := NoiseScale(every=1, window=1000), train=data, max_epochs=4)
    text = caplog.messages[-1]
    assert text.startswith(f"NoiseScale: {measured.scale:.3g} samples (") and says in text
    assert f"a step has {batch_size}:" in text and f"about {measured.suggestion}" in text


def test_resumed(tmp_path):
    whole = NoiseScale(every=3, window=1000, verbose=False)
    fit(Linear(), whole, max_epochs=4)
    first, second = (NoiseScale(every=3, window=1000, verbose=False) for _ in range(2))
    pl.seed_everything(3, verbose=False)
    trainer = fit(Linear(), first, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    state = copy.deepcopy(first.state_dict())
    second.load_state_dict(state)
    assert second.state_dict() == first.state_dict() and second.scale == first.scale
    fresh = pl.Trainer(max_epochs=4, callbacks=[second], accelerator="cpu", **QUIET)
    fresh.fit(Linear(), loader(), ckpt_path=tmp_path / "run.ckpt")
    assert second.state_dict()["measured"][:6] == whole.state_dict()["measured"][:6]
    assert len(second.state_dict()["measured"]) == len(whole.state_dict()["measured"])


@pytest.mark.parametrize("log", [True, False])
def test_logged(tmp_path, log):
    logger = CSVLogger(tmp_path)
    measured = NoiseScale(every=1, log=log, verbose=False)
    module = Linear()
    module.on_train_batch_end = lambda *_: module.log("step", 1.0)
    fit(module, measured, logger=logger, log_every_n_steps=1)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    assert ("noise_scale" in logged[-1]) == log
    assert not log or float(logged[-1]["noise_scale"]) == pytest.approx(measured.scale, rel=1e-5)


class Manual(Linear):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (Linear, lambda: [NoiseScale(), SAM()], "SAM trains with another gradient"),
        (Linear, lambda: [NoiseScale(), Augment([GaussianNoise(), Mixup(0.2)])], "Mixup mixes whole batches"),
        (Manual, lambda: [NoiseScale()], "optimizes manually"),
        (Linear, lambda: [NoiseScale(split=lambda batch, parts: [batch])], "must return 2 batches, not 1"),
    ],
    ids=["SAM", "mixup", "manual", "split"],
)
def test_refused(module, callbacks, message):
    with pytest.raises(ValueError, match=message):
        fit(module(), *callbacks())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"every": 0}, "every"),
        ({"parts": 1}, "parts"),
        ({"window": 0}, "window"),
        ({"split": 3}, "split"),
        ({"log": 1}, "log"),
    ],
    ids=["every", "parts", "window", "split", "log"],
)
def test_wrong_arguments(arguments, name):
    with pytest.raises((TypeError, ValueError), match=rf"^NoiseScale\({name}="):
        NoiseScale(**arguments)


def test_a_list_with_an_entry_per_sample_is_cut_too():
    class Texts(Linear):
        def training_step(self, batch, batch_idx):
            assert len(batch["text"]) == len(batch["x"]) == len(batch["pair"][0])
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    x, y = rows(64)
    samples = [
        {"x": a, "y": b, "text": str(place), "pair": (place, "z")}
        for place, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    fit(Texts(), found := NoiseScale(every=1, verbose=False), train=DataLoader(samples, 8))
    assert found.scale > 0


@pytest.mark.parametrize(("factor", "why"), [(0.0, "all gradients were zero"), (float("nan"), "infinite or NaN")])
def test_why_nothing_was_measured(factor, why):
    class Scaled(Linear):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * factor

    with pytest.warns(UserWarning, match=f"nothing was measured; .*{why}"):
        fit(Scaled(), NoiseScale())
