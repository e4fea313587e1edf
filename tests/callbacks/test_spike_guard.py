# SPDX-License-Identifier: Apache-2.0
"""Bad batches are dropped, broken weights return, and healthy runs are not touched."""

import copy
import logging
import pickle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import (
    ExactAccumulation,
    ExactResume,
    Fuse,
    GradientClipping,
    Grokfast,
    LabelSmoothing,
    Lookahead,
    LookSAM,
    LRSchedule,
    ScheduleFreeWrapper,
    SpikeGuard,
    WeightAveraging,
)
from lightning_optkit.clipping import AutoClip, ClipNorm
from lightning_optkit.diagnostics import SpikeEvent
from lightning_optkit.optimizers import Prodigy, ScheduleFreeAdamW
from lightning_optkit.schedules import cosine

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
LR = 0.01


class Net(pl.LightningModule):
    """`bad` maps steps to what their batches suffer: "x100", "nan", "none"."""

    def __init__(self, bad=None, configure=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Dropout(0.05), nn.Linear(24, 3))
        self.bad, self.configure = bad or {}, configure
        self.losses, self.rates = [], []

    def training_step(self, batch, batch_idx):
        x, y = batch
        bad = self.bad.get(self.trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1)
        if bad == "none":
            return None
        loss = nn.functional.cross_entropy(self.net(x * 100 if bad == "x100" else x), y)
        if bad == "x100":
            loss = loss * 20
        self.losses.append(float(loss.detach()))
        return loss * float("nan") if bad == "nan" else loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.rates.append(float(self.trainer.optimizers[0].param_groups[0]["lr"]))

    def configure_optimizers(self):
        return self.configure(self) if self.configure else torch.optim.AdamW(self.parameters(), LR)


def loader(batch_size=16):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(320, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)


def fit(module, *callbacks, steps=160, **kwargs):
    pl.seed_everything(3, verbose=False)
    arguments = {"max_steps": steps, "max_epochs": -1, "accelerator": "cpu", **QUIET, **kwargs}
    resumed = arguments.pop("ckpt_path", None)
    trainer = pl.Trainer(**arguments, callbacks=list(callbacks))
    trainer.fit(module, loader(), ckpt_path=resumed)
    return trainer


def guard(**kwargs):
    return SpikeGuard(**{"every": 20, "rewarm": 5, "warmup": 40, "verbose": False, **kwargs})


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Broken(pl.Callback):
    """Multiplies the rate in these steps."""

    def __init__(self, steps, factor=300):
        self.steps, self.factor = steps, factor

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = LR * (self.factor if trainer.global_step in self.steps else 1)


class Always(pl.Callback):
    """Weights are broken before every batch of these steps."""

    def __init__(self, since, until=1000):
        self.since, self.until = since, until

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.since <= trainer.global_step < self.until:
            with torch.no_grad():
                for param in pl_module.parameters():
                    param.mul_(-30)


def frozen(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return [frozen(item) for item in value] if isinstance(value, list | tuple) else value


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(torch.nan_to_num(a, 1.5), torch.nan_to_num(b, 1.5))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(*pair) for pair in zip(a, b, strict=True))
    return a == b


class Recorder(pl.Callback):
    """What the run holds before each step that is taken, and after each rollback."""

    def __init__(self, guarded):
        self.guarded, self.before, self.after_rollback = guarded, {}, {}

    def _state(self, trainer, pl_module):
        optimizer = trainer.optimizers[0].state_dict()
        learned = [c.state_dict() for c in trainer.callbacks if isinstance(c, WeightAveraging | GradientClipping)]
        return frozen([pl_module.state_dict(), {k: v for k, v in optimizer.items() if k != "param_groups"}, learned])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before[trainer.global_step] = self._state(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.guarded.events and self.guarded.events[-1].step == trainer.global_step - 1:
            event = self.guarded.events[-1]
            if event.action in ("rollback", "stop"):
                self.after_rollback[event.back_to] = self._state(trainer, pl_module)


PRECISIONS = {
    "32": {},
    "bf16": {"precision": "bf16-mixed"},
    "fp16": {"plugins": lambda: [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))]},
}
STRATEGIES = {
    "alone": list,
    "Fuse": lambda: [Fuse(verbose=False), GradientClipping(AutoClip(90)), WeightAveraging(EMA(0.9))],
    "own passes": lambda: [GradientClipping(ClipNorm(1.0)), WeightAveraging(SWA(10)), LabelSmoothing(0.1)],
    "accumulation": lambda: [ExactAccumulation()],
    "schedule": lambda: [LRSchedule(cosine())],
}


def precision_of(name):
    return {key: value() if callable(value) else value for key, value in PRECISIONS[name].items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_healthy_run_is_the_one_without_it(name, precision):
    more = {"accumulate_grad_batches": 2} if name == "accumulation" else {}
    guarded = guard(warmup=20)
    fit(module := Net(), guarded, *STRATEGIES[name](), **more, **precision_of(precision), steps=100)
    fit(plain := Net(), *STRATEGIES[name](), **more, **precision_of(precision), steps=100)
    assert same(module, plain) and not guarded.events and module.rates == plain.rates


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
@pytest.mark.parametrize("bad", ["x100", "nan"])
@pytest.mark.parametrize("name", ["alone", "Fuse", "own passes"])
def test_a_dropped_batch_is_as_one_without_a_loss(name, bad):
    """Nothing is left of it, in running statistics, moments, averages and histories of clips either."""
    dropped, without = Net({120: bad}), Net({120: "none"})
    dropped.net[3].p = without.net[3].p = 0.0  # a batch without a loss draws no mask
    fit(dropped, guarded := guard(), *STRATEGIES[name]())
    fit(without, *STRATEGIES[name]())
    assert [(event.step, event.action) for event in guarded.events] == [(120, "skip")]
    assert same(dropped, without) and len(dropped.losses) == len(without.losses) + 1


@pytest.mark.parametrize("name", ["torch", "torch, fused", "Fuse"])
def test_dropped_under_a_loss_scaler(name):
    fused = name == "torch, fused" or None
    module = Net({100: "x100"}, lambda m: torch.optim.AdamW(m.parameters(), LR, fused=fused))
    fuse = [Fuse(verbose=False), GradientClipping(ClipNorm(1.0))] if name == "Fuse" else []
    trainer = fit(module, guarded := guard(), *fuse, **precision_of("fp16"), steps=110)
    assert [(event.step, event.action) for event in guarded.events] == [(100, "skip")]
    assert trainer.global_step == 110 and trainer.optimizers[0].state[module.net[0].weight]["step"] == 109


@pytest.mark.parametrize("name", ["torch, fused", "Fuse"])
def test_a_loss_that_is_not_finite_is_none_of_the_scalers(name):
    module = Net({100: "nan"}, lambda m: torch.optim.AdamW(m.parameters(), LR, fused=name == "torch, fused" or None))
    fuse = [Fuse(verbose=False)] if name == "Fuse" else []
    fit(module, guarded := guard(), *fuse, **precision_of("fp16"), steps=110)
    assert [(event.step, event.action) for event in guarded.events] == [(100, "skip")]
    with (
        pytest.raises(ValueError, match="of step 20 are nan and nan, and 21 in a row"),
        pytest.warns(UserWarning, match="SpikeGuard: step 2: loss nan"),
    ):
        fit(Net(dict.fromkeys(range(160), "nan")), guard(), *fuse, **precision_of("fp16"), steps=30)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None.")
def test_accumulated_batches_are_dropped_together():
    windows = [batch // 20 * 7 + batch % 20 // 3 for batch in range(240)]  # 20 batches an epoch, in threes
    guarded = guard(warmup=30)
    fit(module := Net({131: "x100"}), guarded, accumulate_grad_batches=3, steps=80)
    assert [(event.step, event.action) for event in guarded.events] == [(windows[131], "skip")]
    others = {batch: "none" for batch in range(240) if windows[batch] == windows[131]}
    without = Net(others)
    module.net[3].p = without.net[3].p = 0.0
    dropped = Net({131: "x100"})
    dropped.net[3].p = 0.0
    fit(dropped, guard(warmup=30), accumulate_grad_batches=3, steps=80)
    fit(without, accumulate_grad_batches=3, steps=80)
    assert same(dropped, without)


ROLLED_BACK = {
    "alone": list,
    "folded": lambda: [Fuse(verbose=False), GradientClipping(AutoClip(90)), WeightAveraging(EMA(0.9))],
    "own passes": lambda: [GradientClipping(AutoClip(90)), WeightAveraging(SWA(10))],
    "LAWA": lambda: [WeightAveraging(LAWA(3, every=5))],
}


@pytest.mark.parametrize("name", ROLLED_BACK)
def test_broken_weights_return_bit_for_bit(name):
    guarded = guard()
    recorder = Recorder(guarded)
    fit(module := Net(), guarded, *ROLLED_BACK[name](), Broken({110}), recorder)
    rollbacks = [event for event in guarded.events if event.action == "rollback"]
    assert len(rollbacks) == 1 and 90 < rollbacks[0].back_to <= 110 < rollbacks[0].step < 120
    assert equal(recorder.after_rollback[rollbacks[0].back_to], recorder.before[rollbacks[0].back_to])
    assert sum(module.losses[-20:]) < 1.3 * sum(module.losses[80:100])
    fit(without := Net(), *ROLLED_BACK[name](), Broken({110}))
    assert sum(module.losses[-20:]) < 0.8 * sum(without.losses[-20:])


@pytest.mark.parametrize("every", [4, 7])
def test_a_copy_of_the_last_steps_before_the_losses_rose_is_not_used(every):
    """Harm that is done slowly shows late, so these steps may have had their share in it."""
    fit(Net(), guarded := guard(every=every), Always(110, 111))
    (back_to,) = [event.back_to for event in guarded.events if event.action == "rollback"]
    assert 90 < back_to <= 110 - 4


@pytest.mark.parametrize("optimizer", [Prodigy, ScheduleFreeAdamW], ids=["Prodigy", "Schedule-Free"])
def test_what_an_optimizer_learns_returns_too(optimizer):
    def configure(module):
        made = optimizer(module.parameters(), lr=1.0 if optimizer is Prodigy else LR)
        if hasattr(made, "train"):
            made.train()
        return made

    guarded = guard()
    fit(Net(configure=configure), guarded, Always(110, 111), recorder := Recorder(guarded))
    (back_to,) = [event.back_to for event in guarded.events if event.action == "rollback"]
    assert 90 < back_to <= 110 and equal(recorder.after_rollback[back_to], recorder.before[back_to])


def test_the_rate_grows_again_and_schedulers_do_not_see_it():
    def configure(module):
        optimizer = torch.optim.AdamW(module.parameters(), LR)
        optimizer.register_step_post_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    rates = []  # of the update itself
    guarded = guard(rewarm=4)
    fit(module := Net(configure=configure), guarded, Always(110, 111))
    back = next(event.step for event in guarded.events if event.action == "rollback")
    plain = [LR * 0.99**step for step in range(160)]
    assert module.rates == pytest.approx(plain)
    factors = [rate / expected for rate, expected in zip(rates, plain, strict=True)]
    expected = [1.0] * (back + 1) + [0.2, 0.4, 0.6, 0.8] + [1.0] * 200
    assert factors == pytest.approx(expected[:160])


def test_shrunk():
    guarded = guard(action="shrink")
    fit(module := Net({120: "x100"}), guarded)
    (event,) = guarded.events
    assert event == SpikeEvent(120, "shrink", event.loss, event.norm) and event.loss > 5
    fit(skipped := Net({120: "x100"}), guard())
    assert not same(module, skipped)
    nan = guard(action="shrink")
    fit(Net({120: "nan"}), nan)
    assert [event.action for event in nan.events] == ["skip"]


def test_it_gives_up_with_the_last_sound_state():
    guarded = guard(max_rollbacks=2)
    recorder = Recorder(guarded)
    with pytest.warns(
        UserWarning, match="too high after 2 rollbacks: back to the state before step .*, and the run stops"
    ):
        fit(module := Net(), guarded, Always(110), recorder)
    left = [event for event in guarded.events if event.action != "skip"]
    assert [event.action for event in left] == ["rollback", "rollback", "stop"]
    assert 90 < left[0].back_to <= 110 and 70 < left[1].back_to == left[2].back_to < left[0].back_to  # the older copy
    assert len(module.losses) < 130 and equal(frozen(module.state_dict()), recorder.before[left[2].back_to][0])


@pytest.mark.parametrize("since", [50, 100])
def test_without_copies_a_new_level_is_accepted(since):
    """Or a run whose data changed would never step again."""

    class Harder(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 40 if self.global_step >= since else loss

    guarded = guard(rollback=False)
    fit(module := Harder(), guarded)
    actions = [event.action for event in guarded.events]
    assert actions == ["skip", "skip", "accept"] and len(module.losses) == 160


@pytest.mark.parametrize(("since", "rollback"), [(0, True), (100, False)])
def test_a_run_that_takes_no_step_ends_with_an_error(since, rollback):
    bad = dict.fromkeys(range(since, 160), "nan")
    guarded, module = guard(rollback=rollback), Net(bad)
    before = frozen(module.state_dict())
    last = since + 20  # it is judged to be broken every third step
    said = rf"^SpikeGuard: loss and gradient norm of step {last} are nan and nan, and 21 in a row were not finite;"
    with (
        pytest.warns(UserWarning, match=f"SpikeGuard: step {since + 2}: loss nan"),
        pytest.raises(ValueError, match=said),
    ):
        fit(module, guarded)
    assert [event.step for event in guarded.events] == [*range(since, last + 1)]
    assert {event.action for event in guarded.events} == {"skip"}
    assert equal(frozen(module.state_dict()), before) == (since == 0)


@pytest.mark.filterwarnings("ignore:SpikeGuard. step")
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_short_run_that_takes_no_step_ends_with_an_error(steps):
    with pytest.raises(ValueError, match=f"of step {steps - 1} are nan and nan, and {steps} in a row"):
        fit(Net(dict.fromkeys(range(160), "nan")), guard(), steps=steps)


@pytest.mark.filterwarnings("ignore:SpikeGuard. step")
def test_a_run_that_begins_with_some_bad_batches_goes_on():
    guarded = guard()
    fit(module := Net(dict.fromkeys(range(18), "nan")), guarded, steps=60)
    fit(without := Net(dict.fromkeys(range(18), "nan")), guard(rollback=False), steps=60)
    assert len(guarded.events) == 18 and same(module, without)
    fit(Net({59: "nan"}), ended := guard(), steps=60)  # the last step alone
    assert len(ended.events) == 1


@pytest.mark.filterwarnings("ignore:SpikeGuard. step", "ignore:You.re resuming", "ignore:Be aware that when using")
def test_a_resumed_run_counts_the_steps_before(tmp_path):
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    bad = dict.fromkeys(range(160), "nan")
    with pytest.raises(ValueError, match="21 in a row"):
        fit(Net(bad), ExactResume(), guard(), saves, enable_checkpointing=True)
    with pytest.raises(ValueError, match="of step 20 are nan and nan, and 21 in a row"):
        fit(Net(bad), ExactResume(), guard(), ckpt_path=tmp_path / "step=10.ckpt")


def test_copies_of_other_groups_are_not_used():
    class Unfreezes(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 109:
                extra = nn.Parameter(torch.zeros(2))
                pl_module.extra = extra
                trainer.optimizers[0].add_param_group({"params": [extra]})

    guarded = guard()
    fit(Net(), guarded, Unfreezes(), Always(110), steps=130)
    assert "rollback" not in [event.action for event in guarded.events]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
@pytest.mark.parametrize("name", ROLLED_BACK)
@pytest.mark.parametrize("stop_at", [111, 113, 116])
def test_resumed_within_a_rollback_it_is_exact(tmp_path, name, stop_at):
    def callbacks():
        return [ExactResume(), guard(rewarm=8), *ROLLED_BACK[name](), Broken({110})]

    fit(whole := Net(), *(of_whole := callbacks()))
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=stop_at, save_top_k=-1, filename="{step}")
    first = Net()
    fit(first, *callbacks(), saves, steps=stop_at, enable_checkpointing=True)
    fit(
        resumed := Net(),
        *(of_resumed := callbacks()),
        saves,
        enable_checkpointing=True,
        ckpt_path=tmp_path / f"step={stop_at}.ckpt",
    )
    assert same(whole, resumed)
    assert of_whole[1].events == of_resumed[1].events and any(e.action == "rollback" for e in of_whole[1].events)


def test_pickled_and_copied_after_a_fit():
    guarded = guard()
    fit(Net({120: "x100"}), guarded)
    for copied in (pickle.loads(pickle.dumps(guarded)), copy.deepcopy(guarded)):
        assert copied.events == guarded.events and equal(copied.state_dict(), guarded.state_dict())


def test_two_fits():
    guarded = guard()
    fit(Net({120: "x100"}), guarded)
    fit(Net(), guarded)
    assert not guarded.events


def test_what_it_says(caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(Net({90: "x100"}), guarded := guard(verbose=True), Broken({110}))
    texts = [text for text in caplog.messages if text.startswith("SpikeGuard: ")]
    assert len(texts) == len(guarded.events)
    assert texts[0].startswith("SpikeGuard: step 90: loss ") and texts[0].endswith("are usual: the batch is dropped.")
    back_to = guarded.events[-1].back_to
    assert texts[-1].endswith(
        f"the losses stay too high: back to the state before step {back_to}, and to the rate in 5 steps."
    )


class Manual(Net):
    automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "callbacks", "message"),
    [
        (Manual, lambda: [guard()], "optimizes manually"),
        (Net, lambda: [guard(), Lookahead()], "Lookahead keeps weights or gradients of its own"),
        (Net, lambda: [guard(), Grokfast()], "Grokfast keeps"),
        (Net, lambda: [guard(), LookSAM()], "LookSAM keeps"),
        (Net, lambda: [guard(), ScheduleFreeWrapper()], "ScheduleFreeWrapper keeps"),
        (
            Net,
            lambda: [guard(), StochasticWeightAveraging(0.1)],
            "StochasticWeightAveraging keeps .* ok.WeightAveraging",
        ),
        (Net, lambda: [guard(), EMAWeightAveraging()], "EMAWeightAveraging keeps"),
        (lambda: Net(configure=lambda m: torch.optim.LBFGS(m.parameters())), lambda: [guard()], "LBFGS evaluates"),
    ],
    ids=["manual", "Lookahead", "Grokfast", "LookSAM", "ScheduleFreeWrapper", "SWA", "EMA", "LBFGS"],
)
def test_refused(module, callbacks, message):
    with pytest.raises(ValueError, match=rf"^SpikeGuard\(.*{message}"):
        fit(module(), *callbacks())


def test_beside_lookahead_without_rollback():
    fit(Net({120: "x100"}), guarded := guard(rollback=False), Lookahead())
    assert [event.action for event in guarded.events] == ["skip"]


@pytest.mark.parametrize(
    "arguments",
    [
        {"action": "clip"}, {"rollback": 1}, {"patience": 0}, {"every": 0}, {"rewarm": -1}, {"max_rollbacks": 0},
        {"threshold": 0.0}, {"window": 3}, {"warmup": 1}, {"verbose": None},
    ],
    ids=lambda arguments: next(iter(arguments)),
)  # fmt: skip
def test_wrong_arguments(arguments):
    with pytest.raises((TypeError, ValueError), match=rf"^SpikeGuard\({next(iter(arguments))}="):
        SpikeGuard(**arguments)


def test_a_damaged_state_changes_nothing():
    guarded = guard()
    fit(Net({120: "x100"}), guarded)
    before = guarded.state_dict()
    for damaged in (
        {},
        {**before, "detector": {}},
        {**before, "events": 3},
        {**before, "counts": [1]},
        {**before, "calm": -1},
        {**before, "copies": [{}]},
    ):
        with pytest.raises((TypeError, ValueError)):
            guarded.load_state_dict(damaged)
        assert equal(guarded.state_dict(), before)


def test_a_state_of_an_older_version_goes_on_from_its_older_copy():
    guarded, older = guard(every=4), guard(every=4)
    fit(Net(), guarded, steps=110)
    state = guarded.state_dict()
    del state["calm"]
    older.load_state_dict(state)
    assert equal(older.state_dict(), {**guarded.state_dict(), "calm": 0})
