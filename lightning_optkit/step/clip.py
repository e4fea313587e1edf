# SPDX-License-Identifier: Apache-2.0
"""The interface of a gradient clip in the one-pass step."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["NO_BOUNDS", "Clip", "ClipBounds", "StatefulClip"]


@dataclass(frozen=True)
class ClipBounds:
    """The bounds of a clip besides the global norm; inf: none.

    Args:
        max_value: Largest magnitude of an element, after scaling.
        max_tensor_norm: Largest L2 norm of one tensor's gradient.
        unit_ratio: Largest L2 norm of one unit's gradient relative to that of its parameters. A unit is a row of the
            first dimension; a tensor of fewer than two dimensions is one unit.
        unit_eps: Lower bound of the parameter norm in that ratio.

    Example:
        >>> ClipBounds(max_tensor_norm=1.0).limits_parts, ClipBounds(max_value=1.0).limits_parts
        (True, False)
    """

    max_value: float = math.inf
    max_tensor_norm: float = math.inf
    unit_ratio: float = math.inf
    unit_eps: float = 0.0

    @property
    def limits_parts(self) -> bool:
        """Whether it scales tensors or units separately."""
        return math.isfinite(self.max_tensor_norm) or math.isfinite(self.unit_ratio)


NO_BOUNDS = ClipBounds()
"""The bounds of a clip by the global norm alone (one object: every step asks for them several times)."""


class Clip(ABC):
    """A gradient clip that the step can apply (see `lightning_optkit.clipping`).

    An abstract class, like `Average`, since LightningCLI finds the class named in a file by its bases.

    Example:
        >>> import torch
        >>> class Halve(Clip):
        ...     needs_norm, bounds = True, ClipBounds()
        ...
        ...     def norm_bound(self, norm):
        ...         return norm / 2
        >>> from lightning_optkit.optimizers import SGD
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = SGD([weight], lr=1.0, clip=Halve())
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.5000])
    """

    @property
    @abstractmethod
    def needs_norm(self) -> bool:
        """Whether the gradients are read before the step, for the global norm or to detect non-finite values."""

    @property
    @abstractmethod
    def bounds(self) -> ClipBounds:
        """The other bounds."""

    @property
    def constant_bound(self) -> float | None:
        """Bound of the global norm, if it is the same in every step; then `norm_bound` is not called on the host."""
        return None

    @abstractmethod
    def norm_bound(self, norm: Tensor) -> Tensor | float:
        """Bound of the global norm for this step, given the norm after unscaling.

        Called once per step, so a clip may update its own state here. `norm` is 0-d; on CUDA it must not be
        synchronized on. It is NaN in a step that will be skipped.
        """


@runtime_checkable
class StatefulClip(Protocol):
    """The additional interface of a clip that depends on past gradients, as `AutoClip` does.

    Example:
        >>> from lightning_optkit.clipping import AutoClip, ClipNorm
        >>> isinstance(AutoClip(10), StatefulClip), isinstance(ClipNorm(1.0), StatefulClip)
        (True, False)
    """

    def state_dict(self) -> dict[str, Any]:
        """Its state, in tensors and plain types."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state."""
        ...
