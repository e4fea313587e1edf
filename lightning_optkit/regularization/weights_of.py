# SPDX-License-Identifier: Apache-2.0
"""The parameters that penalties apply to: weights, without biases and gains."""

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optkit._checks import check_bools, check_module

__all__ = ["weights_of"]


def weights_of(module: nn.Module, *, frozen: bool = False) -> dict[str, Tensor]:
    """The parameters of `module` that multiply inputs: no biases, no gains, none of normalization layers.

    A bias or a gain is a vector; layers whose type is named "...Norm" are skipped. A shared parameter appears once.
    Parameters of lazy layers are skipped until their shape is known.

    Args:
        module: Any module.
        frozen: Also include frozen parameters.

    Returns:
        Name -> parameter.

    Raises:
        TypeError: if `module` is not a module, or `frozen` not a bool.

    Example:
        >>> list(weights_of(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm([4, 3]), nn.Embedding(5, 2))))
        ['0.weight', '2.weight']
    """
    check_module("weights_of", "module", module)
    check_bools("weights_of", frozen=frozen)
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
