# SPDX-License-Identifier: Apache-2.0
"""Configuration files create what they name, also after a dump, for every public class."""

import copy
import importlib
import inspect
import math
from collections.abc import Iterator

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, DemoModel
from torch import nn

import lightning_optkit as ok

pytestmark = pytest.mark.filterwarnings("ignore")


def named(class_path, /, **init_args):
    """The entry of a file; a name without a dot is one of this package's front door."""
    path = class_path if class_path.startswith("torch.") else f"lightning_optkit.{class_path}"
    return {"class_path": path, "init_args": init_args}


COSINE = named("schedules.cosine", min_factor=0.1)
HE = "lightning_optkit.init.he"
CURVE = {"steps": [1, 2], "values": [0.5, 0.25], "every": 1, "num_appended": 2}
ROW = {"module": "a", "parameter": "weight", "scheme": "he", "shape": [2, 3], "std": 0.5}

# What the file may name, by the type that takes it: (class, arguments) as the file has them.
CALLBACKS = [
    ("ActivationRegularization", {"names": "layer.*", "alpha": 1.5}),
    ("Augment", {"augmentations": named("Mixup", alpha=0.3), "seed": 3}),
    ("Augment", {"augmentations": [named("Mixup", alpha=0.3), named("GaussianNoise", sigma=0.2)], "inputs": ["x"]}),
    ("BatchRegime", {"regime": "single"}),
    ("BatchRegime", {"regime": 7}),
    ("BatchSizeSchedule", {"schedule": {0: 4, 2: 8}, "lr_scaling": "sqrt"}),
    ("BatchSizeSchedule", {"schedule": named("schedules.piecewise_constant", milestones=[2], factors=[1, 2])}),
    ("CompressCheckpoint", {"state_dtype": "torch.bfloat16"}),
    ("CompressCheckpoint", {"state_dtype": "int8"}),
    ("DropoutSchedule", {"schedule": COSINE, "interval": "epoch", "base": 0.3}),
    ("EarlyStoppingCriterion", {"criterion": "UP", "successive": 4}),
    ("ElasticNet", {"l1": 0.1, "l2": 0.2}),
    ("ExactAccumulation", {"weight": "math.fsum"}),
    ("ExactResume", {}),
    ("Fuse", {"rounding": "kahan", "state_dtype": "torch.bfloat16", "norms": False}),
    ("Fuse", {"state_dtype": "int8"}),
    ("GradientClipping", {"clip": named("ClipNorm", max_norm=2.0)}),
    ("GradientClipping", {"clip": named("ClipPerTensor", max_norm=2.0)}),
    ("GradientClipping", {"clip": named("ClipValue", max_value=2.0)}),
    ("GradientClipping", {"clip": named("ClipUnitwise", ratio=0.02), "leave_out": ["head.*"]}),
    ("GradientClipping", {"clip": named("AutoClip", percentile=20.0)}),
    ("GradientClipping", {"clip": named("ZClip", alpha=0.9)}),
    ("GradientHealth", {"check_every": 50}),
    ("GradientNoise", {"eta": 0.3, "seed": 5}),
    (
        "HyperparameterSchedule",
        {"name": "weight_decay", "schedule": named("schedules.warmup", schedule=COSINE, steps=5)},
    ),
    ("HyperparameterSchedule", {"name": "l1", "schedule": COSINE, "interval": "sample", "count": "builtins.len"}),
    ("Initialize", {"scheme": HE, "activation": "tanh", "seed": 1}),
    ("Initialize", {"scheme": HE, "activation": named("torch.nn.LeakyReLU", negative_slope=0.2)}),
    ("Initialize", {"scheme": HE, "activation": {"class_path": "torch.nn.Tanh"}}),
    ("Initialize", {"scheme": [HE, "lightning_optkit.init.zero_residual"], "activation": {"a*": "relu", "b": "tanh"}}),
    ("LabelSmoothing", {"smoothing": 0.2}),
    ("LRFinder", {"max_lr": 1.0, "num_steps": 50, "suggestion": "steepest", "apply": False}),
    ("LRSchedule", {"schedule": named("schedules.join", a=COSINE, at=0.5, b=named("schedules.constant", factor=0.1))}),
    ("MaxNorm", {"max_norm": 2.0, "names": "a*"}),
    ("NoiseScale", {"every": 5, "parts": 4, "verbose": False}),
    (
        "ParameterGroups",
        {"weight_decay": 0.1, "no_decay": ["bias", "torch.nn.LayerNorm"], "overrides": {"a*": {"lr": 0.1}}},
    ),
    ("PlateauSchedule", {"monitor": "val_loss", "mode": "max"}),
    ("QKClip", {"threshold": 50.0, "names": "a.*", "q": "query", "num_heads": 2}),
    ("PowerSnapshots", {"dirpath": "snapshots", "every": 100}),
    ("Preprocess", {"transform": named("OneHot", drop="first"), "field": ["x"]}),
    ("Preprocess", {"transform": [named("Impute", strategy="median"), named("Standardize", with_std=False)]}),
    ("Preprocess", {"transform": [named("RobustScale"), "torch.log1p"]}),
    ("RDrop", {"alpha": 2.0}),
    ("ReleaseGradients", {}),
    ("Report", {"path": "report.html", "measure_every": 5}),
    ("Grokfast", {"alpha": 0.9, "lamb": 1.0}),
    ("GSAM", {"rho": 0.1, "alpha": 0.2}),
    ("Lookahead", {"k": 6, "alpha": 0.8}),
    ("LookSAM", {"k": 3, "alpha": 0.5}),
    ("SAM", {"rho": 0.1, "adaptive": True}),
    ("WSAM", {"gamma": 0.8, "adaptive": True}),
    ("ScheduleFree", {}),
    ("ScheduleFreeWrapper", {"momentum": 0.8, "weight_decay_at_y": 0.1, "r": 1.0}),
    ("SnapshotEnsemble", {"cycle": named("schedules.sgdr", cycle=20), "dirpath": "kept"}),
    ("SnapshotEnsemble", {"cycle": 20}),
    ("SnapshotEnsemble", {"cycle": 0.25}),
    ("SpikeGuard", {"action": "shrink", "every": 50, "threshold": 2.5}),
    ("StochasticDepth", {"names": "layer.*", "p": 0.2}),
    ("WeightAveraging", {"average": named("EMA", decay=0.9), "update_bn": True}),
    ("WeightAveraging", {"average": named("SWA", start=0.5, every=2)}),
    ("WeightAveraging", {"average": named("SWA", start=500)}),
    ("WeightAveraging", {"average": named("LAWA", k=3)}),
]
PLUGINS = [("SafeCheckpointIO", {"falls_back": False})]
CLIPS = [
    ("AutoClip", {"window": 7}),
    ("ClipNorm", {"max_norm": 2.0}),
    ("ClipPerTensor", {"max_norm": 2.0}),
    ("ClipUnitwise", {"ratio": 0.02, "eps": 0.5}),
    ("ClipValue", {"max_value": 2.0}),
    ("ZClip", {"z_threshold": 3.0, "max_norm": 2.0, "skip_update_on_spike": True}),
]
AVERAGES = [
    ("EMA", {"decay": 0.9, "start": 3}),
    ("EMA", {"decay": 0.9, "dtype": "torch.bfloat16"}),
    ("EMA", {"decay": 0.9, "start": 0.5, "warmup": "power", "warmup_power": 0.75}),
    ("PowerEMA", {"std": 0.05, "start": 2, "start_interval": "epoch"}),
    ("SWA", {"start": 3, "every": 2}),
    ("LAWA", {"k": 3, "start": 2, "start_interval": "epoch"}),
]
MODULES = [
    ("AddLayerNorm", {"normalized_shape": [2, 3], "dropout": 0.1}),
    ("AddRMSNorm", {"normalized_shape": 4, "eps": 0.1}),
    ("CutMix", {"alpha": 0.5, "num_classes": 3}),
    ("DropBlock2d", {"block_size": 3}),
    ("DropConnect", {"module": named("torch.nn.Linear", in_features=2, out_features=3, bias=False), "p": 0.25}),
    ("DropPath", {"p": 0.25}),
    ("GaussianNoise", {"sigma": 0.3, "clip": True}),
    ("GhostBatchNorm1d", {"num_features": 4, "ghost_batch_size": 8}),
    ("GhostBatchNorm2d", {"num_features": 4, "momentum": None}),
    ("Impute", {"strategy": "constant", "fill_value": 2.0, "missing_values": -1.0}),
    ("LayerNorm", {"normalized_shape": [4], "dtype": "torch.float64", "device": "cpu"}),
    ("LockedDropout", {"batch_first": True}),
    ("MinMaxScale", {"feature_range": [-1.0, 1.0]}),
    ("Mixup", {"alpha": 0.5, "per": "pair", "multi_label": True}),
    ("MixupOrCutMix", {"switch_p": 0.25, "min_max": [0.2, 0.8], "per": "element", "label_smoothing": 0.1}),
    ("OneHot", {"handle_unknown": "ignore"}),
    ("RMSNorm", {"normalized_shape": 4, "elementwise_affine": False}),
    ("LayerNorm2d", {"num_channels": 4, "affine": False}),
    ("RMSNorm2d", {"num_channels": 4, "eps": 0.1}),
    ("RandomCrop", {"size": [4, 5], "padding_mode": "reflect"}),
    ("RandomErasing", {"value": "random", "scale": [0.1, 0.2]}),
    ("RandomHorizontalFlip", {"p": 0.25}),
    ("RandomRotation", {"degrees": [-10.0, 20.0]}),
    ("RandomVerticalFlip", {"p": 0.25}),
    ("RobustScale", {"quantile_range": [10.0, 90.0]}),
    ("ScaleNorm", {"dim": 4}),
    ("Standardize", {"with_mean": False}),
    ("Vocabulary", {"min_freq": 2}),
    ("Vocabulary", {"tokenize": "shlex.split"}),
    ("WeightStandardizedConv2d", {"in_channels": 2, "out_channels": 2, "kernel_size": [3, 1], "padding": "same"}),
    ("Whiten", {"method": "zca", "eps": 0.1}),
    ("Whiten", {"n_components": 0.9}),
]
SCHEDULES = [
    ("schedules.constant", {"factor": 0.5}),
    ("schedules.cosine", {"min_factor": 0.1, "steps": 100}),
    ("schedules.exponential", {"beta": 0.9, "every": 2}),
    ("schedules.inverse_sqrt", {"warmup": 0.1}),
    ("schedules.inverse_time", {"beta": 0.5}),
    ("schedules.join", {"a": COSINE, "at": 0.5, "b": named("schedules.constant", factor=0.1)}),
    ("schedules.linear", {"end_factor": 0.1, "steps": 0.5}),
    ("schedules.natural_exponential", {"beta": 0.5}),
    ("schedules.one_cycle", {}),
    ("schedules.piecewise_constant", {"milestones": [10, 0.5], "factors": [1.0, 0.5, 0.1]}),
    ("schedules.polynomial", {"power": 2.0}),
    ("schedules.rex", {"min_factor": 0.1}),
    ("schedules.sgdr", {"cycle": 20, "cycle_mult": 2.0}),
    ("schedules.triangular", {}),
    ("schedules.warmup", {"schedule": COSINE, "steps": 5, "shape": "exponential"}),
    ("schedules.warmup_cosine", {"warmup": 0.1}),
    ("schedules.warmup_stable_decay", {}),
    (
        "Schedule",
        {"name": "mine", "formula": "lightning_optkit.schedules.cosine._factor", "arguments": [["steps", 1.0]]},
    ),
]
RECORDS = [  # what functions of the package return; of plain values, so a file may hold them
    ("ActivationRow", {"layer": "a", "kind": "Linear", "call": 0, "mean": 0.5, "variance": 1.0, "verdict": "fine"}),
    ("ClipBounds", {"max_value": 2.0}),
    ("Curve", CURVE),
    (
        "GroupPlan",
        {
            "group": 0,
            "rule": "AdamW",
            "stages": ["clip"],
            "dtype": "float32",
            "state_dtype": "float32",
            "path": "compiled",
        }
        | {"num_tensors": 1, "num_elements": 2, "bytes_moved": 3}
        | {"num_walks": 2, "separate_bytes": 300, "separate_walks": 3},
    ),
    ("InitRow", ROW),
    ("MupRow", {**ROW, "kind": "hidden", "adam": 0.5, "sgd": 1.0}),
    ("NormSwap", {"name": "a", "before": "LayerNorm", "after": None, "shape": [2], "note": "kept"}),
    ("GradientNoiseScale", {"noise": 2.0, "gradient_square": 0.5}),
    (
        "LRRange",
        {"lrs": [0.1, 0.2], "losses": [1.0, 2.0], "smoothed": [1.0], "suggestions": {"middle": 0.1}, "reason": "none"},
    ),
    (
        "Verdict",
        {
            "symptom": "nonfinite",
            "layer": "net",
            "cause": "a",
            "evidence": "b",
            "remedy": "c",
            "onset_step": 3,
            "confidence": 1.0,
        },
    ),
    ("RunRecord", {"name": "mine", "loss": CURVE, "metrics": {"a": CURVE}}),
    ("Scalar", {"name": "mu", "fresh": 1.0, "inherited": 0.5}),
    ("SpikeDetector", {"window": 100, "threshold": 3.0, "warmup": 20}),
    ("SpikeEvent", {"step": 3, "action": "rollback", "loss": 2.0, "norm": 1.0, "back_to": 1}),
    ("TensorStatistics", {"grad_sq": 1.0, "param_sq": 2.0, "update_sq": 3.0, "nonfinite": 0.0, "lost": 1.0}),
]
RECORDS.append(("Explanation", {"optimizer": "AdamW", "groups": [RECORDS[3][1]]}))
RECORDS.append(("PowerSnapshot", {"checkpoint": "run/step=1000.ckpt", "std": 0.05, "num_averaged": 1000}))

STAGES = {
    "clip": named("ClipPerTensor", max_norm=2.0),
    "average": named("SWA", start=3),
    "l1": 0.1,
    "cautious": True,
    "caution": True,
    "decouple_lr": True,
    "centralize": True,
    "rounding": "stochastic",
    "state_dtype": "torch.bfloat16",
    "statistics": True,
}
OPTIMIZERS = sorted({name for name in ok.optimizers.__all__ if name[0].isupper()} - {"GroupTable"})
NOT_TAKEN = {  # by the rule itself, in Python as well
    "Adan": {"cautious"},
    "LAMB": {"cautious"},
    "LARS": {"cautious", "caution"},
    "DAdaptAdam": {"decouple_lr"},
    "Prodigy": {"decouple_lr"},
    "ScheduleFreeAdamW": {"average", "l1", "cautious", "caution"},
    "ScheduleFreeSGD": {"average", "l1", "cautious", "caution", "state_dtype"},
}
L2_BY_DEFAULT = ["ADOPT", "Adadelta", "Adagrad", "Adam", "Adamax", "LAMB", "LARS", "NAdam", "RAdam", "RMSprop", "SGD"]
for each in [*L2_BY_DEFAULT, "ScheduleFreeSGD"]:
    NOT_TAKEN[each] = {*NOT_TAKEN.get(each, ()), "decouple_lr"}

# What stands for classes of a user's own, holds tensors or functions, or is made of an optimizer.
NO_VALUES = {"Average", "Clip", "StatefulClip", "OnePassOptimizer", "Rule", "Stages"}
NO_VALUES |= {"EnsemblePrediction", "GreedySoup", "GroupTable", "NormSwaps", "PruneTrial", "StepInBackward"}

ROWS = {
    Callback: CALLBACKS,
    CheckpointIO: PLUGINS,
    ok.Clip: CLIPS,
    ok.EMA | ok.PowerEMA | ok.SWA | ok.LAWA: AVERAGES,
    nn.Module: MODULES,
    ok.Schedule: SCHEDULES,
}
CASES = [(kind, name, init) for kind, rows in ROWS.items() for name, init in rows]
CASES += [(getattr(ok, name), name, init) for name, init in RECORDS]


def content(value):
    """All that an object holds, in values that compare equal when they are."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dtype, value.shape, repr(value.tolist())
    if isinstance(value, torch.Generator):
        return "generator", value.device
    if isinstance(value, Iterator):
        return content(list(copy.copy(value)))
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [content(item) for item in value]
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, nn.Module) or type(value).__module__.startswith("lightning_optkit."):
        slots = {name: getattr(value, name) for name in getattr(type(value), "__slots__", ())}
        return type(value), content(slots | getattr(value, "__dict__", {}))
    return value


def python(entry):
    """The same entry in Python."""
    if isinstance(entry, dict) and "class_path" in entry:
        module, name = entry["class_path"].rsplit(".", 1)
        made = getattr(importlib.import_module(module), name)
        return made(**{key: python(value) for key, value in entry.get("init_args", {}).items()})
    if isinstance(entry, dict):
        return {key: python(value) for key, value in entry.items()}
    if isinstance(entry, list):
        return [python(value) for value in entry]
    if isinstance(entry, str) and entry.startswith(("torch.", "builtins.", "math.", "shlex.", "lightning_optkit.")):
        module, name = entry.rsplit(".", 1)
        return getattr(importlib.import_module(module), name)
    return entry


def load(kind, text):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    config = parser.parse_string(text)
    torch.manual_seed(0)
    return parser.instantiate_classes(config).value, parser.dump(config, skip_none=False)


@pytest.mark.parametrize(
    ("kind", "name", "init"), CASES, ids=[f"{name} {index}" for index, (_, name, _) in enumerate(CASES)]
)
def test_what_a_file_names_is_what_comes_of_it_also_after_a_dump(kind, name, init):
    entry = named(name, **init)
    value, dumped = load(kind, yaml.safe_dump({"value": entry}))
    again, dumped_again = load(kind, dumped)
    assert dumped_again == dumped
    assert content(again) == content(value)
    if kind not in [getattr(ok, name) for name, _ in RECORDS]:  # whose lists stand for tuples
        torch.manual_seed(0)
        assert content(value) == content(python(entry))
    assert type(value).__name__ == name or kind is ok.Schedule


def from_file(folder, optimizer, callbacks=()):
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"optimizer": optimizer, "trainer": {"callbacks": [*callbacks]}})
    )
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"]
    arguments = ["--config", str(folder / "config.yaml"), *quiet]
    cli = LightningCLI(
        DemoModel, BoringDataModule, run=False, save_config_callback=None, args=arguments, seed_everything_default=0
    )
    return cli, yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_the_stages_that_a_file_gives_it(name, tmp_path):
    stages = {key: value for key, value in STAGES.items() if key not in NOT_TAKEN.get(name, ())}
    entry = named(name, lr=0.25, **stages)
    cli, dumped = from_file(tmp_path, entry)
    again, dumped_again = from_file(tmp_path, dumped["optimizer"])
    assert dumped_again["optimizer"] == dumped["optimizer"]
    first, second = cli.model.configure_optimizers(), again.model.configure_optimizers()
    in_python = getattr(ok, name)(
        cli.model.parameters(), lr=0.25, **{key: python(value) for key, value in stages.items()}
    )
    for found in (first, second):
        assert type(found) is getattr(ok, name)
        assert (found.clip, found.average) == (in_python.clip, in_python.average) and found.clip == ok.ClipPerTensor(
            2.0
        )
        for group, expected in zip(found.param_groups, in_python.param_groups, strict=True):
            assert {key: content(group[key]) for key in group if key != "params"} == {
                key: content(expected[key]) for key in expected if key != "params"
            }
        assert content(found.defaults) == content(in_python.defaults)
        assert [plan.stages for plan in found.explain().groups] == [plan.stages for plan in in_python.explain().groups]


def test_a_wrong_stage_is_refused_with_its_name(tmp_path, capsys):
    for wrong, said in (
        ({"clip": named("EMA", decay=0.9)}, "clip"),
        ({"average": named("LAWA", k=2)}, "average"),
        ({"rounding": "up"}, "rounding"),
        ({"momentums": 0.9}, "momentums"),
    ):
        with pytest.raises(SystemExit):
            from_file(tmp_path, named("AdamW", lr=0.1, **wrong))
        assert said in capsys.readouterr().err


def test_the_table_has_every_public_class_and_schedule():
    classes = {name for name in dir(ok) if inspect.isclass(getattr(ok, name))}
    assert {name for _, name, _ in CASES if "." not in name} | {*OPTIMIZERS} | NO_VALUES == classes
    returning = {name for name in ok.schedules.__all__ if inspect.isfunction(getattr(ok.schedules, name))} - {"plot"}
    assert {f"schedules.{name}" for name in returning} == {name for name, _ in SCHEDULES if "." in name}
