# SPDX-License-Identifier: Apache-2.0
"""The gain of an activation: the factor of a weight's standard deviation that compensates for the activation.

Source: He et al. 2015, arXiv:1502.01852 (ReLU and PReLU); Glorot and Bengio 2010, AISTATS; the values of
`torch.nn.init.calculate_gain` where torch defines one.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optkit._checks import shown

__all__ = ["Activation", "gain"]

Activation: TypeAlias = str | nn.Module | Callable[[Tensor], Tensor]

# The names that torch.nn.init.kaiming_normal_ and calculate_gain accept.
_TORCH_NAMES = ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu")
# Names in torch.nn.functional without a gain in torch.
_OTHER_NAMES = ("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "logsigmoid", "mish", "relu6", "silu",
                "softplus", "softsign", "tanhshrink")  # fmt: skip
_MODULE_NAMES = {nn.Identity: "linear", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh", nn.ReLU: "relu", nn.SELU: "selu"}
_FUNCTION_NAMES: dict[Callable[..., Tensor], str] = {
    F.relu: "relu", torch.relu: "relu", F.tanh: "tanh", torch.tanh: "tanh", F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid", F.selu: "selu", F.leaky_relu: "leaky_relu",
}  # fmt: skip


def gain(activation: Activation) -> float:
    r"""Returns the gain of `activation`: torch's value if it has one, else the one that keeps the second moment.

    .. math:: g = 1 / \sqrt{E[f(z)^2]}, \qquad z \sim N(0, 1)

    This formula gives exactly torch's values for ReLU and leaky ReLU; tanh would get 1.59, where torch (and this
    function) uses 5/3, and SELU gets 1, which is why SELU needs `lecun`, not `he`: torch's 3/4 breaks
    self-normalization.

    Args:
        activation: Its name in torch.nn.functional, its module (which provides the slope), or a function that maps each
            element to one number. "linear" means none.

    Raises:
        ValueError: if the name is unknown, or the function changes the shape, is not finite or is zero everywhere.
        TypeError: if it is none of the three.

    Source: He et al. 2015, arXiv:1502.01852; torch.nn.init.calculate_gain.

    Example:
        >>> round(gain("relu"), 4), round(gain(nn.LeakyReLU(0.2)), 4), round(gain("gelu"), 4)
        (1.4142, 1.3868, 1.5335)
    """
    return gain_for("gain", activation)


def gain_for(owner: str, activation: Activation) -> float:
    """The same for the argument `activation` of `owner`."""
    known = torch_nonlinearity(activation, owner)
    if known is not None:
        name, slope = known
        return float(nn.init.calculate_gain(name, slope))  # type: ignore[arg-type]
    if isinstance(activation, nn.GLU):  # a * sigmoid(b), with independent a and b
        return 1 / math.sqrt(_second_moment(owner, torch.sigmoid))
    function = getattr(F, activation) if isinstance(activation, str) else activation
    return 1 / math.sqrt(_second_moment(owner, function))


def torch_nonlinearity(activation: Activation, owner: str = "gain") -> tuple[str, float | None] | None:
    """The (nonlinearity, slope) that torch uses for `activation`, or None if torch has no gain for it."""
    if isinstance(activation, str):
        if activation not in (*_TORCH_NAMES, *_OTHER_NAMES):
            names = ", ".join(repr(name) for name in (*_TORCH_NAMES, *_OTHER_NAMES))
            raise ValueError(
                f"{owner}(activation={shown(activation)}): activation must be a module, a function or one of {names}."
            )
        return (activation, None) if activation in _TORCH_NAMES else None
    if isinstance(activation, nn.LeakyReLU):
        return "leaky_relu", activation.negative_slope
    if isinstance(activation, nn.RReLU):
        return "leaky_relu", (activation.lower + activation.upper) / 2
    if isinstance(activation, nn.PReLU):
        return "leaky_relu", float(activation.weight.detach().float().mean())
    if not callable(activation) or isinstance(activation, type):
        raise TypeError(f"{owner}(activation={shown(activation)}): activation must be a name, a module or a function.")
    name = _MODULE_NAMES.get(type(activation)) if isinstance(activation, nn.Module) else _FUNCTION_NAMES.get(activation)
    return (name, None) if name is not None else None


def check_activation(owner: str, activation: object) -> None:
    """Raises unless `activation` is None or valid for `gain`."""
    if activation is not None:
        gain_for(owner, activation)  # type: ignore[arg-type]


def activation_name(activation: Activation) -> str:
    """A short name for tables: "relu", "LeakyReLU(negative_slope=0.2)", "my_function"."""
    if isinstance(activation, str):
        return activation
    if isinstance(activation, nn.Module):
        return _MODULE_NAMES.get(type(activation)) or repr(activation)
    return getattr(activation, "__name__", repr(activation))


def takes_activation(function: Callable[..., Any]) -> bool:
    """Whether `function` has a free `activation` argument (a `functools.partial` may have bound it)."""
    filled = getattr(function, "keywords", {})
    return "activation" not in filled and "activation" in inspect.signature(function).parameters


def _second_moment(owner: str, function: Callable[[Tensor], Tensor]) -> float:
    """E[f(z)^2] for z ~ N(0, 1), by the trapezoid rule; zero is a grid point, where most activations have a kink."""
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    with torch.no_grad():
        try:
            values = function(z)
        except Exception as error:
            reason = f"it raised {type(error).__name__}: {shown(str(error))}"
            raise ValueError(
                f"{owner}(activation={shown(function)}): activation must map each element to one number; {reason}."
            ) from error
    if not isinstance(values, Tensor) or values.shape != z.shape:
        raise ValueError(f"{owner}(activation={shown(function)}): activation must map each element to one number.")
    moment = float(torch.trapezoid(values.square() * torch.exp(-z.square() / 2), z)) / math.sqrt(2 * math.pi)
    if not (math.isfinite(moment) and moment > 0):
        raise ValueError(f"{owner}(activation={shown(function)}): activation must be finite and not zero everywhere.")
    return moment
