# SPDX-License-Identifier: Apache-2.0
"""Initializes a whole module tree with one scheme, with a rule for every kind of layer.

Source: He et al. 2015, arXiv:1502.01852 (fans, gains); Saxe et al. 2013, arXiv:1312.6120 (recurrent matrices);
Jozefowicz et al. 2015, ICML (forget-gate bias).
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_callable, check_in, shown
from lightning_optkit.init._following import following_activations
from lightning_optkit.init._layout import forget_gate, parameter_names, role, weight_blocks
from lightning_optkit.init._write import (
    check_same_random_state,
    check_writable_model,
    current,
    draw,
    parameter,
    parameter_uses,
    why_not_writable,
    write,
)
from lightning_optkit.init.gain import Activation, activation_name, check_activation, takes_activation
from lightning_optkit.init.he import he
from lightning_optkit.init.lecun import lecun
from lightning_optkit.init.orthogonal import orthogonal
from lightning_optkit.init.report import InitRow, row
from lightning_optkit.init.xavier import xavier

__all__ = ["Scheme", "check_scheme", "initialize", "unwrapped"]

# Fills a tensor in place; gets `generator` and `activation` as keywords if it has such arguments.
Scheme: TypeAlias = Callable[..., Tensor]
_FAN_SCHEMES = (he, lecun, orthogonal, xavier)


class _Rules(NamedTuple):
    scheme: Scheme
    recurrent: Scheme
    embedding: Scheme | None
    forget_bias: float
    activations: Mapping[str, Activation | None]
    overrides: Mapping[str, Activation]
    generator: torch.Generator | None


def initialize(
    model: nn.Module,
    scheme: Scheme,
    *,
    activation: Activation | Mapping[str, Activation] | None = None,
    recurrent: Scheme = orthogonal,
    embedding: Scheme | None = None,
    forget_bias: float = 0.0,
    generator: torch.Generator | None = None,
) -> list[InitRow]:
    """Fills the parameters of `model` in place with `scheme`; returns one row per parameter that says what was done.

    Linear, Bilinear, convolutions (each group; transposed ones with swapped fans), Hugging Face's Conv1D, every gate of
    RNN, LSTM and GRU, and q, k, v of MultiheadAttention are drawn by `scheme`, each with its own fan; norms get weight
    1, biases 0. An embedding has no fan_in: with xavier, he, lecun and orthogonal its table is N(0, 1), or N(0,
    1/embedding_dim) if tied to an output layer; any other scheme draws the table itself; the row of `padding_idx` is
    zero. Tied parameters are drawn once. Frozen parameters and those of modules without a rule are unchanged, as their
    row says. Buffers are not changed, except those of a spectral norm. Each rank draws the global tensor of a DTensor
    (FSDP2) and keeps its shard.

    Args:
        model: Any module tree.
        scheme: A function of this folder, a `functools.partial` of one, or a custom one: `scheme(tensor,
            generator=...)`.
        activation: The activation after the layers; None finds it from the module order: an activation module before
            the next layer, "linear" at the end, else the scheme's own default (functions called in `forward` are not
            seen; `_following.py` has the full rule). A mapping sets it for the named layers only.
        recurrent: Scheme for the hidden-to-hidden matrices, gate by gate.
        embedding: Scheme for embedding tables instead of the rule above.
        forget_bias: Bias of the LSTM forget gates, in (-inf, inf); 1 helps long memories.
        generator: Random generator, on any device; None: torch's global one. With a CPU generator the weights do not
            depend on the device of the model.

    Raises:
        TypeError: if `model` is not a module or `scheme` not a function of a tensor.
        ValueError: if a parameter is on the meta device or lazy, `activation` names a layer that does not exist, or the
            ranks of a sharded model would draw different numbers.

    Cost: one whole parameter at a time in memory, even if the model is sharded.

    Source: He et al. 2015, arXiv:1502.01852; Jozefowicz et al. 2015, ICML (forget gate).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> [row.scheme for row in initialize(model, he, generator=torch.Generator().manual_seed(0))]
        ['he, relu', 'zeros', 'he, linear', 'zeros']
    """
    check_writable_model("initialize", model)
    for argument, value in (("scheme", scheme), ("recurrent", recurrent), ("embedding", embedding)):
        if value is not None or argument != "embedding":
            check_scheme("initialize", argument, value)
    check_in("initialize", "forget_bias", forget_bias, "(-inf, inf)")
    rules = _Rules(
        scheme, recurrent, embedding, forget_bias, *_activations(model, activation), generator
    )  # fmt: skip
    check_same_random_state("initialize", model, generator)
    uses = parameter_uses(model)
    return [
        _fill(name, module, parameter_name, uses, rules)
        for name, module in model.named_modules()
        if ".parametrizations." not in f".{name}."
        for parameter_name in parameter_names(module)
    ]


def check_scheme(owner: str, argument: str, scheme: object) -> None:
    """Raises unless `scheme` is a function that fills a tensor.

    Raises:
        TypeError: if it is not a function, or one of a whole model.
    """
    if isinstance(scheme, type) or not callable(scheme):
        raise TypeError(f"{owner}({argument}={shown(scheme)}): {argument} must be a function that fills a tensor.")
    try:
        first = next(iter(inspect.signature(scheme).parameters), "")
    except ValueError:  # a C function without a signature
        first = ""
    if first in ("model", "target"):
        name = _name(scheme)
        raise TypeError(f"{owner}({argument}={name}): {name} works on a whole model; call {name}(model) instead.")
    check_callable(owner, argument, scheme, f"{argument}(tensor)")


def _activations(
    model: nn.Module, activation: Activation | Mapping[str, Activation] | None
) -> tuple[Mapping[str, Activation | None], Mapping[str, Activation]]:
    """The activation of each layer, and those that the caller set by name (which override a gate's own)."""
    following = following_activations(model)
    for given in activation.values() if isinstance(activation, Mapping) else [activation]:
        check_activation("initialize", given)
    if not isinstance(activation, Mapping):
        return (following if activation is None else dict.fromkeys(following, activation)), {}
    for name in activation:
        if name not in following:
            raise ValueError(
                f"initialize(activation={shown(name)}): activation must name weighted layers of the model."
            )
    return following, activation


def _fill(
    module_name: str, module: nn.Module, name: str, all_uses: Mapping[int, list[tuple[str, str]]], rules: _Rules
) -> InitRow:
    target = parameter(module, name)
    kind = role(module, name)
    uses = all_uses[id(target)]
    reason = why_not_writable(module, name) or (f"no rule for {type(module).__name__}" if kind == "other" else None)
    if uses[0] != (module_name, name):
        return row(module_name, name, f"tied to {'.'.join(uses[0]).lstrip('.')}", target)
    if reason is not None:
        return row(module_name, name, f"left as it was: {reason}", target)

    done: list[str] = []

    def fill(value: Tensor) -> None:
        if kind == "table":
            done.extend(_fill_table(module, value, len(uses) > 1, rules))
        elif kind in ("weight", "recurrent"):
            done.extend(_fill_weight(module_name, module, name, value, rules))
        elif kind == "norm":
            nn.init.ones_(value)
            done.append("ones")
        else:
            done.extend(_fill_bias(module, name, value, rules))

    value = draw(current(module, name), fill, rules.generator)
    write(module, name, value)
    return row(module_name, name, ", ".join(dict.fromkeys(done)), value)


def _fill_weight(module_name: str, module: nn.Module, name: str, value: Tensor, rules: _Rules) -> list[str]:
    recurrent = role(module, name) == "recurrent"
    scheme = rules.recurrent if recurrent else rules.scheme
    done = [_name(scheme)]
    for block in weight_blocks(module, name, value):
        own = None if recurrent else block.activation or rules.activations.get(module_name)
        activation = own if recurrent else rules.overrides.get(module_name, own)
        filled = block.tensor if block.tensor.is_contiguous() else torch.empty(block.tensor.shape).to(value)
        _call(scheme, filled, activation, rules.generator)
        if filled is not block.tensor:
            block.tensor.copy_(filled)
        if activation is not None and takes_activation(scheme):
            done.append(activation_name(activation))
    return done


def _fill_table(module: nn.Module, value: Tensor, tied: bool, rules: _Rules) -> list[str]:
    scheme = rules.embedding
    if scheme is None and unwrapped(rules.scheme) not in _FAN_SCHEMES:
        scheme = rules.scheme
    if scheme is not None:
        _call(scheme, value, None, rules.generator)
        done = [_name(scheme)]
    else:
        variance = 1 / value.shape[1] if tied else 1.0
        nn.init.normal_(value, std=variance**0.5, generator=rules.generator)
        done = [f"N(0, {variance:.3g})"]
    padding_idx = getattr(module, "padding_idx", None)
    if padding_idx is not None:
        value[padding_idx] = 0
        done.append(f"row {padding_idx} zero")
    return done


def _fill_bias(module: nn.Module, name: str, value: Tensor, rules: _Rules) -> list[str]:
    nn.init.zeros_(value)
    gate = forget_gate(module, name, value)
    if gate is None or rules.forget_bias == 0:
        return ["zeros"]
    gate.fill_(rules.forget_bias)
    return ["zeros", f"forget gate {rules.forget_bias:g}"]


def _call(scheme: Scheme, tensor: Tensor, activation: Activation | None, generator: torch.Generator | None) -> None:
    keywords: dict[str, Any] = {}
    if activation is not None and takes_activation(scheme):
        keywords["activation"] = activation
    if generator is not None and "generator" in inspect.signature(scheme).parameters:
        keywords["generator"] = generator
    tensor.fill_(torch.nan)
    scheme(tensor, **keywords)
    if tensor.isnan().any():
        raise ValueError(
            f"initialize(scheme={shown(scheme)}): scheme must fill the tensor that it "
            "is given, in place and with numbers."
        )


def unwrapped(scheme: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside a `functools.partial`, or the scheme itself."""
    return unwrapped(scheme.func) if isinstance(scheme, functools.partial) else scheme


def _name(scheme: Scheme) -> str:
    filled = "".join(f", {key}={value}" for key, value in getattr(scheme, "keywords", {}).items())
    return getattr(unwrapped(scheme), "__name__", repr(scheme)) + filled
