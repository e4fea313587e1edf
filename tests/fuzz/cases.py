# SPDX-License-Identifier: Apache-2.0
"""One valid call for every public name, with the argument names that may occur in messages about wrong values."""

import inspect
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_optkit import (
    averaging,
    callbacks,
    clipping,
    data,
    diagnostics,
    init,
    layers,
    optimizers,
    recipes,
    regularization,
    schedules,
)
from lightning_optkit.averaging.post_hoc_ema import snapshot_name
from lightning_optkit.diagnostics import Curve, RunRecord, Verdict, result_rows, write_report
from lightning_optkit.step import step_in_backward

FOLDERS = {
    "averaging": averaging,
    "callbacks": callbacks,
    "clipping": clipping,
    "data": data,
    "init": init,
    "layers": layers,
    "optimizers": optimizers,
    "recipes": recipes,
    "regularization": regularization,
    "schedules": schedules,
}

NOT_CALLED = {
    # What functions return: nobody makes one.
    "diagnostics.GradientNoiseScale", "diagnostics.LRRange",
    "averaging.EnsemblePrediction", "averaging.GreedySoup", "init.ActivationRow", "init.InitRow", "init.MupRow",
    "layers.NormSwap", "layers.NormSwaps", "optimizers.GroupTable", "step.Explanation", "step.GroupPlan",
    "step.StepInBackward", "step.TensorStatistics",
    # Types and protocols.
    "init.Activation", "init.Scheme", "schedules.Length", "step.Average", "step.Clip", "step.StatefulClip",
    # What a new rule or schedule is made of, in this package.
    "schedules.Schedule", "step.ClipBounds", "step.OnePassOptimizer", "step.Rule", "step.Scalar", "step.Stages",
    # Takes nothing.
    "recipes.recipe_names",
    "diagnostics.environment",
    # Their arguments are checked by the kernels; tests/layers holds the cases.
    "layers.add_layer_norm", "layers.add_rms_norm", "layers.layer_norm", "layers.rms_norm",
    # Under `methods`.
    "schedules.plot",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A call.

    Args:
        name: The public name, "folder.name", followed by the called method, if any.
        owner: The beginning of its messages, without the method.
        call: The callable; arguments are passed as keywords.
        arguments: Creates the required arguments; new ones each time.
        left: Names of arguments that are not checked, e.g. the input of a model.
        also: Other names that a message may use for an argument: items of an iterable, keys in it.
    """

    name: str
    owner: str
    call: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]] = dict
    left: frozenset[str] = frozenset()
    also: frozenset[str] = frozenset()

    def names(self) -> list[str]:
        """Of all arguments that may be given."""
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        found = inspect.signature(self.call).parameters
        return [name for name, parameter in found.items() if parameter.kind in kinds and name not in self.left]


def weight() -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.ones(3, 2)
    return parameter


def converted() -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD([weight()])
    optimizers.from_torch_(optimizer)
    return optimizer


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.linear2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear2(self.first(x))


def residual() -> nn.Module:
    return nn.Sequential(Block(), Block(), nn.Linear(4, 2))


def rows() -> torch.Tensor:
    return torch.arange(12.0).reshape(6, 2)


def images() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8)


@cache
def verdict() -> dict[str, Any]:
    return {
        "symptom": "nonfinite", "layer": "net", "cause": "a", "evidence": "b", "remedy": "c", "onset_step": 1,
        "confidence": 1.0,
    }  # fmt: skip


def folder_of_snapshots() -> str:
    folder = tempfile.mkdtemp()
    (Path(folder) / snapshot_name(0.1, 3)).touch()
    return folder


REQUIRED: dict[str, Callable[[], dict[str, Any]]] = {
    "averaging.averages_of": lambda: {"optimizer": torch.optim.SGD([weight()]), "average": averaging.EMA()},
    "averaging.protect_average": lambda: {"optimizer": torch.optim.SGD([weight()]), "average": averaging.EMA()},
    "averaging.update_average_": lambda: {
        "optimizer": torch.optim.SGD([weight()]), "average": averaging.EMA(), "step": 1,
    },
    "averaging.average_checkpoints": lambda: {"checkpoints": [{"w": torch.ones(2)}]},
    "averaging.ensemble_predict": lambda: {
        "model": nn.Linear(1, 2, bias=False), "checkpoints": [{"weight": torch.ones(2, 1)}],
        "batches": [torch.ones(3, 1)],
    },
    "averaging.PowerSnapshot": lambda: {"checkpoint": {"w": torch.ones(2)}, "std": 0.1, "num_averaged": 10},
    "averaging.post_hoc_coefficients": lambda: {"snapshots": [(0.05, 10), (0.1, 10)], "std": 0.1},
    "averaging.post_hoc_ema": lambda: {
        "snapshots": [averaging.PowerSnapshot({"w": torch.ones(2)}, std=0.1, num_averaged=10)],
        "std": 0.1,
    },
    "averaging.stored_snapshots": lambda: {"dirpath": folder_of_snapshots()},
    "averaging.greedy_soup": lambda: {"checkpoints": [{"w": torch.ones(2)}], "score": lambda state_dict: 1.0},
    "averaging.lookahead_": lambda: {"params": [rows()], "slow": [rows()]},
    "averaging.load_weights": lambda: {"checkpoint": {"w": torch.ones(2)}},
    "callbacks.ActivationRegularization": lambda: {"names": "lstm"},
    "callbacks.Augment": lambda: {"augmentations": data.Mixup()},
    "callbacks.BatchRegime": lambda: {"regime": "full"},
    "callbacks.BatchSizeSchedule": lambda: {"schedule": {0: 2}},
    "callbacks.DropoutSchedule": lambda: {"schedule": schedules.constant()},
    "callbacks.ElasticNet": lambda: {"l1": 0.1},
    "callbacks.GradientClipping": lambda: {"clip": clipping.AutoClip()},
    "callbacks.HyperparameterSchedule": lambda: {"name": "momentum", "schedule": schedules.constant()},
    "callbacks.Initialize": lambda: {"scheme": init.he},
    "callbacks.LRSchedule": lambda: {"schedule": schedules.constant()},
    "callbacks.PlateauSchedule": lambda: {"monitor": "val_loss"},
    "callbacks.PruneTrial": lambda: {"trial": SimpleNamespace(set_user_attr=print)},
    "callbacks.PowerSnapshots": lambda: {"dirpath": "snapshots"},
    "callbacks.Preprocess": lambda: {"transform": data.Standardize()},
    "callbacks.SnapshotEnsemble": lambda: {"cycle": 0.5},
    "callbacks.StochasticDepth": lambda: {"names": "blocks.*"},
    "callbacks.WeightAveraging": lambda: {"average": averaging.EMA()},
    "clipping.ClipNorm": lambda: {"max_norm": 1.0},
    "clipping.ClipPerTensor": lambda: {"max_norm": 1.0},
    "clipping.ClipValue": lambda: {"max_value": 1.0},
    "data.RandomCrop": lambda: {"size": 4},
    "data.RandomRotation": lambda: {"degrees": 10.0},
    "data.fit_in_order": lambda: {"chain": nn.Sequential(data.Standardize()), "batches": [rows()]},
    "data.merge_across_ranks": lambda: {"transform": data.Standardize()},
    "data.resize": lambda: {"images": images(), "size": 4},
    "init.activation_statistics": lambda: {"model": model(), "batch": rows()},
    "init.depth_scaled": lambda: {"target": residual()},
    "init.fixup": lambda: {"model": residual()},
    "init.gain": lambda: {"activation": "relu"},
    "init.initialize": lambda: {"model": model(), "scheme": init.he},
    "init.lsuv": lambda: {"model": model(), "batch": rows()},
    "init.mup_parameter_groups": lambda: {"model": (m := model()), "rows": init.mup_width(m, model()), "lr": 0.1},
    "init.mup_width": lambda: {"model": model(), "base": model()},
    "init.render_activations": lambda: {"before": init.activation_statistics(model(), rows())},
    "init.render_rows": lambda: {"rows": init.initialize(model(), init.he)},
    "init.zero_residual": lambda: {"target": residual()},
    "regularization.max_logits": lambda: {"q": torch.ones(3, 4), "k": torch.ones(3, 4), "num_heads": 2},
    "regularization.qk_clip_": lambda: {
        "q_params": [torch.ones(4, 4)], "k_params": [torch.ones(4, 4)], "logits": torch.ones(2),
    },
    "diagnostics.SpikeEvent": lambda: {"step": 3, "action": "skip", "loss": 2.0, "norm": 1.0},
    "diagnostics.gradient_noise_scale": lambda: {"gradients": [[rows()], [rows()]], "samples": 4},
    "diagnostics.lr_range": lambda: {
        "lrs": [0.1 * 2**k for k in range(12)], "losses": [1.0 / (k + 1) for k in range(12)],
    },
    "layers.DropConnect": lambda: {"module": nn.Linear(2, 2)},
    "layers.ScaleNorm": lambda: {"dim": 4},
    "layers.WeightStandardizedConv2d": lambda: {"in_channels": 2, "out_channels": 2, "kernel_size": 3},
    "layers.swap_norms": lambda: {"model": model(), "kind": "ghost"},
    "optimizers.compressed_state_dict": lambda: {"optimizer": torch.optim.SGD([weight()])},
    "optimizers.from_torch_": lambda: {"optimizer": torch.optim.SGD([weight()])},
    "optimizers.full_precision_state_dict": lambda: {
        "optimizer": torch.optim.SGD((m := model()).parameters()), "model": m,
    },
    "optimizers.to_torch_": lambda: {"optimizer": converted()},
    "optimizers.widened_state_dict": lambda: {
        "state_dict": optimizers.compressed_state_dict(torch.optim.SGD([weight()]))
    },
    "optimizers.parameter_groups": lambda: {"model": model()},
    "regularization.activation_regularization": lambda: {"activations": rows()},
    "regularization.asam": lambda: {"params": [rows()], "grads": [rows()]},
    "regularization.elastic_net": lambda: {"params": [rows()], "l1": 0.1, "l2": 0.1},
    "regularization.generalization_loss": lambda: {"errors": [1.0, 0.5]},
    "regularization.gradient_noise_": lambda: {"grads": [rows()], "std": 0.1},
    "regularization.gradient_noise_std": lambda: {"step": 1},
    "regularization.l1_penalty": lambda: {"params": [rows()]},
    "regularization.l2_penalty": lambda: {"params": [rows()]},
    "regularization.label_smoothing": lambda: {"target": torch.tensor([0, 1]), "num_classes": 3},
    "regularization.linear_drop_rates": lambda: {"num_blocks": 3},
    "regularization.max_norm_": lambda: {"params": [rows()], "max_norm": 1.0},
    "regularization.progress": lambda: {"errors": [1.0, 0.5], "strip": 2},
    "regularization.progress_quotient": lambda: {"errors": [0.8, 0.9], "training_errors": [1.2, 1.0], "strip": 2},
    "regularization.r_drop": lambda: {"logits": rows(), "other": rows()},
    "regularization.grokfast_": lambda: {"grads": [rows()], "averages": [rows()]},
    "regularization.gsam": lambda: {"grads": [rows()], "perturbed": [rows()]},
    "regularization.look_sam": lambda: {"grads": [rows()], "direction": [rows()]},
    "regularization.look_sam_direction": lambda: {"grads": [rows()], "perturbed": [rows()]},
    "regularization.sam": lambda: {"grads": [rows()]},
    "regularization.soft_threshold_": lambda: {"params": [rows()], "threshold": 0.1},
    "regularization.sparsity": lambda: {"params": {"w": rows()}},
    "regularization.stochastic_depth": lambda: {"branch": rows(), "p": 0.1},
    "regularization.successive_increases": lambda: {"errors": [1.0, 2.0, 3.0], "strip": 1},
    "regularization.temporal_activation_regularization": lambda: {"activations": rows()},
    "regularization.weights_of": lambda: {"module": model()},
    "regularization.wsam": lambda: {"grads": [rows()], "perturbed": [rows()]},
    "schedules.exponential": lambda: {"beta": 0.9},
    "schedules.inverse_time": lambda: {"beta": 0.9},
    "schedules.join": lambda: {"a": schedules.constant(), "at": 0.5, "b": schedules.cosine()},
    "schedules.natural_exponential": lambda: {"beta": 0.9},
    "schedules.piecewise_constant": lambda: {"milestones": [1, 2], "factors": [1.0, 0.1, 0.01]},
    "schedules.warmup": lambda: {"schedule": schedules.cosine(), "steps": 2},
}  # fmt: skip

REQUIRED |= {f"optimizers.{name}": lambda: {"params": [weight()]} for name in optimizers.__all__
             if name[0].isupper() and name != "GroupTable"}  # fmt: skip
REQUIRED |= {f"recipes.{name}": lambda: {"name": "mlp"} for name in ("recipe", "recipe_text")}
REQUIRED |= {f"init.{name}": lambda: {"tensor": torch.empty(4, 4)} for name in (
    "he", "identity", "lecun", "orthogonal", "sparse", "truncated_normal", "xavier",
)}  # fmt: skip
REQUIRED |= {f"layers.{name}": lambda: {"normalized_shape": 4} for name in (
    "AddLayerNorm", "AddRMSNorm", "LayerNorm", "RMSNorm",
)}  # fmt: skip
REQUIRED |= {f"layers.{name}": lambda: {"num_channels": 4} for name in ("LayerNorm2d", "RMSNorm2d")}
REQUIRED |= {f"layers.{name}": lambda: {"num_features": 4} for name in ("GhostBatchNorm1d", "GhostBatchNorm2d")}

# A model, or a function of the user's, is run on these: what it says is its own.
LEFT = {
    "init.activation_statistics": {"batch"},
    "init.lsuv": {"batch"},
}

# What a batch, a pattern or a record is called where it is looked at.
ALSO = {
    "averaging.ensemble_predict": {"checkpoints"},
    "data.fit_in_order": {"Standardize", "x", "feature_dim"},
    "init.depth_scaled": {"pattern", "num_layers"},
    "init.fixup": {"branches"},
    "init.mup_width": {"base"},
    "init.lsuv": {"forward", "initialize", "scheme"},
    "optimizers.from_torch_": {"SGD"},
    "regularization.asam": {"grads"},
    "init.zero_residual": {"pattern"},
}


def constructors_and_functions() -> list[Case]:
    """A case for every public name of `FOLDERS` that is callable."""
    cases = []
    for folder, module in FOLDERS.items():
        for name in module.__all__:
            full = f"{folder}.{name}"
            if full not in NOT_CALLED:
                left = frozenset(LEFT.get(full, ()))
                also = frozenset(ALSO.get(full, ()))
                cases.append(Case(full, name, getattr(module, name), REQUIRED.get(full, dict), left, also))
    return cases


def methods(folder: Path) -> list[Case]:
    """Calls of methods, and of functions whose arguments are no keywords; files go into `folder`."""
    cases = [
        Case("diagnostics.Curve", "Curve", Curve),
        Case("diagnostics.RunRecord", "RunRecord", RunRecord, lambda: {"name": "plain"}),
        Case("diagnostics.RunRecord.from_dict", "RunRecord", lambda saved: RunRecord.from_dict(saved),
             lambda: {"saved": RunRecord("plain", loss=Curve([1], [2.0])).to_dict()}),
        Case("diagnostics.Verdict", "Verdict", Verdict, verdict),
        Case("diagnostics.Verdict.from_dict", "Verdict", lambda saved: Verdict.from_dict(saved),
             lambda: {"saved": Verdict(**verdict()).to_dict()}),
        Case("diagnostics.result_rows", "result_rows", result_rows, lambda: {"runs": [RunRecord("plain")]}),
        Case("diagnostics.write_report", "write_report", write_report,
             lambda: {"runs": [RunRecord("plain")], "path": folder / "report.html"}),
        Case("step.step_in_backward", "step_in_backward", step_in_backward,
             lambda: {"optimizer": optimizers.SGD([weight()], lr=0.1)}),
        Case("schedules.plot", "plot",
             lambda schedules_, total_steps, labels=None, ax=None: schedules.plot(
                 schedules_, total_steps=total_steps, labels=labels, ax=ax),
             lambda: {"schedules_": schedules.cosine(), "total_steps": 3}, also=frozenset({"schedules"})),
        Case("averaging.SWA.for_run", "SWA", lambda total_steps: averaging.SWA(0.5).for_run(total_steps),
             lambda: {"total_steps": 10}),
    ]  # fmt: skip
    for kind in (clipping.ClipNorm, clipping.ClipValue, clipping.ClipPerTensor):
        clip = kind(1.0)
        cases.append(_method(f"clipping.{kind.__name__}", clip, "__call__", lambda: {"parameters": [weight()]}))
    for kind in (clipping.AutoClip, clipping.ZClip, clipping.ClipUnitwise):
        cases.append(_method(f"clipping.{kind.__name__}", kind(), "__call__", lambda: {"parameters": [weight()]}))
    for clip in (clipping.AutoClip(), clipping.ZClip()):
        cases.append(_method(f"clipping.{type(clip).__name__}", clip, "load_state_dict", lambda: {"state_dict": {}}))
    cases += [_schedule(schedule) for schedule in (schedules.cosine(), schedules.triangular(), schedules.one_cycle())]
    for name in ("gradient_noise_scale", "lr_range", "SpikeDetector", "SpikeEvent"):
        full = f"diagnostics.{name}"
        cases.append(Case(full, name, getattr(diagnostics, name), REQUIRED.get(full, dict)))
    cases += _of_optimizers() + _of_data() + _of_layers() + _of_callbacks()
    return cases


def _method(name: str, owner: Any, method: str, arguments: Callable[[], dict[str, Any]]) -> Case:
    return Case(f"{name}.{method}", type(owner).__name__, getattr(owner, method), arguments)


def _schedule(schedule: schedules.Schedule) -> Case:
    call = lambda step, total_steps: schedule(step, total_steps)  # noqa: E731
    return Case(f"schedules.{schedule.name}.__call__", schedule.name, call, lambda: {"step": 3, "total_steps": 10})


def _of_optimizers() -> list[Case]:
    kinds = [getattr(optimizers, name) for name in optimizers.__all__]
    found = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]
    return [case for kind in found for case in _of_optimizer(kind)]


def _of_optimizer(kind: type[torch.optim.Optimizer]) -> list[Case]:
    def made():
        optimizer = kind([weight()])
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    def group(lr, weight_decay):
        kind([{"params": [weight()], "lr": lr, "weight_decay": weight_decay}])

    def add_param_group(param_group):
        made().add_param_group(param_group)

    def step(closure):
        made().step(closure)

    name = kind.__name__
    return [
        Case(
            f"optimizers.{name}.add_param_group", name, add_param_group, lambda: {"param_group": {"params": [weight()]}}
        ),
        Case(f"optimizers.{name}.step", name, step, lambda: {"closure": None}),
        Case(f"optimizers.{name}.group", name, group, lambda: {"lr": 0.1, "weight_decay": 0.1}),
    ]


def _of_fittable(kind: type) -> list[Case]:
    def partial_fit(x):
        kind().partial_fit(x)

    def fit(batches, across_ranks):
        kind().fit(batches, across_ranks=across_ranks)

    def merge(other):
        kind().partial_fit(rows()).merge(other)

    name, fitted = kind.__name__, kind().fit(rows())
    cases = [
        _method(f"data.{name}", fitted, "forward", lambda: {"x": rows()}),
        Case(f"data.{name}.partial_fit", name, partial_fit, lambda: {"x": rows()}),
        Case(
            f"data.{name}.fit",
            name,
            fit,
            lambda: {"batches": [rows()], "across_ranks": False},
            also=frozenset({"x", "feature_dim", "rows"}),
        ),
        Case(f"data.{name}.merge", name, merge, lambda: {"other": kind().partial_fit(rows())}),
    ]
    if kind is not data.Impute:
        cases.append(_method(f"data.{name}", fitted, "inverse", lambda: {"x": fitted(rows())}))
    return cases


def _of_data() -> list[Case]:
    kinds = (data.Impute, data.MinMaxScale, data.OneHot, data.RobustScale, data.Standardize, data.Whiten)
    cases = [case for kind in kinds for case in _of_fittable(kind)]
    for name in ("CutMix", "Mixup", "MixupOrCutMix"):
        given = lambda: {"inputs": images(), "targets": torch.rand(2, 3)}  # noqa: E731
        cases.append(_method(f"data.{name}", getattr(data, name)(), "forward", given))
    for made in (
        data.RandomCrop(4), data.RandomErasing(), data.RandomHorizontalFlip(), data.RandomRotation(9.0),
        data.RandomVerticalFlip(),
    ):  # fmt: skip
        cases.append(_method(f"data.{type(made).__name__}", made, "forward", lambda: {"images": images()}))
    cases.append(_method("data.GaussianNoise", data.GaussianNoise(), "forward", lambda: {"x": rows()}))
    vocabulary = data.Vocabulary().fit(["the cat", "the dog"])
    cases += [
        _method("data.Vocabulary", vocabulary, "encode", lambda: {"texts": ["the cat"]}),
        _method("data.Vocabulary", vocabulary, "decode", lambda: {"ids": torch.tensor([[2, 3]])}),
        Case("data.Vocabulary.fit", "Vocabulary", lambda batches: data.Vocabulary().fit(batches),
             lambda: {"batches": ["the cat"]}, also=frozenset({"texts"})),
        Case("data.Vocabulary.partial_fit", "Vocabulary", lambda texts: data.Vocabulary().partial_fit(texts),
             lambda: {"texts": ["the cat"]}),
        Case("data.Vocabulary.merge", "Vocabulary", lambda other: data.Vocabulary().merge(other),
             lambda: {"other": data.Vocabulary()}),
    ]  # fmt: skip
    return cases


def _named_rows(name: str) -> dict[str, Any]:
    return {name: rows()}


def _of_layers() -> list[Case]:
    made = {
        "x": [layers.DropPath(0.5), layers.LockedDropout(), layers.ScaleNorm(2)],
        "input": [layers.GhostBatchNorm1d(2, ghost_batch_size=3)],
    }
    cases = [
        _method(f"layers.{type(layer).__name__}", layer, "forward", partial(_named_rows, name))
        for name, ones in made.items()
        for layer in ones
    ]
    cases += [
        _method("layers.DropBlock2d", layers.DropBlock2d(), "forward", lambda: {"x": images()}),
        _method("layers.GhostBatchNorm2d", layers.GhostBatchNorm2d(3), "forward", lambda: {"input": images()}),
        _method("layers.WeightStandardizedConv2d", layers.WeightStandardizedConv2d(3, 2, 3), "forward",
                lambda: {"input": images()}),
    ]  # fmt: skip
    return cases


def _of_callbacks() -> list[Case]:
    # Preprocess hands its state to its transform, which complains as torch does; ExactResume keeps it for later;
    # SafeCheckpointIO is a plugin.
    names = [name for name in callbacks.__all__ if name not in ("Preprocess", "ExactResume", "SafeCheckpointIO")]
    return [case for name in names for case in _of_callback(name)]


def _of_callback(name: str) -> list[Case]:
    """What a checkpoint may hold, for a callback that keeps a state."""

    def made():
        return getattr(callbacks, name)(**REQUIRED.get(f"callbacks.{name}", dict)())

    def load_state_dict(state_dict):
        made().load_state_dict(state_dict)

    if not made().state_dict():
        return []
    full = f"callbacks.{name}.load_state_dict"
    cases = [Case(full, name, load_state_dict, lambda: {"state_dict": made().state_dict()})]
    # The name of an average is compared with its own, and the message shows both.
    keys = [key for key in made().state_dict() if (name, key) != ("WeightAveraging", "name")]
    return cases + [_with_entry(full, name, made, key) for key in keys]


def _with_entry(full: str, name: str, made: Callable[[], Any], key: str) -> Case:
    """A state with one changed entry, which messages call by the name of the whole state."""

    def load(state_dict):
        made().load_state_dict({**made().state_dict(), key: state_dict})

    return Case(f"{full}[{key}]", name, load, lambda: {"state_dict": made().state_dict()[key]})


def wrong_values(folder: Path) -> list[Callable[[], Any]]:
    """Replacement values for an argument; new ones each time."""
    truncated, text = folder / "truncated.ckpt", folder / "text.ckpt"
    torch.save({"state_dict": {"w": torch.ones(1000)}}, truncated)
    truncated.write_bytes(truncated.read_bytes()[:700])
    text.write_text("hello world" * 10)

    plain = [
        None, True, False, 0, 1, -1, 3, 2**63, -(2**63), 10**400, -(10**400), 0.0, 0.5, 1.5, -0.5, math.nan, math.inf,
        -math.inf, 1e308, 5e-324, 1j, "", "no", "mean", "last.ckpt", "a\0b", "[", "cpu", "cuda:99", b"bytes", (), (1,),
        (0.1, 0.2), ("a", "b"), (None, None), (1, 2, 3), range(3), slice(1), Ellipsis, object(), torch.float32,
        torch.int64, torch.device("meta"), nn.Linear, clipping.ClipNorm, averaging.EMA, data.Mixup, schedules.cosine,
        int, str, len, np.float32(0.5), np.int64(3), np.bool_(True), Fraction(1, 3), Decimal("0.5"), frozenset("ab"),
        Path("nowhere/there.ckpt"), text, truncated, folder,
    ]  # fmt: skip
    made: list[Callable[[], Any]] = [lambda value=value: value for value in plain]
    return [
        *made,
        list, dict, set, lambda: [None], lambda: ["a"], lambda: [1, 2, 3], lambda: [[]], lambda: [{}], lambda: {"a": 1},
        lambda: {"params": None}, lambda: {1: 2}, lambda: {"params": [1]}, lambda: {"state_dict": 3},
        lambda: list(range(10_000)), lambda: iter(()), lambda: (i for i in range(2)),
        lambda: (lambda: 0), lambda: (lambda *args: None), lambda: (lambda a: a), lambda: torch.Generator(),
        lambda: clipping.ClipNorm(1.0), lambda: averaging.EMA(), lambda: averaging.LAWA(), lambda: averaging.SWA(),
        lambda: schedules.cosine(), lambda: data.Standardize(), lambda: nn.Linear(2, 2), model,
        lambda: torch.zeros(0), lambda: torch.tensor(0.5), lambda: torch.tensor(True), lambda: torch.tensor(3),
        lambda: torch.zeros(2), lambda: torch.zeros(2, 2, dtype=torch.int64),
        lambda: torch.zeros(2, 2, dtype=torch.complex64), lambda: torch.zeros(2, 3, device="meta"),
        lambda: torch.eye(2).to_sparse(), lambda: torch.full((6, 2), math.nan), lambda: torch.rand(2, 3, 4, 5, 6),
        lambda: [torch.eye(2).to_sparse()], lambda: [torch.zeros(2, dtype=torch.int64)],
        lambda: [torch.zeros(2, device="meta")], lambda: (torch.zeros(1) for _ in range(1)), lambda: [weight(), None],
        lambda: {"w": torch.zeros(2)}, lambda: [{"w": torch.zeros(2)}, {"v": torch.zeros(2)}],
        lambda: np.zeros((2, 3)), lambda: np.array(["a"]), lambda: memoryview(b"ab"), lambda: bytearray(b"ab"),
        lambda: {"lr": "fast"}, lambda: [("a", weight())], lambda: nn.ModuleList(),
        lambda: nn.ParameterList([weight()]),
        BadRepr, BadBool, BadLen, BadIter, lambda: type("Empty", (), {})(), lambda: [BadIter()], lambda: [BadRepr()],
    ]  # fmt: skip


class BadRepr:
    def __repr__(self) -> str:
        raise OSError("no words for it")


class BadBool:
    def __bool__(self) -> bool:
        raise OSError("neither true nor false")


class BadLen:
    def __len__(self) -> int:
        raise OSError("no length")


class BadIter:
    def __iter__(self) -> Any:
        raise OSError("cannot be read")
