# SPDX-License-Identifier: Apache-2.0
"""Every callback before, during and after a run: copied, pickled, saved once more, and fitted again."""

import copy
import gc
import io
import pickle
from collections import OrderedDict
from functools import partial
from types import FunctionType, ModuleType

import lightning.pytorch as pl
import pytest
import spawned_worker
import torch
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies import Strategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit import callbacks
from lightning_optkit.averaging import EMA, LAWA, SWA
from lightning_optkit.callbacks import (
    GSAM,
    SAM,
    WSAM,
    ActivationRegularization,
    Augment,
    BatchRegime,
    BatchSizeSchedule,
    CompressCheckpoint,
    DropoutSchedule,
    EarlyStoppingCriterion,
    ElasticNet,
    ExactAccumulation,
    ExactResume,
    Fuse,
    GradientClipping,
    GradientHealth,
    GradientNoise,
    Grokfast,
    HyperparameterSchedule,
    Initialize,
    LabelSmoothing,
    Lookahead,
    LookSAM,
    LRFinder,
    LRSchedule,
    MaxNorm,
    NoiseScale,
    ParameterGroups,
    PlateauSchedule,
    Preprocess,
    PruneTrial,
    QKClip,
    RDrop,
    ReleaseGradients,
    Report,
    ScheduleFree,
    ScheduleFreeWrapper,
    SnapshotEnsemble,
    SpikeGuard,
    StochasticDepth,
    WeightAveraging,
)
from lightning_optkit.clipping import AutoClip, ClipNorm, ZClip
from lightning_optkit.data import CutMix, GaussianNoise, Mixup, Standardize
from lightning_optkit.init import lsuv, mup_width
from lightning_optkit.optimizers import AdamW, ScheduleFreeAdamW
from lightning_optkit.schedules import constant, cosine, exponential, join, linear, sgdr, warmup, warmup_cosine

pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = 256  # the weights are about 300 kB
BOUND = 100_000  # bytes of a pickle
SMALL = dict(epochs=2, accumulate_grad_batches=1, limit_val_batches=1.0)


class Classifier(pl.LightningModule):
    """Everything that a callback may look for. `fails_at` is a batch of the second epoch."""

    def __init__(self, optimizer=torch.optim.SGD, width=WIDTH):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = dict(
                first=nn.Linear(8, width),
                batch_norm=nn.BatchNorm1d(width),
                middle=nn.Linear(width, width),
                norm=nn.LayerNorm(width),
                dropout=nn.Dropout(0.2),
                last=nn.Linear(width, 3),
            )
            self.net = nn.Sequential(OrderedDict(layers))
        self.optimizer, self.fails_at = optimizer, None

    def forward(self, x):
        return self.net(x.flatten(1))

    def training_step(self, batch, batch_idx):
        if self.fails_at == (self.current_epoch, batch_idx):
            raise RuntimeError("out of luck")
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.optimizer(self.parameters(), lr=0.01)


def loader(count=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, 2, 2, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(3, (count,), generator=generator)), batch_size=4)


def scheduled(schedule):
    return lambda: LRSchedule(schedule, verbose=False)


class Trial:
    """What PruneTrial uses of an `optuna.Trial`."""

    def set_user_attr(self, key, value):
        raise AssertionError("no trial ends here")


ROWS = {
    "Grokfast": Grokfast,
    "GSAM": GSAM,
    "Lookahead": partial(Lookahead, 2),
    "LookSAM": LookSAM,
    "SAM": SAM,
    "WSAM": WSAM,
    "ActivationRegularization": partial(ActivationRegularization, "net.first"),
    "Augment": lambda: Augment(GaussianNoise(0.1)),
    "Augment of several": lambda: Augment([GaussianNoise(0.1), Mixup(0.2), CutMix()]),
    "BatchRegime": partial(BatchRegime, 3),
    "BatchRegime of all": partial(BatchRegime, "full"),
    "BatchSizeSchedule": partial(BatchSizeSchedule, {1: 6}, "linear", verbose=False),
    "CompressCheckpoint": CompressCheckpoint,
    "DropoutSchedule": lambda: DropoutSchedule(linear(0.0, 1.0), verbose=False),
    "EarlyStoppingCriterion": partial(EarlyStoppingCriterion, "GL", alpha=50.0, verbose=False),
    "ElasticNet": partial(ElasticNet, l1=1e-4, l2=1e-3, verbose=False),
    "ExactAccumulation": ExactAccumulation,
    "ExactResume": ExactResume,
    "Fuse": partial(Fuse, verbose=False),
    "GradientClipping": lambda: GradientClipping(ClipNorm(1.0)),
    "GradientClipping by AutoClip": lambda: GradientClipping(AutoClip(10)),
    "GradientClipping by ZClip": lambda: GradientClipping(ZClip()),
    "GradientHealth": partial(GradientHealth, check_every=1),
    "GradientNoise": GradientNoise,
    "HyperparameterSchedule": lambda: HyperparameterSchedule("weight_decay", cosine(), base=0.1, verbose=False),
    "HyperparameterSchedule of dropout": lambda: HyperparameterSchedule("dropout", cosine(), verbose=False),
    "Initialize": lambda: Initialize(lsuv, verbose=False, even_if_trained=True, seed=0),
    "Initialize by muP": lambda: Initialize(partial(mup_width, base=Classifier(width=32)), verbose=False, seed=0),
    "LRFinder": partial(LRFinder, num_steps=20, verbose=False),
    "LRSchedule": scheduled(warmup_cosine(warmup=0.1)),
    "LRSchedule by join": scheduled(join(warmup(constant(), 2), 3, exponential(0.9))),
    "LRSchedule by sgdr": scheduled(sgdr(2)),
    "LabelSmoothing": LabelSmoothing,
    "MaxNorm": partial(MaxNorm, 1.0),
    "NoiseScale": partial(NoiseScale, every=1, verbose=False),
    "ParameterGroups": partial(ParameterGroups, 0.1, layer_decay=0.9, verbose=False),
    "PlateauSchedule": partial(PlateauSchedule, "val_loss", patience=0, verbose=False),
    "Preprocess": lambda: Preprocess([torch.Tensor.double, Standardize(), torch.Tensor.float]),
    "PruneTrial": partial(PruneTrial, Trial()),
    "QKClip": partial(QKClip, 1.0, names="net", q="first", k="middle", num_heads=4),
    "RDrop": RDrop,
    "ReleaseGradients": ReleaseGradients,
    "Report": partial(Report, write=False),
    "ScheduleFree": ScheduleFree,
    "ScheduleFreeWrapper": ScheduleFreeWrapper,
    "SnapshotEnsemble": partial(SnapshotEnsemble, 2, save_weights_only=True),
    "SnapshotEnsemble of sgdr": lambda: SnapshotEnsemble(sgdr(cycle=0.5), save_weights_only=True),
    "SpikeGuard": partial(SpikeGuard, every=2, warmup=10, verbose=False),
    "StochasticDepth": partial(StochasticDepth, "net.middle", verbose=False),
    "WeightAveraging": lambda: WeightAveraging(EMA(0.9)),
    "WeightAveraging folded": lambda: WeightAveraging(EMA(0.9)),
    "WeightAveraging by LAWA": lambda: WeightAveraging(LAWA(2)),
    "WeightAveraging with buffers": lambda: WeightAveraging(SWA(0.5), average_buffers=True, update_bn=True),
}
OPTIMIZERS = {"ReleaseGradients": AdamW, "ScheduleFree": ScheduleFreeAdamW, "WeightAveraging folded": AdamW}
# What it learned is as large as the weights: those of the best validation; averages of buffers, which are short.
LEARNS_WEIGHTS = {"EarlyStoppingCriterion", "Grokfast", "LookSAM", "Lookahead", "ScheduleFreeWrapper", "SpikeGuard"}
# For what can be asked after a fit: `averaged_parameters`.
HOLDS = {name: {"AdamW" if "folded" in name else "SGD"} for name in ROWS if name.startswith("WeightAveraging")}
HOLDS["Initialize by muP"] = {"Classifier"}  # the narrow one
EACH = pytest.mark.parametrize("name", ROWS)

OF_A_RUN = (pl.Trainer, pl.LightningModule, torch.optim.Optimizer, DataLoader, Strategy, _Loop)


class Pickler(pickle.Pickler):
    """A pickler that refuses objects of a run; a module passed as an argument (muP's narrow one) is not one."""

    def __init__(self, file, arguments):
        super().__init__(file)
        self.arguments = arguments

    def reducer_override(self, value):
        if isinstance(value, OF_A_RUN) and not any(value is argument for argument in self.arguments):
            pytest.fail(f"a {type(value).__name__} is in the pickle")
        return NotImplemented


def pickled(name, callback):
    """The bytes, of which few are there."""
    schemes = vars(callback).get("_schemes", [])
    file = io.BytesIO()
    Pickler(file, [scheme.keywords["base"] for scheme in schemes if isinstance(scheme, partial)]).dump(callback)
    assert len(file.getvalue()) < BOUND or name in LEARNS_WEIGHTS
    return file.getvalue()


def copies(name, callback):
    return [pickle.loads(pickled(name, callback)), copy.deepcopy(callback)]


class Probe(pl.Callback):
    """Copies a callback in the middle of the second epoch, and takes its state as the training ends."""

    def __init__(self, name, callback):
        self.name, self.callback, self.copies, self.states, self.state = name, callback, [], [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 0:
            self.copies = copies(self.name, self.callback)
            self.states = copy.deepcopy([each.state_dict() for each in [*self.copies, self.callback]])

    def on_train_end(self, trainer, pl_module):
        self.state = copy.deepcopy(self.callback.state_dict())


@pytest.fixture
def run(make_trainer):
    """run(name, callback, *others, fails_at): the trainer and its module, after a fit."""

    def run_(name, callback, *others, fails_at=None):
        module = Classifier(OPTIMIZERS.get(name, torch.optim.SGD))
        module.fails_at = fails_at
        trainer = make_trainer(callback, *others, **SMALL)
        torch.manual_seed(0)
        if fails_at is None:
            trainer.fit(module, loader(), loader())
        else:
            with pytest.raises(RuntimeError, match="out of luck"):
                trainer.fit(module, loader(), loader())
        return trainer, module

    return run_


def weights(module, frozen):
    return frozen(dict(module.state_dict()))


ALONE = {}  # weights of the module after a fit with one that has seen nothing before, by row


@pytest.fixture
def expected(run, frozen):
    """expected(name): those of a row."""

    def expected_(name):
        if name not in ALONE:
            ALONE[name] = weights(run(name, ROWS[name]())[1], frozen)
        return ALONE[name]

    return expected_


def test_every_callback_has_a_row():
    # A plugin, and one that works beside another: tests/callbacks/test_power_snapshots.py copies it.
    elsewhere = {"SafeCheckpointIO", "PowerSnapshots"}
    assert {name.split(" ")[0] for name in ROWS} == set(callbacks.__all__) - elsewhere


@EACH
def test_before_during_and_after_a_fit_it_is_copied_and_every_copy_trains_alike(name, run, frozen, expected):
    original = ROWS[name]()
    made = copies(name, original)
    probe = Probe(name, original)
    trainer, module = run(name, original, probe)
    assert len(probe.copies) == 2
    assert frozen(probe.states) == [frozen(probe.states[-1])] * 3
    made += [*probe.copies, *copies(name, original), original]
    for each in [module, *(run(name, each)[1] for each in made)]:
        assert weights(each, frozen) == expected(name)
    assert trainer is not None


@EACH
def test_after_a_fit_that_failed(name, run, frozen, expected):
    failed = ROWS[name]()
    trainer, _ = run(name, failed, fails_at=(1, 1))
    for each in [*copies(name, failed), failed]:
        assert weights(run(name, each)[1], frozen) == expected(name)
    assert trainer is not None


@EACH
def test_after_a_fit_that_failed_before_it_began(name, run, make_trainer, frozen, expected):
    class Fails(pl.Callback):
        def setup(self, trainer, pl_module, stage):
            raise RuntimeError("out of luck")

    failed = ROWS[name]()
    trainer = make_trainer(failed, Fails(), **SMALL)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(Classifier(OPTIMIZERS.get(name, torch.optim.SGD)), loader(), loader())
    for each in [*copies(name, failed), failed]:
        assert weights(run(name, each)[1], frozen) == expected(name)


@pytest.mark.parametrize("stage", ["validate", "test"])
@EACH
def test_after_an_evaluation(name, stage, run, make_trainer, frozen, expected):
    trainer, module = run(name, callback := ROWS[name]())
    getattr(trainer, stage)(module, loader(), verbose=False)
    made = copies(name, callback)[:1]
    if name != "Preprocess":  # which has to be fitted first
        fresh = ROWS[name]()
        getattr(make_trainer(fresh, **SMALL), stage)(module, loader(), verbose=False)
        made += copies(name, fresh)[1:]
    for each in made:
        assert weights(run(name, each)[1], frozen) == expected(name)


@EACH
def test_a_checkpoint_written_after_the_fit_has_the_state_of_its_end(name, run, frozen, tmp_path):
    probe = Probe(name, callback := ROWS[name]())
    trainer, _ = run(name, callback, probe)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)["callbacks"].get(callback.state_key, {})
    copied = pickle.loads(pickled(name, callback)).state_dict()
    for state in (saved, copied, probe.state):
        state.pop("timings", None)  # which a Report sums up behind the training
    assert frozen(saved) == frozen(copied) == frozen(probe.state)


def test_all_can_be_given_to_a_spawned_process(run):
    """Like `Trainer(strategy="ddp_spawn")`: a generator or a temporary tensor fails only there."""
    given = [make() for make in ROWS.values()]
    run("Augment", used := ROWS["Augment of several"]())
    context = torch.multiprocessing.get_context("spawn")
    inbox = context.SimpleQueue()
    process = context.Process(target=spawned_worker.classes_of, args=([*given, used], inbox))
    process.start()
    assert inbox.get() == [type(callback).__name__ for callback in [*given, used]]
    process.join()


@EACH
def test_after_the_fit_no_run_is_held(name, run):
    """Otherwise the memory of a run is kept until the next one, as long as the callback is referenced."""
    callback = ROWS[name]()
    run(name, callback)
    gc.collect()
    held, seen = set(), set()
    frontier = [value for name, value in vars(callback).items() if name not in ("log", "log_dict")]  # Lightning's own
    while frontier:
        value = frontier.pop()
        if id(value) in seen or isinstance(value, type | ModuleType):
            continue
        seen.add(id(value))
        if isinstance(value, OF_A_RUN):
            held.add(type(value).__name__)
            continue
        is_function = isinstance(value, FunctionType)  # whose globals hold what other tests left there
        frontier += [value.__closure__, value.__defaults__, vars(value)] if is_function else gc.get_referents(value)
    assert held == HOLDS.get(name, set())
