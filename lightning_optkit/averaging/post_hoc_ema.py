# SPDX-License-Identifier: Apache-2.0
"""The average of any length, computed after the run from stored ones of two lengths.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
Section 3.2 and Appendix C.3-C.4: the combination of the stored averages whose profile is closest, by least squares, to
the wanted one.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_instance, check_int, check_listed, check_path, shown
from lightning_optkit.averaging.average_checkpoints import Checkpoint, Mean, check_output, read_weights, write_output
from lightning_optkit.averaging.power_ema import power_exponent

__all__ = ["PowerSnapshot", "post_hoc_coefficients", "post_hoc_ema", "snapshot_name", "stored_snapshots"]

_NAME = r"power_ema-std=([\d.e-]+)-num_averaged=(\d+)\.pt"


@dataclass(frozen=True)
class PowerSnapshot:
    """A stored `PowerEMA`.

    Args:
        checkpoint: A checkpoint file or a state dict, with the average as its weights.
        std: `PowerEMA.std` of the average.
        num_averaged: Number of its updates when it was stored, at least 1.

    Raises:
        ValueError: for an argument out of range.
    """

    checkpoint: Checkpoint
    std: float
    num_averaged: int

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_instance(owner, "checkpoint", self.checkpoint, (str, os.PathLike, Mapping), "a file or a state dict")
        check_in(owner, "std", self.std, "[1e-4, 0.288]")
        check_int(owner, "num_averaged", self.num_averaged, minimum=1)


def snapshot_name(std: float, num_averaged: int) -> str:
    """The name of the file of a stored average.

    Example:
        >>> snapshot_name(0.05, 1000)
        'power_ema-std=0.05-num_averaged=1000.pt'
    """
    return f"power_ema-std={std!r}-num_averaged={num_averaged}.pt"


def stored_snapshots(dirpath: str | os.PathLike[str]) -> list[PowerSnapshot]:
    """The averages that the callback `PowerSnapshots` wrote to a folder, in the order of their updates.

    Args:
        dirpath: The folder.

    Returns:
        For `post_hoc_ema`; the files themselves are read there.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it contains no stored average.
    """
    folder = check_path("stored_snapshots", "dirpath", dirpath, exists=True, kind="folder")
    matches = [(re.fullmatch(_NAME, path.name), path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    found = [PowerSnapshot(path, float(match[1]), int(match[2])) for match, path in matches if match]
    if not found:
        raise ValueError(
            f"stored_snapshots(dirpath={str(folder)!r}): it must be a folder with files of PowerSnapshots."
        )
    return sorted(found, key=lambda each: (each.num_averaged, each.std))


def post_hoc_coefficients(
    snapshots: Sequence[tuple[float, int]], std: float, num_averaged: int | None = None
) -> list[float]:
    r"""The coefficients, with sum 1, of stored power-function averages in the average of `std`.

    They minimize the squared difference of the profiles
    :math:`p(\tau) = (\gamma + 1)\, \tau^\gamma / t^{\gamma + 1}` on (0, t), in fp64.

    Args:
        snapshots: `std` and number of updates t of each; at least one.
        std: The wanted relative standard deviation, in [1e-4, 0.288].
        num_averaged: The wanted t. Default: the largest of the snapshots.

    Raises:
        ValueError: for a number out of range.

    Example:
        >>> [round(c, 3) for c in post_hoc_coefficients([(0.05, 1000), (0.1, 1000)], std=0.1)]
        [0.0, 1.0]
    """
    pairs = "a list such as [(0.05, 1000), (0.1, 1000)]"
    stored = check_listed("post_hoc_coefficients", "snapshots", snapshots, pairs)
    for pair in stored:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"post_hoc_coefficients(snapshots=[..., {shown(pair)}]): snapshots must be {pairs}.")
        check_in("post_hoc_coefficients", "snapshots", pair[0], "[1e-4, 0.288]")
        check_int("post_hoc_coefficients", "snapshots", pair[1], minimum=1)
    check_in("post_hoc_coefficients", "std", std, "[1e-4, 0.288]")
    end = max(count for _, count in stored) if num_averaged is None else num_averaged
    check_int("post_hoc_coefficients", "num_averaged", end, minimum=1)
    gram = [[_product(a, b) for b in stored] for a in stored]
    wanted = [[_product(a, (std, end))] for a in stored]
    # Snapshots that are nearly the same have a nearly singular matrix, which this driver may have.
    matrix, right = torch.tensor(gram, dtype=torch.float64), torch.tensor(wanted, dtype=torch.float64)
    solution = torch.linalg.lstsq(matrix, right, driver="gelsd").solution[:, 0]
    return [float(c) for c in solution / solution.sum()]


@torch.no_grad()
def post_hoc_ema(
    snapshots: Sequence[PowerSnapshot],
    std: float,
    num_averaged: int | None = None,
    output: str | os.PathLike[str] | None = None,
) -> dict[str, Tensor]:
    """The weights that `PowerEMA(std)` would have, computed from stored averages of other lengths.

    Train with two of them, store both now and then (16 times or more, evenly), and choose `std` afterwards:

        short, long = WeightAveraging(PowerEMA(0.05)), WeightAveraging(PowerEMA(0.1), evaluate=False)

    The callback `PowerSnapshots` stores them, and `stored_snapshots` lists them. The result is close where 0.05 <=
    `std` <= 0.2 or so; one snapshot of each length gives an average of either length alone.

    Args:
        snapshots: The stored averages, of any lengths and times; at least one.
        std: The wanted relative standard deviation, in [1e-4, 0.288].
        num_averaged: Number of updates at which the wanted average ends. Default: the largest of the snapshots.
        output: See `average_checkpoints`.

    Returns:
        A state dict on CPU: floating-point entries are summed in fp64 and returned in their own dtype, others are those
        of the last snapshot.

    Raises:
        TypeError: if they are not a list of `PowerSnapshot`.
        FileNotFoundError: if a file does not exist.
        ValueError: if a number is out of range, or names or shapes differ.

    Cost: one read of each snapshot, which are in memory one at a time.

    Example:
        >>> stored = [PowerSnapshot({"w": torch.tensor([float(t)])}, std=0.1, num_averaged=t) for t in (500, 1000)]
        >>> post_hoc_ema(stored, std=0.1)
        {'w': tensor([1000.])}
    """
    listed = check_listed("post_hoc_ema", "snapshots", snapshots, "a list of PowerSnapshot")
    for each in listed:
        check_instance("post_hoc_ema", "snapshots", each, PowerSnapshot, "a list of PowerSnapshot")
    check_in("post_hoc_ema", "std", std, "[1e-4, 0.288]")
    if num_averaged is not None:
        check_int("post_hoc_ema", "num_averaged", num_averaged, minimum=1)
    target = check_output("post_hoc_ema", output)
    coefficients = post_hoc_coefficients([(each.std, each.num_averaged) for each in listed], std, num_averaged)
    match = Mean("post_hoc_ema", listed[0].checkpoint, "snapshots")
    total: dict[str, Tensor] = {}
    for number, (each, coefficient) in enumerate(zip(listed, coefficients, strict=True), start=1):
        weights = read_weights("post_hoc_ema", "snapshots", each.checkpoint)
        match.check(weights, each.checkpoint, number)
        for name, value in weights.items():
            if value.dtype.is_floating_point or value.dtype.is_complex:
                part = value.detach().to(torch.promote_types(value.dtype, torch.float64)) * coefficient
                total[name] = total[name] + part if name in total else part
    last = {name: total[name].to(value.dtype) if name in total else value.clone() for name, value in weights.items()}
    if target is not None:
        write_output("post_hoc_ema", target, listed[-1].checkpoint, last)
    return last


def _product(a: tuple[float, int], b: tuple[float, int]) -> float:
    """The integral of the product of two profiles, up to the earlier end."""
    (first, early), (second, late) = sorted((a, b), key=lambda each: each[1])
    low, high = power_exponent(first), power_exponent(second)
    return float((low + 1) * (high + 1) / (low + high + 1) * (early / late) ** high / late)
