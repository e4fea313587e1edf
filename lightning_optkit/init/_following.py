# SPDX-License-Identifier: Apache-2.0
"""Finds the activation after each layer, from the registration order of modules."""

from torch import nn

from lightning_optkit.init._layout import is_norm, is_weighted
from lightning_optkit.init.gain import Activation

__all__ = ["following_activations"]

# Modules that pass the signal on. Softmax is an output, so its layer counts as linear.
_ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.PReLU, nn.ReLU, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip
_OUTPUTS = (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d)


def following_activations(model: nn.Module) -> dict[str, Activation | None]:
    """The activation after each weighted module, by name: "linear" if there is none, None if it is unknown.

    Modules are taken in registration order, which is the execution order in nn.Sequential and usually elsewhere. After
    a layer, norms, dropout, pooling, reshaping and other modules of torch are skipped, and:

    1. an activation module comes first: it is the result;
    2. a softmax or the end of the model comes first: "linear";
    3. another layer comes first: "linear" if all containers between the two are nn.Sequential, else None, since the
       forward of a custom module may apply a function; None also if a custom childless module was skipped;
    4. a model without activation modules: None everywhere.

    torch's transformer layers store their activation in an attribute, which is used.
    """
    steps = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if _is_step(name, module)]
    known = _attention_and_transformer(model)
    visible = any(isinstance(module, _ACTIVATIONS) for _, module in steps) or bool(known)
    found: dict[str, Activation | None] = {}
    for index, (name, module) in enumerate(steps):
        if is_weighted(module) and name not in found:
            answer = _after(model, name, steps[index + 1 :]) if visible else None
            found[name] = known.get(name, answer)
    return found


def _is_step(name: str, module: nn.Module) -> bool:
    inside = f".{name}."
    return ".parametrizations." not in inside and (is_weighted(module) or not any(module.children()))


def _after(model: nn.Module, name: str, rest: list[tuple[str, nn.Module]]) -> Activation | None:
    sure = True
    for other_name, other in rest:
        if isinstance(other, _ACTIVATIONS):
            return other
        if isinstance(other, _OUTPUTS):
            return "linear"
        if is_weighted(other):
            return "linear" if sure and _only_sequential_between(model, name, other_name) else None
        passed_over = is_norm(other) or type(other).__module__.startswith("torch.nn.modules.")
        sure = sure and passed_over
    return "linear"


def _only_sequential_between(model: nn.Module, first: str, second: str) -> bool:
    """Whether all containers between the two, including their common one, are nn.Sequential."""
    paths = [name.split(".")[:-1] for name in (first, second)]
    shared = 0
    while shared < min(map(len, paths)) and paths[0][shared] == paths[1][shared]:
        shared += 1
    containers = {".".join(path[:depth]) for path in paths for depth in range(shared, len(path) + 1)}
    return all(isinstance(model.get_submodule(container), nn.Sequential) for container in containers)


def _attention_and_transformer(model: nn.Module) -> dict[str, Activation]:
    known: dict[str, Activation] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            known[f"{prefix}linear1"] = module.activation
            known[f"{prefix}linear2"] = "linear"
        elif isinstance(module, nn.MultiheadAttention):
            known[f"{prefix}out_proj"] = "linear"
    return known
