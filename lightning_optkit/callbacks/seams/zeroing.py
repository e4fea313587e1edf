# SPDX-License-Identifier: Apache-2.0
"""Whether the gradients that a step used are cleared before its next one, however the module clears them.

One small gradient per optimizer is watched, from one step to the next. It is cleared when it is another object
(`set_to_none=True`, the default), or when a backward pass begins and it is zero. With several optimizers, a backward
pass of another one may find it as it was; so the judgement is left to the next step, and needs at least one backward
pass that began in between.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Zeroing"]


@dataclass
class _Used:
    param: Tensor
    grad: Tensor
    looks: int = 0
    is_cleared: bool = False


class Zeroing:
    """The optimizers of one fit; `not_zeroed` has the step of the first gradient that was not cleared."""

    def __init__(self) -> None:
        self._used: dict[Optimizer, _Used] = {}
        self.is_watching = False  # until then there is nothing to look at before a backward pass
        self.not_zeroed: dict[str, int] = {}

    def before_backward(self) -> None:
        """Looks at the gradients that former steps used."""
        for used in self._used.values():
            if not used.is_cleared:
                # A value is read only if the very same tensor is still there, as with `zero_grad(set_to_none=False)`.
                used.is_cleared = used.param.grad is not used.grad or not bool((used.grad != 0).any())
                used.looks += 1

    def after_step(self, optimizer: Optimizer, step: int, remember: bool) -> None:
        """Judges the gradient of its former step, if one was remembered; and remembers one of this on request."""
        used = self._used.pop(optimizer, None)
        name = type(optimizer).__name__
        if used is not None and used.looks and not used.is_cleared and used.param.grad is used.grad:
            self.not_zeroed.setdefault(name, step)
        if remember and name not in self.not_zeroed and (watched := _smallest(optimizer)) is not None:
            self._used[optimizer] = watched
        self.is_watching = bool(self._used)


def _smallest(optimizer: Optimizer) -> _Used | None:
    """Of the last parameters of each group that have a gradient, the one with fewest elements: a head's bias, say."""
    last = [p for group in optimizer.param_groups for p in group["params"][-2:]]
    with_grad = [(p, p.grad) for p in last if p.grad is not None and not p.grad.is_sparse]
    return _Used(*min(with_grad, key=lambda pair: pair[0].numel())) if with_grad else None
