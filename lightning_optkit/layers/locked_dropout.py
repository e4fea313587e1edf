# SPDX-License-Identifier: Apache-2.0
"""Variational dropout: one mask for all time steps of a sequence.

Source: Gal & Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks"
(arXiv 1512.05287); with DropConnect in LSTMs: Merity, Keskar & Socher 2018 (arXiv 1708.02182).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optkit._checks import check_bools, check_in, check_tensor

__all__ = ["LockedDropout"]


class LockedDropout(nn.Module):
    """Dropout that zeroes the same features at every time step of a sequence, and others in the next sequence.

    In evaluation mode, and for `p=0`, it returns the input.

    Args:
        p: Probability that a feature is zeroed, in [0, 1]; kept features are scaled up. May be changed at any time.
        batch_first: Whether inputs are (batch, time, features) rather than (time, batch, features), as in `nn.LSTM`.
            A 2-d input is one sequence, (time, features).

    Raises:
        TypeError: if `p` is not a number.
        ValueError: if `p` is out of range; in `forward`, if the input has neither two nor three dimensions.

    Example:
        >>> y = LockedDropout(0.5, batch_first=True)(torch.ones(2, 7, 4))
        >>> bool((y == y[:, :1]).all())
        True
    """

    def __init__(self, p: float = 0.5, batch_first: bool = False) -> None:
        super().__init__()
        check_bools(type(self).__name__, batch_first=batch_first)
        self.p = check_in(
            type(self).__name__, "p", p, "[0, 1]"
        )  # checked here: nn.Module would register a module passed by mistake
        self.batch_first = batch_first

    @property
    def p(self) -> float:
        """Probability that a feature is zeroed."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = check_in(type(self).__name__, "p", value, "[0, 1]")

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x` with some features zeroed."""
        check_tensor(type(self).__name__, "x", x, "floating")
        if x.dim() not in (2, 3):
            raise ValueError(
                f"{type(self).__name__}(x.shape={tuple(x.shape)}): x must be sequences of three dimensions, or "
                "one of two."
            )
        if not self.training or self._p == 0.0:
            return x
        time = 1 if self.batch_first and x.dim() == 3 else 0
        ones = torch.ones_like(x.select(time, 0), dtype=torch.float32 if x.dtype.itemsize == 2 else x.dtype)
        return (x * F.dropout(ones, self._p).unsqueeze(time)).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"p={self._p}, batch_first={self.batch_first}"
