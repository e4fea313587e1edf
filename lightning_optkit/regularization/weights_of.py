# SPDX-License-Identifier: Apache-2.0
"""Which parameters a penalty is about: weights, and not what shifts or scales a layer's output."""

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optkit._checks import check_module

__all__ = ["weights_of"]


def weights_of(module: nn.Module, *, frozen: bool = False) -> dict[str, Tensor]:
    """The parameters of `module` that multiply inputs: no biases, no gains, nothing of a normalization layer.

    A bias or a gain is a vector, and a layer whose type is called "...Norm" has nothing else. Parameters that are
    used twice are named once; those of a lazy layer, whose shape is not known before its first input, not yet.

    Args:
        module: Any module.
        frozen: Also those that are not trained.

    Returns:
        Name -> parameter.

    Example:
        >>> list(weights_of(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm([4, 3]), nn.Embedding(5, 2))))
        ['0.weight', '2.weight']
    """
    check_module("weights_of", "module", module)
    normalizing = {
        param
        for layer in module.modules()
        if "Norm" in type(layer).__name__
        for param in layer.parameters(recurse=False)
    }
    return {
        name: param
        for name, param in module.named_parameters()
        if (frozen or param.requires_grad) and not is_lazy(param) and param.dim() >= 2 and param not in normalizing
    }
