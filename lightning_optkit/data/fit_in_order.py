# SPDX-License-Identifier: Apache-2.0
"""Fits a chain of transforms stage by stage, each on the output of the previous stages."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lightning_optkit._checks import check_bools, check_instance, iterate

__all__ = ["fit_in_order"]


@torch.no_grad()
def fit_in_order(
    chain: nn.Sequential, batches: Iterable[Any], *, across_ranks: bool = False, keep_fitted: bool = False
) -> nn.Sequential:
    """Fits every stage of `chain` that has `partial_fit`, in order; other stages are only applied.

    Args:
        chain: Transforms and ordinary modules; fitted in place.
        batches: Training batches, the input of the first stage. Read once per fitted stage, so it must be re-iterable:
            a list or a DataLoader, not a generator. The order does not matter.
        across_ranks: Whether to combine every stage over all processes before the next is fitted; all ranks must then
            call this.
        keep_fitted: Whether already fitted stages are only applied.

    Returns:
        `chain`.

    Raises:
        ValueError: if no stage has `partial_fit`, or several are fitted and `batches` is an iterator.

    Cost: one pass over the data per fitted stage.

    Example:
        >>> from lightning_optkit.data import Impute, Standardize
        >>> chain = nn.Sequential(Impute(), Standardize())
        >>> fit_in_order(chain, [torch.tensor([[1.0], [torch.nan]]), torch.tensor([[3.0]])])(torch.tensor([[2.0]]))
        tensor([[0.]])
    """
    check_instance("fit_in_order", "chain", chain, nn.Sequential, "a chain such as nn.Sequential(Standardize())")
    check_bools("fit_in_order", across_ranks=across_ranks, keep_fitted=keep_fitted)
    fittable = [i for i, stage in enumerate(chain) if hasattr(stage, "partial_fit")]
    if not fittable:
        raise ValueError("fit_in_order(chain): at least one stage must have partial_fit, as Standardize has.")
    fitted = [i for i in fittable if not (keep_fitted and chain[i].fitted)]
    if len(fitted) > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"fit_in_order(batches={type(batches).__name__}): must be readable {len(fitted)} times, once per fitted "
            "stage; pass a list or a DataLoader."
        )
    for i in fitted:
        stage: Any = chain[i]
        reading = iterate("fit_in_order", "batches", batches, "a list of batches or a DataLoader")
        stage.fit(map(chain[:i], reading), across_ranks=across_ranks)
    return chain
