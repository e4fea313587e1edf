# SPDX-License-Identifier: Apache-2.0
"""Drops residual branches of an unchanged module at random, later ones more often."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_optkit._checks import check_bools, check_in, check_pattern, check_whole
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.named_modules import first_tensor, modules_named, with_first
from lightning_optkit.callbacks.seams.refusals import refuse_listed_twice
from lightning_optkit.regularization.stochastic_depth import linear_drop_rates, stochastic_depth

__all__ = ["StochasticDepth"]


class StochasticDepth(FitCallback):
    """In training, zeroes the output of every branch in `names` for a random fraction of the examples.

    A branch is the module whose output is added to the residual stream: name that module, not the block around it, or
    the stream itself is cut. The rate grows linearly with depth, from `p / L` for the first of L branches to `p` for
    the last, in the order of the module tree; kept outputs are scaled up. Validation and test use every branch.

    If a block has several branches (attention and feed-forward), use one callback for each, so that the rates of each
    range from `p / L` to `p`.

    Args:
        names: Shell pattern of the branches, e.g. "blocks.*.mlp"; `*` does not match a dot.
        p: Drop rate of the last branch, in (0, 1); 0.5 for deep residual nets, 0.1 to 0.3 for transformers.
        batch_dim: Dimension of the examples in their outputs.
        verbose: Print the branches and their rates when training starts.

    Raises:
        ValueError: for an argument out of range; when the fit starts, if no module has such a name.

    Cost: one random number per example and branch, a read and a write of its output; the branch is computed anyway.

    Source: Huang et al. 2016, arXiv:1603.09382, Section 3.

    Example:
        >>> depth = StochasticDepth("encoder.layers.*.linear2", p=0.1)
        >>> trainer = pl.Trainer(callbacks=[depth], logger=False, enable_checkpointing=False)
    """

    def __init__(self, names: str, p: float = 0.5, batch_dim: int = 0, verbose: bool = True) -> None:
        self.p = check_in(type(self).__name__, "p", p, "(0, 1)")
        self.names = check_pattern(type(self).__name__, "names", names)
        check_bools(type(self).__name__, verbose=verbose)
        self.batch_dim, self._verbose = check_whole(type(self).__name__, "batch_dim", batch_dim), verbose
        self.rates: dict[str, float] = {}

    # --- hooks, in the order Lightning calls them ---

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        refuse_listed_twice(self, trainer)
        branches = modules_named(type(self).__name__, "names", pl_module, self.names)
        self.rates = dict(zip(branches, linear_drop_rates(len(branches), self.p), strict=True))
        for name, branch in branches.items():
            self._at_end(branch.register_forward_hook(self._drop(name)).remove)
        if self._verbose:
            listed = ", ".join(f"{name} {rate:.3g}" for name, rate in self.rates.items())
            rank_zero_info(f"StochasticDepth: {listed}")

    # --- implementation ---

    def _drop(self, name: str) -> Callable[..., Any]:
        rate = self.rates[name]

        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not module.training:
                return None
            first = first_tensor(type(self).__name__, name, output)
            return with_first(output, stochastic_depth(first, rate, self.batch_dim))

        return hook
