# SPDX-License-Identifier: Apache-2.0
"""Makes callbacks copyable and picklable: with their arguments and learned state, without the run."""

from typing import Any

__all__ = ["RunFree"]

_LIGHTNINGS = ("log", "log_dict")  # bound methods of the module, which Lightning sets on every callback


class RunFree:
    """A copy or a pickle holds no trainer, module, optimizer or loader, whenever it is made, and can be fitted.

    Base of the callbacks, and of their parts that reference a run.
    """

    def _forget(self) -> None:
        """Resets what belongs to a run to its initial value.

        Only by assignment, since it is called on a copy that shares its values with the original. Learned state is
        kept; anything that would be lost with the run must be saved first.
        """

    def __getstate__(self) -> dict[str, Any]:
        """The state for pickle and deepcopy."""
        free = object.__new__(type(self))
        vars(free).update({name: value for name, value in vars(self).items() if name not in _LIGHTNINGS})
        free._forget()
        return vars(free)
