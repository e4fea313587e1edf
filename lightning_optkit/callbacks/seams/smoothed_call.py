# SPDX-License-Identifier: Apache-2.0
"""A call of a loss function with smoothed targets: shared by LabelSmoothing and the mixtures of Augment."""

from torch import Tensor

from lightning_optkit.callbacks.seams.losses import LossCall
from lightning_optkit.regularization.label_smoothing import label_smoothing

__all__ = ["smoothed_call"]


def smoothed_call(owner: str, name: str, smoothing: float, call: LossCall) -> LossCall:
    """The call with its targets smoothed: spread over the classes, or toward 1/2 in a binary function.

    Args:
        owner: Class named in error messages.
        name: Its argument.
        smoothing: Part of each target that is spread, in [0, 1).
        call: The call.

    Raises:
        ValueError: if the call smooths its targets itself.
    """
    if call.is_binary:
        return call.changed(target=label_smoothing(call.target, smoothing, num_classes=1))
    if call.label_smoothing:
        raise ValueError(
            f"{owner}({name}={smoothing}): the module smooths already, by "
            f"{call.name}(label_smoothing={call.label_smoothing:g}); use one of the two."
        )
    if call.has_soft_target:
        return call.changed(target=_smoothed_classes(call.target, smoothing))
    return call.changed(label_smoothing=smoothing)


def _smoothed_classes(target: Tensor, smoothing: float) -> Tensor:
    """Soft targets with their classes in dimension 1, or in the only one, as in `cross_entropy`."""
    dimension = 0 if target.dim() == 1 else 1
    return label_smoothing(target.movedim(dimension, -1), smoothing).movedim(-1, dimension)
