# SPDX-License-Identifier: Apache-2.0
"""Converts the normalization layers of an existing model in place.

Source of the default of 32 groups: Wu & He 2018, "Group Normalization" (arXiv 1803.08494).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_optkit._checks import check_callable, check_int, check_module, check_one_of, check_pattern, shown
from lightning_optkit._torch_private import AnyBatchNorm, BatchOrInstanceNorm, own_buffers, own_parameters
from lightning_optkit.layers._adopt import Form, become, disagreement, fused_class, give_back, rounds_twice
from lightning_optkit.layers.ghost_batch_norm1d import GhostBatchNorm1d
from lightning_optkit.layers.ghost_batch_norm2d import GhostBatchNorm2d
from lightning_optkit.layers.layer_norm import LayerNorm
from lightning_optkit.layers.rms_norm import RMSNorm

__all__ = ["NormSwap", "NormSwaps", "swap_norms"]

_SAME = "same mathematics"
_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_GHOST = {nn.BatchNorm1d: GhostBatchNorm1d, nn.BatchNorm2d: GhostBatchNorm2d}
_OTHERS = (nn.GroupNorm, BatchOrInstanceNorm)


@dataclass(frozen=True)
class NormSwap:
    """One layer in the result of `swap_norms`.

    Args:
        name: Its name in the model; empty for the model itself.
        before: Its class.
        after: Its class now; None if it was not changed.
        shape: Its normalized shape, or its number of features.
        note: Why it was not changed, or what the change does to the results.
    """

    name: str
    before: str
    after: str | None
    shape: tuple[int, ...]
    note: str


class NormSwaps:
    """The result of `swap_norms`. Prints as a table; `undo()` reverts it.

    Args:
        rows: One per normalization layer of the kind that was asked for.
        undo: What `undo()` calls, last first.
    """

    def __init__(self, rows: list[NormSwap], undo: list[Callable[[], None]]) -> None:
        self.rows, self._undo = rows, undo

    def undo(self) -> None:
        """Restores the class of every swapped layer, keeping the current weights. A second call is a no-op."""
        while self._undo:
            self._undo.pop()()

    @property
    def swapped(self) -> list[NormSwap]:
        """The rows of the layers that were changed."""
        return [row for row in self.rows if row.after is not None]

    def summary(self) -> list[str]:
        """One sentence per kind of row."""
        kinds = Counter((row.before, row.after, row.note) for row in self.rows)
        return [
            f"{count} {before} -> {after}: {note}" if after else f"{count} {before} left alone: {note}"
            for (before, after, note), count in kinds.items()
        ]

    def __str__(self) -> str:
        table = [("name", "from", "to", "shape", "note")]
        for row in self.rows:
            shape = "x".join(str(size) for size in row.shape)
            table.append((row.name or "(the model)", row.before, row.after or "-", shape, row.note))
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[4]]) for line in table
        ]
        return "\n".join(lines if self.rows else ["no normalization layers of this kind"])


def swap_norms(
    model: nn.Module,
    kind: Literal["layer", "rms", "batch", "group", "ghost"],
    only: str | Callable[[str, nn.Module], bool] | None = None,
    *,
    num_groups: int | None = None,
    ghost_batch_size: int | None = None,
) -> NormSwaps:
    """Converts the normalization layers of `model` in place and lists what it changed.

    | kind | from | to | the results |
    |---|---|---|---|
    | "layer" | `nn.LayerNorm` and layers that compute the same | `layers.LayerNorm` | stay |
    | "rms" | `nn.RMSNorm` and layers that compute the same (`LlamaRMSNorm`, `T5LayerNorm`) | `layers.RMSNorm` | stay |
    | both | the same over the channels of images, as in timm and ConvNeXt | `LayerNorm2d`, `RMSNorm2d` | stay |
    | "batch" | `GhostBatchNorm1d/2d` | `nn.BatchNorm1d/2d` | change in training |
    | "ghost" | `nn.BatchNorm1d/2d` | `GhostBatchNorm1d/2d` | change in training |
    | "group" | `nn.BatchNorm1d/2d/3d`, `GhostBatchNorm1d/2d` | `nn.GroupNorm` | change, also in evaluation |

    The objects stay the same and only their class changes: weights, hooks, training flag, device, dtype and references
    are kept, optimizers are unaffected, and state dict keys stay, except that "group" drops the running statistics.
    Layers of other packages are recognized by their results on random weights, in float32 and bfloat16, never by name.
    Where torch's kernel is faster (few elements), the fused layers call it, by a fixed rule of the shape. SyncBatchNorm
    is not changed, since it does not state the number of dimensions of its inputs.

    Args:
        model: Any module on any device; may itself be a normalization layer.
        kind: The target kind of the table above.
        only: A name pattern ("encoder.*"), or a function of name and module; default: all layers.
        num_groups: For "group": the largest number of groups; reduced to a divisor of the channels if necessary.
            Default 32.
        ghost_batch_size: For "ghost": samples normalized together. Default 128.

    Raises:
        TypeError: if a number is not an integer.
        ValueError: if an argument is out of range or does not belong to `kind`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48), nn.ReLU())
        >>> swaps = swap_norms(model, "group")
        >>> model[1].num_groups
        24
        >>> swaps.undo()
        >>> type(model[1]).__name__
        'BatchNorm2d'
    """
    check_module("swap_norms", "model", model)
    if only is not None and (isinstance(only, str) or not callable(only)):
        check_pattern("swap_norms", "only", only)
    elif only is not None:
        check_callable("swap_norms", "only", only, "only(name, module)")
    check_one_of("swap_norms", "kind", kind, ("layer", "rms", "batch", "group", "ghost"))
    for owner, name, number in (("group", "num_groups", num_groups), ("ghost", "ghost_batch_size", ghost_batch_size)):
        if number is not None and kind != owner:
            raise ValueError(f'swap_norms({name}={shown(number)}): {name} belongs to kind="{owner}", not "{kind}".')
        if number is not None:
            check_int("swap_norms", name, number, minimum=1)
    rows: list[NormSwap] = []
    undo: list[Callable[[], None]] = []
    for name, module in list(model.named_modules()):
        if only is not None and not (fnmatchcase(name, only) if isinstance(only, str) else only(name, module)):
            continue
        if kind in ("layer", "rms"):
            plan = _plan_fused(module, centered=kind == "layer")
        else:
            plan = _plan_batch(module, kind, num_groups or 32, ghost_batch_size or 128)
        if plan is None:
            continue
        before, shape = type(module).__name__, _shape(module)
        cls, attributes, note = plan
        if cls is not None:
            undo.append(partial(give_back, module, become(module, cls, attributes, keep_buffers=kind != "group")))
        rows.append(NormSwap(name, before, None if cls is None else _label(cls), shape, note))
    return NormSwaps(rows, undo)


_Plan = tuple[type[nn.Module] | None, dict[str, Any], str]


def _plan_fused(module: nn.Module, centered: bool) -> _Plan | None:
    """(new class, attributes, note); no class if the layer must stay; None if it is not a layer of this kind."""
    torchs = nn.LayerNorm if centered else nn.RMSNorm
    if isinstance(module, LayerNorm | RMSNorm) or isinstance(module, nn.RMSNorm if centered else nn.LayerNorm):
        return None
    if not isinstance(module, torchs) and not _looks_like(module, centered):
        return None
    refusal = _refusal(module)
    if refusal is not None:
        return None, {}, refusal
    eps = _eps(module)
    sizes = _shape(module)
    note, form = _SAME, Form(centered)
    # torch's own layers need no comparison.
    if type(module) is not torchs:
        reason = disagreement(module, form, sizes, eps)
        if reason is not None and len(sizes) == 1:
            images = Form(centered, channels_first=True)
            of_images = disagreement(module, images, sizes, eps)
            form, reason = (images, None) if of_images is None else (form, f"{reason}; of images, {of_images}")
        if reason is not None:
            return None, {}, reason
        if rounds_twice(module, form, sizes, eps):
            note = f"{_SAME}; 16-bit results rounded once, not twice"
    affine = own_parameters(module).get("weight") is not None
    attributes = {"normalized_shape": sizes, "eps": eps, "elementwise_affine": affine}
    return fused_class(type(module), form), attributes, note


def _looks_like(module: nn.Module, centered: bool) -> bool:
    """Whether this may be a normalization of another package: one weight vector, perhaps a bias, and an eps."""
    if isinstance(module, torch.jit.ScriptModule):  # it runs its graph, whatever its class
        return False
    weight = own_parameters(module).get("weight")
    if (
        weight is None
        or is_lazy(weight)
        or weight.dim() != 1
        or next(module.children(), None) is not None
        or _eps(module) is None
        or own_buffers(module)
    ):
        return False
    if set(own_parameters(module)) - {"weight", "bias"} or isinstance(module, _OTHERS):
        return False
    # A layer with a bias is not an RMS norm; one without may be either, which its results decide.
    if own_parameters(module).get("bias") is not None:
        return centered
    is_layer_norm = _computes(module, Form(True)) or _computes(module, Form(True, channels_first=True))
    return is_layer_norm if centered else not is_layer_norm


def _computes(module: nn.Module, form: Form) -> bool:
    """Whether the results of the module are those of this form."""
    sizes = _shape(module)
    return (len(sizes) == 1 or not form.channels_first) and disagreement(module, form, sizes, _eps(module)) is None


def _refusal(module: nn.Module) -> str | None:
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    if hasattr(module, "set_reshard_after_forward"):
        return "sharded by itself; swap before sharding"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    weight = own_parameters(module).get("weight")
    if weight is not None and not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    return None


def _plan_batch(module: nn.Module, kind: str, num_groups: int, ghost_batch_size: int) -> _Plan | None:
    if isinstance(module, nn.SyncBatchNorm):
        return None, {}, "does not say how many dimensions its inputs have"
    ghost = next((torchs for torchs, ours in _GHOST.items() if type(module) is ours), None)
    if kind == "batch":
        return None if ghost is None else (ghost, {}, "changes training: whole batches normalize")
    if not isinstance(module, _BATCH) or (kind == "ghost" and ghost is not None):
        return None
    if ghost is None and type(module) not in _BATCH:
        return None, {}, "a class of its own"
    refusal = _refusal(module)
    if refusal is not None:
        return None, {}, refusal
    channels = module.num_features
    if kind == "group":
        groups = next(n for n in range(min(num_groups, channels), 0, -1) if channels % n == 0)
        attributes = {"num_groups": groups, "num_channels": channels}
        return nn.GroupNorm, attributes, f"changes the model: {groups} groups within a sample, no running statistics"
    to = _GHOST.get(type(module))
    if to is None:
        return None, {}, "there is no ghost form of it"
    note = f"changes training: {ghost_batch_size} samples normalize"
    return to, {"ghost_batch_size": ghost_batch_size}, note


def _label(cls: type[nn.Module]) -> str:
    return f"layers.{cls.__name__}" if cls.__module__.startswith("lightning_optkit") else cls.__name__


def _eps(module: nn.Module) -> float | None:
    values: list[Any] = [getattr(module, name, None) for name in ("eps", "variance_epsilon")]
    return next((value for value in values if isinstance(value, float)), None)


def _shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return tuple(module.normalized_shape)
    if isinstance(module, AnyBatchNorm):
        return (module.num_features,)
    return tuple(module.weight.shape)  # type: ignore[arg-type]
