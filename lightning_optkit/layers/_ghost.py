# SPDX-License-Identifier: Apache-2.0
"""Ghost batch normalization, common to every number of dimensions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_optkit._checks import check_bools, check_home, check_in, check_int, check_tensor
from lightning_optkit._torch_private import AnyBatchNorm

__all__ = ["check_batch", "check_batch_norm", "ghost_batch_norm", "ghost_sizes"]


def check_batch_norm(
    owner: str,
    num_features: int,
    eps: float,
    momentum: float | None,
    affine: bool,
    track_running_stats: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> None:
    """Raises unless torch's BatchNorm accepts these arguments.

    Raises:
        TypeError: for an argument of a wrong type.
        ValueError: for an argument out of range.
    """
    check_int(owner, "num_features", num_features, minimum=1)
    check_in(owner, "eps", eps, "[0, inf)")
    if momentum is not None:
        check_in(owner, "momentum", momentum, "[0, 1]")
    check_bools(owner, affine=affine, track_running_stats=track_running_stats)
    check_home(owner, device, dtype)


def check_batch(owner: str, input: Tensor, num_features: int, dims: tuple[int, ...]) -> None:
    """Raises unless `input` has one of the numbers of dimensions, and `num_features` channels in the second.

    Raises:
        TypeError: if it is not a floating-point tensor.
        ValueError: if its shape does not fit.
    """
    check_tensor(owner, "input", input, "floating")
    if input.dim() not in dims or input.shape[1] != num_features:
        wanted = " or ".join(f"{dim}D" for dim in dims)
        raise ValueError(
            f"{owner}(input.shape={tuple(input.shape)}): expected {wanted} input, with {num_features} channels in the "
            "second dimension."
        )


def ghost_sizes(samples: int, ghost_batch_size: int, values_per_sample: int) -> list[int]:
    """Sizes of the ghost batches: full ones, then the rest.

    A remainder with a single value per channel has no variance, so it is merged into the previous ghost batch.

    Example:
        >>> ghost_sizes(10, 4, values_per_sample=1), ghost_sizes(9, 4, values_per_sample=1)
        ([4, 4, 2], [4, 5])
    """
    full, rest = divmod(samples, ghost_batch_size)
    sizes = [ghost_batch_size] * full
    if rest * values_per_sample == 1 and sizes:
        sizes[-1] += 1
    elif rest or not sizes:
        sizes.append(rest)
    return sizes


def ghost_batch_norm(layer: AnyBatchNorm, input: Tensor, ghost_batch_size: int) -> Tensor:
    """Normalizes each ghost batch separately; the running statistics are updated once, with the mean over the parts."""
    values_per_sample = input[0, 0].numel() if input.shape[0] and input.shape[1] else 1
    sizes = ghost_sizes(input.shape[0], ghost_batch_size, values_per_sample)
    parts, means, variances = [], [], []
    for part in torch.split(input, sizes):
        # With momentum 1, torch stores the (unbiased) statistics of this part in the given tensors.
        mean = variance = None
        if layer.running_mean is not None and layer.running_var is not None:
            mean, variance = torch.zeros_like(layer.running_mean), torch.ones_like(layer.running_var)
            means.append(mean)
            variances.append(variance)
        parts.append(F.batch_norm(part, mean, variance, layer.weight, layer.bias, True, 1.0, layer.eps))
    if means:
        _update(layer, sizes, means, variances)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@torch.no_grad()
def _update(layer: AnyBatchNorm, sizes: list[int], means: list[Tensor], variances: list[Tensor]) -> None:
    assert layer.running_mean is not None and layer.running_var is not None
    factor: float | Tensor = 0.0 if layer.momentum is None else layer.momentum
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:  # torch's cumulative average
            factor = 1.0 / layer.num_batches_tracked.to(layer.running_mean.dtype)
    shares = torch.tensor(sizes, device=means[0].device, dtype=means[0].dtype)[:, None] / sum(sizes)
    for running, of_parts in ((layer.running_mean, means), (layer.running_var, variances)):
        mean = (torch.stack(of_parts) * shares).sum(0)
        running.copy_(running * (1.0 - factor) + mean * factor)
