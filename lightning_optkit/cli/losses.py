# SPDX-License-Identifier: Apache-2.0
"""A loss of which torch cannot compute a gradient: what is wrong with it, since no line of the user's is at fault."""

import traceback

__all__ = ["about_loss"]

_CAUSES = {
    "does not require grad": "has no gradient: it was detached, or computed without one, or every parameter is frozen.",
    "can be implicitly created only for scalar outputs": 'is not one number; take its mean, as with reduction="mean".',
}


def about_loss(error: BaseException) -> str | None:
    """The sentence; None for another error, and for one within the user's own step.

    Args:
        error: What ended the run.

    Example:
        >>> import torch
        >>> try:
        ...     torch.ones(2, requires_grad=True).exp().backward()
        ... except RuntimeError as error:
        ...     about_loss(error)
        'the loss that training_step returns is not one number; take its mean, as with reduction="mean".'
    """
    frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if not isinstance(error, RuntimeError) or "training_step" in frames:
        return None
    cause = next((cause for said, cause in _CAUSES.items() if said in str(error)), None)
    return cause and f"the loss that training_step returns {cause}"
