# SPDX-License-Identifier: Apache-2.0
"""Finds the residual branches of a model by the names of its modules."""

import re

from torch import nn

from lightning_optkit._checks import shown
from lightning_optkit.init._layout import is_norm, is_weighted

__all__ = ["LAST_NORMS", "LAST_PROJECTIONS", "branch_ends", "branch_layers"]

# The last projection of a branch inside a numbered block: GPT-2 and nanoGPT, torch, Llama, timm, BERT.
LAST_PROJECTIONS = (
    r"(?:^|\.)\d+\.(?:.*\.)?(?:c_proj|out_proj|o_proj|down_proj|wo|w2|fc2|linear2|attn\.proj|output\.dense)$"
)
# The last norm of a branch in torchvision's and timm's ResNets: bn2 of a basic block, bn3 of a bottleneck.
LAST_NORMS = r"(?:^|\.)\d+\.(?:.*\.)?bn[23]$"
_BLOCKS = r"(?:^|\.)\d+$"
_SHORTCUT = re.compile(r"(?:^|\.)(?:downsample|shortcut|skip)")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def branch_ends(owner: str, model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules with a weight whose name matches `pattern`; of several norms in one parent only the last.

    Raises:
        ValueError: if none matches.
    """
    last_norm: dict[str, str] = {}
    ends: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if ".parametrizations." in f".{name}." or not re.search(pattern, name) or not hasattr(module, "weight"):
            continue
        if is_norm(module):
            parent = name.rpartition(".")[0]
            ends.pop(last_norm.get(parent, ""), None)
            last_norm[parent] = name
        ends[name] = module
    if not ends:
        raise ValueError(f"{owner}(pattern={shown(pattern)}): pattern must match the name of a layer with a weight.")
    return ends


def branch_layers(owner: str, model: nn.Module, pattern: str | None) -> dict[str, list[tuple[str, nn.Module]]]:
    """The weighted layers of each branch, by the branch's name, without shortcuts.

    Without a pattern, a branch is the innermost custom module that is numbered (an element of a Sequential or
    ModuleList) and has at least two weighted layers.

    Raises:
        ValueError: if there is none.
    """
    found: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        if not re.search(_BLOCKS if pattern is None else pattern, name) or (
            pattern is None and isinstance(module, _CONTAINERS)
        ):
            continue
        layers = [
            (f"{name}.{inner}" if inner else name, layer)
            for inner, layer in module.named_modules()
            if is_weighted(layer) and not _SHORTCUT.search(inner)
        ]
        if len(layers) >= (2 if pattern is None else 1):
            found[name] = layers
    inner_most = {
        name: layers for name, layers in found.items() if not any(other.startswith(f"{name}.") for other in found)
    }
    if not inner_most:
        raise ValueError(
            f"{owner}(branches={shown(pattern)}): branches must match the modules that are residual branches."
        )
    return inner_most
