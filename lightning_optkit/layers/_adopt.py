# SPDX-License-Identifier: Apache-2.0
"""Changes the class of a module inside a model, while the object stays the same.

Parameters, hooks, training flag, device, and all references to the module are kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_optkit._torch_private import own_buffers, own_parameters, replace_own_parameters
from lightning_optkit.layers.layer_norm import LayerNorm, layer_norm
from lightning_optkit.layers.layer_norm2d import LayerNorm2d
from lightning_optkit.layers.rms_norm import RMSNorm, rms_norm
from lightning_optkit.layers.rms_norm2d import RMSNorm2d

__all__ = ["Form", "become", "disagreement", "fused_class", "give_back", "rounds_twice"]


class Form(NamedTuple):
    """What a normalization computes.

    Args:
        centered: Layer norm, otherwise RMS norm.
        channels_first: Of images (N, C, H, W), over the channels, otherwise over the last dimensions.
    """

    centered: bool
    channels_first: bool = False

    @property
    def layer(self) -> type[nn.Module]:
        """Our layer of this form."""
        if self.channels_first:
            return LayerNorm2d if self.centered else RMSNorm2d
        return LayerNorm if self.centered else RMSNorm

    def apply(
        self, x: Tensor, sizes: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float | None
    ) -> Tensor:
        """The fused function."""
        x = x.permute(0, 2, 3, 1) if self.channels_first else x
        result = layer_norm(x, sizes, weight, bias, _number(eps)) if self.centered else rms_norm(x, sizes, weight, eps)
        return result.permute(0, 3, 1, 2) if self.channels_first else result


_CLASSES: dict[tuple[type[nn.Module], Form], type[nn.Module]] = {}
_REBASED: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def become(
    module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any], keep_buffers: bool = True
) -> dict[str, Any]:
    """Makes `module` an instance of `cls` with these attributes. Returns the argument of `give_back`."""
    before = {
        "class": type(module),
        "became": cls,
        "attributes": {name: vars(module)[name] for name in attributes if name in vars(module)},
        "added": [name for name in attributes if name not in vars(module)],
        "buffers": dict(own_buffers(module)),
    }
    vars(module).update(attributes)
    if not keep_buffers:
        own_buffers(module).clear()
    module.__class__ = cls
    return before


def give_back(module: nn.Module, before: dict[str, Any]) -> None:
    """Undoes `become` and nothing else: parameters, and attributes set by others in the meantime, are kept.

    Removed buffers are restored on the device of the parameters.
    """
    for name in before["added"]:
        vars(module).pop(name, None)
    vars(module).update(before["attributes"])
    device = next((parameter.device for parameter in module.parameters()), None)
    for name, buffer in before["buffers"].items():
        if name not in own_buffers(module):
            own_buffers(module)[name] = buffer if buffer is None or device is None else buffer.to(device)
    module.__class__ = _with_base(type(module), before["became"], before["class"])


def _with_base(current: type[nn.Module], became: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """`original`, wrapped in the classes that others have derived from `became` since.

    E.g. `fully_shard` on the layer itself derives a class, without which the layer cannot be resharded.
    """
    if became not in current.__bases__:
        return original
    if (current, original) not in _REBASED:
        bases = tuple(original if base is became else base for base in current.__bases__)
        body = {name: value for name, value in vars(current).items() if name not in ("__dict__", "__weakref__")}
        name = current.__name__.replace(became.__name__, original.__name__)
        _REBASED[current, original] = type(name, bases, body)
    return _REBASED[current, original]


def fused_class(original: type[nn.Module], form: Form) -> type[nn.Module]:
    """A subclass of `original` with the fused forward; for torch's own classes, our layers.

    If weight and input differ in dtype, the original forward runs, since implementations return different dtypes.
    """
    if original is (nn.LayerNorm if form.centered else nn.RMSNorm):
        return form.layer
    if (original, form) in _CLASSES:
        return _CLASSES[original, form]

    def forward(self: Any, x: Tensor) -> Tensor:
        is_other = form.channels_first and x.dim() != 4
        if is_other or (self.weight is not None and x.dtype != self.weight.dtype):
            return original.forward(self, x)  # type: ignore[no-any-return]
        return form.apply(x, self.normalized_shape, self.weight, getattr(self, "bias", None), self.eps)

    def reduce(self: Any, protocol: Any) -> Any:
        # The class is built at run time, so pickle cannot find it by name.
        return _rebuild, (original, *form), vars(self)

    body = {"forward": forward, "__reduce_ex__": reduce, "__module__": __name__, "extra_repr": original.extra_repr}
    _CLASSES[original, form] = type(f"Fused{original.__name__}", (form.layer, original), body)
    return _CLASSES[original, form]


def _rebuild(original: type[nn.Module], centered: bool, channels_first: bool = False) -> nn.Module:
    cls = fused_class(original, Form(centered, channels_first))
    return cls.__new__(cls)


def disagreement(module: nn.Module, form: Form, sizes: tuple[int, ...], eps: float | None) -> str | None:
    """Why the fused layer cannot replace `module`, based on its results for random weights and inputs, or None."""
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2.0**-7)):
        weight, bias, x = _random_case(module, form, sizes, dtype)
        ours = form.apply(x, sizes, weight, bias, eps)
        try:
            theirs = _forward(module, weight, bias, x)
        except Exception as error:
            return f"its forward does not take such an input ({type(error).__name__})"
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != dtype:
            return f"its result is of another kind in {dtype}"
        # The tolerance is relative and absolute: a second rounding may change a value by one unit in the last place.
        if not torch.allclose(theirs.double(), ours.double(), rtol=tolerance, atol=tolerance):
            return f"its numbers differ in {dtype}"
    return None


def rounds_twice(module: nn.Module, form: Form, sizes: tuple[int, ...], eps: float | None) -> bool:
    """Whether `module` rounds between normalization and weight in bfloat16, where the fused layer rounds once."""
    weight, bias, x = _random_case(module, form, sizes, torch.bfloat16)
    if weight is None or bias is not None:
        return False
    theirs = _forward(module, weight, None, x).double()
    normal = form.apply(x.float(), sizes, None, None, eps)
    per_place = weight.view(-1, 1, 1) if form.channels_first else weight
    once = (normal * per_place.float()).bfloat16().double()
    twice = (normal.bfloat16() * per_place).double()
    return float((theirs - twice).abs().sum()) < float((theirs - once).abs().sum())


@torch.no_grad()
def _forward(module: nn.Module, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Any:
    """Runs the forward of a copy without hooks; the module, its weights and torch's generators are unchanged."""
    twin = type(module).__new__(type(module))
    vars(twin).update(vars(module))
    given = {"weight": weight, "bias": bias}
    replace_own_parameters(twin, {name: given.get(name) for name in own_parameters(module)})
    return twin.forward(x)


def _random_case(
    module: nn.Module, form: Form, sizes: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (3, *sizes, 5, 2) if form.channels_first else (3, 5, *sizes)
    x = (torch.randn(shape, generator=generator) * 2 + 0.5).to(dtype)
    # Small rows reveal where eps is added, and its value.
    x[0] *= 1e-3
    weight = (torch.rand(sizes, generator=generator) + 0.5).to(dtype)
    bias = torch.randn(sizes, generator=generator).to(dtype)
    has = {name for name, parameter in own_parameters(module).items() if parameter is not None}
    return weight if "weight" in has else None, bias if "bias" in has else None, x


def _number(eps: float | None) -> float:
    return 1e-5 if eps is None else eps
