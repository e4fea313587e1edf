# SPDX-License-Identifier: Apache-2.0
"""What of a callback is copied and pickled: its arguments and what it learned, never the run that it is in."""

from typing import Any

__all__ = ["RunFree"]

_LIGHTNINGS = ("log", "log_dict")  # bound methods of the module, which Lightning puts into every callback


class RunFree:
    """A copy or a pickle holds no trainer, module, optimizer or loader, whenever it is made, and can be fitted.

    The callbacks derive from it, and so does what they keep such things in.
    """

    def _forget(self) -> None:
        """Sets what belongs to a run to what it is before one.

        By assignment only, since this is called on a copy that shares its values with the original. What was learned
        stays; what would go with the run is put aside first.
        """

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        free = object.__new__(type(self))
        vars(free).update({name: value for name, value in vars(self).items() if name not in _LIGHTNINGS})
        free._forget()
        return vars(free)
