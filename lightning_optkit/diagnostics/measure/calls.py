# SPDX-License-Identifier: Apache-2.0
"""What `training_step` computes on the way to its loss: activations, layers, the first input, and the loss itself.

Functions are seen by a TorchFunctionMode, so `F.relu` counts as `nn.ReLU` does; layers by their calls. Statistics stay
on the device until `seen`. Inside a transform of torch.func nothing is measured: tensors there have no values of
their own.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_optkit._norms import norm
from lightning_optkit._torch_private import is_transformed
from lightning_optkit.diagnostics._guard import Guarding, unguarded
from lightning_optkit.diagnostics._signals import ActivationSeen, InputSeen, LayerSeen, LossSeen
from lightning_optkit.diagnostics.measure.fast_paths import WatchingMode
from lightning_optkit.diagnostics.measure.losses import LOSSES, loss_seen
from lightning_optkit.diagnostics.measure.module_calls import ModuleCalls
from lightning_optkit.diagnostics.measure.parameters import plain_name
from lightning_optkit.step.shards import unsharded

__all__ = ["CalledFunctions", "CalledLayers"]

_RECTIFIERS: dict[Any, str] = dict.fromkeys((F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_), "relu")
_SIGMOIDS: dict[Any, str] = dict.fromkeys((F.sigmoid, torch.sigmoid, Tensor.sigmoid), "sigmoid")
_TANHS: dict[Any, str] = dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh), "tanh")
_SOFTMAXES: dict[Any, str] = dict.fromkeys((F.softmax, torch.softmax, Tensor.softmax), "softmax")
_LOG_SOFTMAXES = (F.log_softmax, torch.log_softmax, Tensor.log_softmax)
_ACTIVATIONS = {**_RECTIFIERS, **_SIGMOIDS, **_TANHS, **_SOFTMAXES}
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CLOSED = 0.05  # of the largest derivative


class CalledFunctions(WatchingMode):
    """Watches activations and losses while it is entered.

    Args:
        inside: The name of the module that is being called.
        guard: What stands around all but the watched functions themselves.
    """

    def __init__(self, inside: Callable[[], str], guard: Guarding = unguarded) -> None:
        super().__init__()
        self._inside, self._guard = inside, guard
        self._last: dict[int, tuple[Tensor, str]] = {}  # by storage: what an activation gave
        self._activations: list[tuple[str, str, Tensor, int]] = []
        self.losses: list[LossSeen] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_watched = func in _ACTIVATIONS or func in _LOG_SOFTMAXES or func in LOSSES
        if is_watched and isinstance(result, Tensor) and not is_transformed():
            with self._guard("the look at activations and losses"):
                self._take(func, args, kwargs or {}, result)
        return result

    def _take(self, func: Any, args: Any, kwargs: Any, result: Tensor) -> None:
        if func in _ACTIVATIONS:
            self._activation(_ACTIVATIONS[func], result)
        elif func in LOSSES:
            self.losses.append(loss_seen(func, args, kwargs, result, self._behind(args, kwargs)))
        elif (name := self._behind(args, kwargs)) is not None:  # a loss of its result is one of that activation
            self._last[_storage(result)] = (result, name)

    def _behind(self, args: Any, kwargs: Any) -> str | None:
        """The activation that gave the input of a loss, or of a log_softmax."""
        given = args[0] if args else kwargs.get("input")
        result, name = self._last.get(_storage(given), (None, None)) if isinstance(given, Tensor) else (None, None)
        return name if result is not None and result.numel() == given.numel() else None

    def _activation(self, name: str, result: Tensor) -> None:
        self._last[_storage(result)] = (result, name)
        if name != "softmax" and result.ndim >= 2 and result.numel():
            with torch.no_grad():
                units = _by_unit(result.detach())
                if name == "relu":
                    counts = units.amax(0) > 0  # 20 times as fast as (units > 0).any(0)
                else:
                    slope = (1 - units.float().square()) if name == "tanh" else 4 * units.float() * (1 - units.float())
                    counts = slope.mean(0) >= _CLOSED
            self._activations.append((self._inside(), name, counts, units.shape[0]))

    def seen(self, alive: dict[tuple[str, int], list[Tensor]]) -> tuple[ActivationSeen, ...]:
        """The activations; `alive` keeps which units were active in the last four measured steps."""
        found, places = [], dict[str, int]()
        for layer, name, counts, samples in self._activations:
            place = places[layer] = places.get(layer, -1) + 1
            kept = [each for each in alive.get((layer, place), []) if each.shape == counts.shape]
            alive[layer, place] = kept = [*kept[-3:], counts]
            shares = torch.stack([counts.float().mean(), torch.stack(kept).any(0).float().mean()]).tolist()
            found.append(ActivationSeen(layer, name, 1 - shares[0], 1 - shares[1], samples * len(kept), len(counts)))
        return tuple(found)


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _by_unit(t: Tensor) -> Tensor:
    """Samples x units: channels are the second dimension of images, the last one of anything else."""
    if t.ndim >= 4:
        t = t.movedim(1, -1)
    return t.reshape(-1, t.shape[-1])


class CalledLayers:
    """Watches which modules are being called, until `close`, and the scale of what they get and give.

    Args:
        modules: Modules by name, as of `named_modules()`; the root, of name "", is left out.
        measures: Whether dense and convolutional layers are measured, and not the first input alone.
        guard: What stands around the measurements.
    """

    def __init__(self, modules: Mapping[str, nn.Module], measures: bool = True, guard: Guarding = unguarded) -> None:
        self._measures, self._stack, self.guard = measures, list[str](), guard
        self._rows: dict[str, list[Tensor]] = {}  # rms of input, output, gradient of the output
        self._weights: dict[str, tuple[Tensor, Tensor]] = {}  # gain, mean of the biases
        self._num_rows: dict[str, int] = {}  # of the weights
        self._input: tuple[str, Tensor, Tensor, Tensor] | None = None
        self._has_input, self._feature_dim = False, -1
        self._watch = ModuleCalls(modules, self._entered, self._left)

    def close(self) -> None:
        """Watches no longer; no-op the second time."""
        self._watch.close()

    def inside(self) -> str:
        """The innermost module that is being called."""
        return self._stack[-1] if self._stack else ""

    def enter(self, name: str) -> None:
        """A call begins."""
        self._stack.append(name)

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """A call ends; FSDP2 has its parameters whole until hooks of the module itself."""
        if self._stack:
            self._stack.pop()
        if is_transformed():
            return
        if not self._has_input and args and isinstance(args[0], Tensor) and _is_leaf(module):
            self._take_input(name, module, args[0].detach())
        if not self._measures or not isinstance(module, _LAYERS) or name in self._rows:
            return
        if not isinstance(output, Tensor):
            return
        self._weights[name] = _scale(module)
        self._num_rows[name] = getattr(module, "out_features", 0) or getattr(module, "out_channels", 0)
        given = args[0].detach() if args and isinstance(args[0], Tensor) else output.detach()
        row = self._rows[name] = [_rms(given), _rms(output.detach())]
        if output.requires_grad:
            hooked: Any = output  # torch declares no types for it
            hooked.register_hook(_Arrived(self.guard, row))

    def _take_input(self, name: str, module: nn.Module, given: Tensor) -> None:
        self._has_input = True
        is_measured = isinstance(module, (*_LAYERS, nn.RNNBase)) and given.is_floating_point() and given.ndim >= 2
        if is_measured:
            units = _by_unit(given).float()
            if isinstance(module, _LAYERS[1:]):  # pixels, of which all share a kernel
                units, self._feature_dim = given.reshape(len(given), -1).float(), 1
            if len(units) > 1:  # a single sample does not vary
                self._input = (name, units.mean(0), units.std(0, correction=0), units.square().mean().sqrt())

    def _entered(self, name: str, module: nn.Module, args: Any) -> None:
        with self.guard("the look at layers"):
            self.enter(plain_name(name))

    def _left(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        with self.guard("the look at layers"):
            self.leave(plain_name(name), module, args, output)

    def layers(self) -> tuple[LayerSeen, ...]:
        """The layers, in the order of their first call; to be asked after the backward pass."""
        nan = torch.full((), float("nan"))
        rows = []
        for name, row in self._rows.items():
            measured = [*row, nan.to(row[0])][:3]
            rows.append(torch.stack([*measured, *(each.to(row[0].device) for each in self._weights[name])]))
        values = torch.stack([row.to(rows[0].device) for row in rows]).tolist() if rows else []
        return tuple(
            LayerSeen(name, given, out, grad, gain, bias, self._num_rows[name])
            for name, (given, out, grad, gain, bias) in zip(self._rows, values, strict=True)
        )

    def first_input(self) -> InputSeen | None:
        """What the first layer with weights is given; None if that is an embedding or a norm, or a single sample."""
        if self._input is None:
            return None
        name, mean, std, rms = self._input
        varied = std > 0
        if not bool(varied.any()):
            return InputSeen(name, float(rms), 1.0, 0.0, True, self._feature_dim)
        low, high = _quantiles(std[varied][:10_000], 0.25, 0.95)
        offset = float((mean[varied].abs() > 10 * std[varied]).float().mean())
        return InputSeen(name, float(rms), high / max(low, 1e-30), offset, False, self._feature_dim)


class _Arrived:
    def __init__(self, guard: Guarding, row: list[Tensor]) -> None:
        self._guard, self._row = guard, row

    def __call__(self, grad: Tensor) -> None:
        with self._guard("the look at gradients of layers"):
            if len(self._row) == 2:
                self._row.append(_rms(grad))


def _quantiles(values: Tensor, *shares: float) -> list[float]:
    """As `torch.quantile`, which takes several times as long for few values."""
    places = [share * (len(values) - 1) for share in shares]
    around = [int(place) for place in places] + [math.ceil(place) for place in places]
    found = values.sort().values[around].tolist()
    pairs = zip(places, found[: len(places)], found[len(places) :], strict=True)
    return [below + (place - int(place)) * (above - below) for place, below, above in pairs]


def _is_leaf(module: nn.Module) -> bool:
    """Whether it has weights, and no modules within."""
    return next(module.children(), None) is None and next(module.parameters(), None) is not None


def _scale(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Gain and mean bias; NaN of what is parametrized, since `spectral_norm`, say, changes each time it is computed."""
    held = {**vars(module), **dict(module.named_parameters(recurse=False, remove_duplicate=False))}
    weight, bias = held.get("weight"), held.get("bias")
    nan = torch.full((), float("nan"))
    gain = nan if weight is None else _rms(weight.detach()) * weight[0].numel() ** 0.5
    if bias is None:
        return gain, nan if parametrize.is_parametrized(module, "bias") else torch.zeros(())
    return gain, unsharded(bias.detach()).float().mean()


def _rms(t: Tensor) -> Tensor:
    rms: Tensor = unsharded(norm(t)) / max(t.numel(), 1) ** 0.5
    return rms
