# SPDX-License-Identifier: Apache-2.0
"""Every callback that acts on the step x what a run may do meanwhile: folded into the step or in a pass of its own,
the weights are the same."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, BatchSizeFinder, LearningRateFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import (
    SAM,
    ElasticNet,
    Fuse,
    GradientClipping,
    GradientNoise,
    LabelSmoothing,
    LRSchedule,
    MaxNorm,
    PlateauSchedule,
    Preprocess,
    SnapshotEnsemble,
    WeightAveraging,
)
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipUnitwise, ClipValue, ZClip
from lightning_optkit.data import Standardize
from lightning_optkit.schedules import cosine

# Lightning warns of batches without a loss and of finders that find nothing, torch of lazy layers: both are meant here.
pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = 6

CALLBACKS = {
    "ClipNorm": lambda: GradientClipping(ClipNorm(0.3)),
    "ClipValue": lambda: GradientClipping(ClipValue(0.05)),
    "ClipUnitwise": lambda: GradientClipping(ClipUnitwise(0.1)),
    "AutoClip": lambda: GradientClipping(AutoClip(30)),
    "ZClip": lambda: GradientClipping(ZClip(0.5, alpha=0.5, warmup_steps=2)),
    "EMA": lambda: WeightAveraging(EMA(0.8)),
    "EMA, every 3": lambda: WeightAveraging(EMA(0.8, every=3)),
    "SWA": lambda: WeightAveraging(SWA(0.5)),
    "LAWA": lambda: WeightAveraging(LAWA(3, every=2)),
    "ElasticNet": lambda: ElasticNet(l1=0.02, l2=0.05, exclude_bias_and_norm=False, verbose=False),
    "MaxNorm": lambda: MaxNorm(0.5),
    "GradientNoise": lambda: GradientNoise(0.01),
    "SAM": lambda: SAM(),
    "LRSchedule": lambda: LRSchedule(cosine(), verbose=False),
}
NEEDS_AUTOMATIC = {"SAM"}
CHANGES = ["none batches", "scaler skips", "two optimizers", "unfrozen", "switched", "reloaded", "finder"]


class Net(pl.LightningModule):
    def __init__(self, change=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.change, self.lr, self.batch_size = change, 0.1, 4
        self.automatic_optimization = change != "two optimizers"

    def train_dataloader(self):
        batches = BATCHES + 2 * self.current_epoch * (self.change == "reloaded")
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(batches * 4, 4, generator=generator)
        return DataLoader(TensorDataset(x, x[:, :1] - 0.5 * x[:, 1:2]), batch_size=self.batch_size)

    def loss(self, batch):
        return (self.head(torch.tanh(self.body(batch[0]))).float() - batch[1]).square().mean()

    def training_step(self, batch, batch_idx):
        if self.change == "none batches" and batch_idx % 3 == 0:
            return None
        if self.automatic_optimization:
            loss = self.loss(batch)
            return loss * float("inf") if self.change == "scaler skips" and batch_idx % 3 == 1 else loss
        for place, optimizer in enumerate(self.optimizers()):
            if place == 0 or batch_idx % 2:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
        return None

    def on_train_epoch_start(self):
        if self.change == "switched" and self.current_epoch == 1:
            self.trainer.strategy.setup_optimizers(self.trainer)

    def configure_optimizers(self):
        if self.change == "two optimizers":
            return [torch.optim.SGD(part.parameters(), lr=self.lr) for part in (self.body, self.head)]
        params = [param for param in self.parameters() if param.requires_grad]
        if self.change == "switched" and self.current_epoch == 0:
            return torch.optim.AdamW(params, lr=0.02, weight_decay=0.0)
        return torch.optim.SGD(params, lr=self.lr)


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.body)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.body, optimizer, lr=0.1)


def fit(change, *callbacks, net=None, epochs=3, **arguments):
    net = net or Net(change)
    if change == "scaler skips":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=1000)
        arguments["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
    before = [Unfreeze()] if change == "unfrozen" else []
    before += [LearningRateFinder(num_training_steps=5, update_attr=False)] if change == "finder" else []
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[*before, *callbacks],
        accelerator="cpu",
        reload_dataloaders_every_n_epochs=int(change == "reloaded"),
        **{**quiet, **arguments},
    )
    trainer.fit(net)
    return net


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the finders write there


def assert_same_weights(first, second, tolerance=2e-6):
    torch.testing.assert_close(dict(first.named_parameters()), dict(second.named_parameters()), rtol=0, atol=tolerance)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", CALLBACKS)
def test_folded_or_in_a_pass_of_its_own_the_weights_are_the_same(name, change):
    fuse = Fuse(verbose=False)
    if change == "two optimizers" and (name in NEEDS_AUTOMATIC or "Clip" in name):
        owner = "SAM" if name in NEEDS_AUTOMATIC else "GradientClipping"
        with pytest.raises(ValueError, match=rf"^{owner}\("):
            fit(change, CALLBACKS[name]())
        return
    apart = fit(change, CALLBACKS[name]())
    # In float16 the forward pass rounds, and a difference in the last bit of a weight may become one there.
    assert_same_weights(fit(change, fuse, CALLBACKS[name]()), apart, 2e-3 if change == "scaler skips" else 2e-6)
    plain = fit(change)
    assert any(not torch.equal(a, b) for a, b in zip(apart.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("finder", [LearningRateFinder, BatchSizeFinder], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_finder_leaves_the_run_as_it_would_be_without(name, finder, place):
    def find():
        if finder is LearningRateFinder:
            return LearningRateFinder(num_training_steps=5, update_attr=False)
        return BatchSizeFinder(max_trials=1, init_val=4, steps_per_trial=2, max_val=4)

    ordered = [find(), CALLBACKS[name]()] if place == "before" else [CALLBACKS[name](), find()]
    assert_same_weights(fit(None, *ordered), fit(None, CALLBACKS[name]()), 0)


# --- the step event ---


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
@pytest.mark.parametrize("change", ["none batches", "scaler skips"])
def test_an_average_counts_the_steps_that_were_taken(change, fused):
    averaging = WeightAveraging(EMA(0.8))
    fit(change, *[Fuse(verbose=False)] * fused, averaging)
    assert averaging.state_dict()["steps"] == 3 * 4


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_every_optimizer_counts_its_own_steps(fused):
    averaging = WeightAveraging(SWA(7))
    fit("two optimizers", *[Fuse(verbose=False)] * fused, averaging)
    assert averaging.state_dict()["steps_of_each"] == [18, 9]


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
def test_a_trainer_that_fits_on_counts_the_steps_of_the_run(fused):
    averaging, net = WeightAveraging(SWA(0.75)), Net()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[*[Fuse(verbose=False)] * fused], **quiet)
    trainer.fit(net)
    trainer.callbacks.append(averaging)
    trainer.fit_loop.max_epochs = 4  # 24 steps, 6 of them done: averaged from step 18 on
    trainer.fit(net)
    state = next(iter(trainer.optimizers[0].state.values()))
    assert averaging.state_dict()["steps"] == 24 and int(state["num_averaged"]) == 7


@pytest.mark.parametrize("clip", [AutoClip(30), ZClip(0.5, warmup_steps=2)], ids=repr)
def test_a_clip_learns_of_steps_only(clip):
    clipping = GradientClipping(clip)
    fit("none batches", clipping)
    learned = clipping.state_dict()["learned"][0]
    assert int(learned["seen"] if "seen" in learned else learned["learned"][2]) == 3 * 4


def test_noise_is_counted_by_each_optimizer():
    noise = GradientNoise(0.01)
    fit("two optimizers", noise)
    assert noise.state_dict() == {"steps": [18, 9]}


# --- facts that change ---


def test_a_clip_value_that_is_set_during_the_run_is_used_by_fuse():
    class Set(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            trainer.gradient_clip_val = 0.05 if trainer.current_epoch else None

    fused, plain = fit(None, Fuse(verbose=False), Set()), fit(None, Set())
    assert_same_weights(fused, plain)
    assert not torch.allclose(plain.body.weight, fit(None).body.weight, atol=1e-3)


def test_a_plateau_goes_on_with_groups_and_optimizers_that_come_later():
    for change in ("unfrozen", "switched"):
        plateau = PlateauSchedule("loss", patience=0, factor=0.5, check_on_train_epoch_end=True, verbose=False)
        rates = []

        class Log(pl.Callback):
            def on_train_epoch_end(self, trainer, pl_module, rates=rates):
                pl_module.log("loss", 1.0)
                rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

        fit(change, Log(), plateau, epochs=5)
        assert rates[-1] == [pytest.approx(rates[1][0] * 0.5**3)] * len(rates[-1])


def test_preprocessing_behind_a_finder_is_fitted():
    for make in (lambda: LearningRateFinder(num_training_steps=5), lambda: BatchSizeFinder(max_trials=1, max_val=4)):
        for order in (1, -1):
            transform = Preprocess(Standardize())
            fit(None, *[make(), transform][::order])
            assert transform.transform[0].fitted


@pytest.mark.parametrize("order", [1, -1])
def test_a_schedule_starts_from_the_rate_that_a_finder_found(order):
    seen = []

    class See(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    finder = LearningRateFinder(num_training_steps=15, early_stop_threshold=None)
    net = fit(None, *[finder, LRSchedule(cosine(), verbose=False)][::order], See())
    assert net.lr != 0.1 and seen[0] == net.lr and seen[9] == pytest.approx(0.5 * net.lr)


def test_the_last_step_of_reloaded_loaders_ends_the_schedule():
    seen = []

    class See(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    for interval in ("step", "fractional_epoch", "sample"):
        seen.clear()
        fit("reloaded", LRSchedule(cosine(), interval, verbose=False), See())
        assert len(seen) == 6 + 8 + 10 and all(rate > 0 for rate in seen) and seen[-1] < 0.001


def test_snapshots_fall_on_the_cycles_of_several_optimizers(tmp_path):
    ensemble = SnapshotEnsemble(1 / 3, tmp_path)
    fit("two optimizers", ensemble)
    assert len(ensemble.paths) == 3


class Seeded(nn.LazyLinear):
    def reset_parameters(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            super().reset_parameters()


class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.body = Seeded(4)


@pytest.mark.parametrize("fused", [False, True], ids=["torch", "Fuse"])
@pytest.mark.parametrize("name", sorted(CALLBACKS.keys() - {"SAM"}))
def test_lazy_layers(name, fused):
    lazy = fit(None, *[Fuse(verbose=False)] * fused, CALLBACKS[name](), net=Lazy())
    made = Net()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made.body.reset_parameters()
    assert_same_weights(lazy, fit(None, *[Fuse(verbose=False)] * fused, CALLBACKS[name](), net=made), 2e-6)


# --- seams that reach or refuse ---


class Table(Net):
    """An embedding with sparse gradients, or complex weights."""

    def __init__(self, is_complex=False):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(5, 4, sparse=not is_complex)
        self.wave = nn.Parameter(torch.randn(3, dtype=torch.cfloat)) if is_complex else None
        del self.body

    def loss(self, batch):
        h = self.table((batch[0][:, 0].abs() * 2).long().clamp(max=4))
        h = h if self.wave is None else torch.fft.irfft(torch.fft.rfft(h) * self.wave, n=4)
        return (self.head(h) - batch[1]).square().mean()


@pytest.mark.parametrize("is_complex", [False, True], ids=["sparse", "complex"])
@pytest.mark.parametrize("name", sorted(CALLBACKS.keys() - {"ElasticNet"}))
def test_sparse_and_complex_gradients(name, is_complex):
    apart = fit(None, CALLBACKS[name](), net=Table(is_complex))
    folded = fit(None, Fuse(verbose=False), CALLBACKS[name](), net=Table(is_complex))
    assert_same_weights(apart, folded, 1e-5)


class ByHand(Net):
    def __init__(self, returns):
        super().__init__()
        self.automatic_optimization, self.returns = False, returns

    def training_step(self, batch, batch_idx):
        loss = -self.head(batch[0]).log_softmax(1).mean()
        self.manual_backward(loss)
        self.optimizers().step()
        return loss if self.returns else None


@pytest.mark.parametrize("returns", [False, True])
def test_a_loss_written_by_hand_is_refused_under_manual_optimization(returns):
    with pytest.raises(
        RuntimeError, match=r"^LabelSmoothing\(\): training_step returned a loss that cannot be reached"
    ):
        fit(None, LabelSmoothing(0.5), net=ByHand(returns))


def test_a_checkpoint_holds_a_second_copy_only_of_what_is_averaged(tmp_path):
    net = Net()
    net.body.requires_grad_(False)
    averaging = WeightAveraging(EMA(0.5))
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[averaging], **quiet)
    trainer.fit(net)
    trainer.save_checkpoint(tmp_path / "adapter.ckpt")
    saved = torch.load(tmp_path / "adapter.ckpt", weights_only=False)
    assert saved["state_dict"].keys() == net.state_dict().keys()
    assert saved["current_model_state"].keys() == {"head.weight", "head.bias"}
