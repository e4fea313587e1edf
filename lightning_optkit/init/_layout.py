# SPDX-License-Identifier: Apache-2.0
"""The role of each parameter of a module, and its split into plain (fan_out, fan_in, *kernel) blocks.

A scheme sees one block at a time, so its formula need not handle groups, gates, heads or transposition.
"""

from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_optkit._torch_private import (
    AnyConv,
    AnyConvTranspose,
    BatchOrInstanceNorm,
    forward_pre_hooks,
    own_parameters,
)
from lightning_optkit.init.gain import Activation

__all__ = [
    "Block",
    "Role",
    "forget_gate",
    "is_norm",
    "is_weighted",
    "normalizing_hooks",
    "parameter_names",
    "role",
    "weight_blocks",
]

Role = Literal["weight", "recurrent", "table", "bias", "norm", "other"]

# Order and activations of the gates in torch: input, forget, cell, output; reset, update, new.
_GATES: dict[str, tuple[str, ...]] = {
    "LSTM": ("sigmoid", "sigmoid", "tanh", "sigmoid"),
    "GRU": ("sigmoid", "sigmoid", "tanh"),
    "RNN_TANH": ("tanh",),
    "RNN_RELU": ("relu",),
}
_ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class Block(NamedTuple):
    """A view of part of a weight, shape (fan_out, fan_in, *kernel), and the activation that the layer type implies."""

    tensor: Tensor
    activation: Activation | None = None


def role(module: nn.Module, name: str) -> Role:
    """The role of parameter `name` of `module`; "other" if no rule is known."""
    if is_norm(module):
        return {"weight": "norm", "bias": "bias"}.get(name, "other")  # type: ignore[return-value]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "table" if name == "weight" else "other"
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        if name.startswith("bias_"):
            return "bias"
        return "recurrent" if name.startswith("weight_hh") else "weight"
    if isinstance(module, nn.MultiheadAttention):
        if name in _ATTENTION_WEIGHTS:
            return "weight"
        return "bias" if name in ("in_proj_bias", "bias_k", "bias_v") else "other"
    if isinstance(module, (nn.Linear, nn.Bilinear, AnyConv)) or _is_transposed_linear(module):
        return {"weight": "weight", "bias": "bias"}.get(name, "other")  # type: ignore[return-value]
    return "other"


def is_norm(module: nn.Module) -> bool:
    """Whether `module` normalizes: torch's classes, and any module with torch's `normalized_shape`."""
    return isinstance(module, (BatchOrInstanceNorm, nn.GroupNorm)) or hasattr(module, "normalized_shape")


def is_weighted(module: nn.Module) -> bool:
    """Whether `module` has weights that a scheme draws (embeddings and norms do not count)."""
    return any(role(module, name) in ("weight", "recurrent") for name in parameter_names(module))


def parameter_names(module: nn.Module) -> list[str]:
    """Names of the module's own parameters; reparametrized ones by the name of the computed weight."""
    hooks = normalizing_hooks(module)
    parts = {f"{name}_{part}" for name in hooks for part in ("g", "v", "orig")}
    names = [name for name, parameter in own_parameters(module).items() if parameter is not None and name not in parts]
    parametrizations = getattr(module, "parametrizations", None)
    return [*(parametrizations if isinstance(parametrizations, nn.ModuleDict) else ()), *hooks, *names]


def normalizing_hooks(module: nn.Module) -> dict[str, WeightNorm | SpectralNorm]:
    """The hooks of `torch.nn.utils.weight_norm` and `spectral_norm`, by the name of the computed weight."""
    hooks = forward_pre_hooks(module)
    return {hook.name: hook for hook in hooks if isinstance(hook, (WeightNorm, SpectralNorm))}


def weight_blocks(module: nn.Module, name: str, tensor: Tensor) -> list[Block]:
    """Splits `tensor`, shaped like parameter `name` of `module`, into views with one fan each."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        if name.startswith("weight_hr"):  # the LSTM's projection of its hidden state
            return [Block(tensor, "linear")]
        gates = _gates(module)
        return [Block(part, gate) for part, gate in zip(tensor.chunk(len(gates)), gates, strict=True)]
    if isinstance(module, nn.MultiheadAttention):
        parts = tensor.chunk(3) if name == "in_proj_weight" else (tensor,)
        return [Block(part, "linear") for part in parts]
    if isinstance(module, AnyConvTranspose):  # stored as (in, out / groups, *kernel)
        return [Block(part.transpose(0, 1)) for part in tensor.chunk(module.groups)]
    if isinstance(module, AnyConv):
        return [Block(part) for part in tensor.chunk(module.groups)]
    if _is_transposed_linear(module):
        return [Block(tensor.T)]
    if isinstance(module, nn.Bilinear):  # each output sums over all pairs of inputs
        return [Block(tensor.flatten(1))]
    return [Block(tensor)]


def forget_gate(module: nn.Module, name: str, tensor: Tensor) -> Tensor | None:
    """The part of the input bias `tensor` that belongs to an LSTM's forget gate, or None if `name` is not one."""
    if not name.startswith("bias_ih") or not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    return tensor.chunk(4)[1] if _gates(module) == _GATES["LSTM"] else None


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a Linear stored as (in, out); does not import transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _gates(module: nn.RNNBase | nn.RNNCellBase) -> tuple[str, ...]:
    if isinstance(module, (nn.RNN, nn.RNNCell)):
        return _GATES[f"RNN_{module.nonlinearity.upper()}"]
    return _GATES["LSTM" if isinstance(module, (nn.LSTM, nn.LSTMCell)) else "GRU"]
