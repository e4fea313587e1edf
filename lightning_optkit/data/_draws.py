# SPDX-License-Identifier: Apache-2.0
"""The random numbers of one augmentation."""

import random
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_generator

__all__ = ["Draws"]


def _generator_of(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device)
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def _reduce_generator(generator: torch.Generator) -> tuple[Callable[..., torch.Generator], tuple[str, bytes]]:
    return _generator_of, (str(generator.device), generator.get_state().numpy().tobytes())


# torch sends a generator to a spawned process as a temporary tensor in shared memory, which is freed before the process
# starts ("bad value(s) in fds_to_keep").
ForkingPickler.register(torch.Generator, _reduce_generator)


class Draws(nn.Module):
    """Draws on the CPU from one generator, so that every device gets the same numbers, and saves the generator's state.

    Args:
        owner: Name of the augmentation, for error messages.
        generator: CPU generator. Default: a new one, seeded with 0. The global generator is never used.

    Raises:
        TypeError: if it is not a generator.
        ValueError: if the generator is not on the CPU.
    """

    def __init__(self, owner: str, generator: torch.Generator | None) -> None:
        super().__init__()
        device = getattr(generator, "device", None)
        if isinstance(device, torch.device) and device.type != "cpu":
            raise ValueError(f"{owner}(generator={device}): must be on the CPU, whatever device the batch is on.")
        given = check_generator(owner, generator)
        self.generator = torch.Generator().manual_seed(0) if given is None else given

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Numbers in [low, high), float64, on the CPU."""
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def chosen(self, x: Tensor, p: float) -> Tensor:
        """The examples of `x` to change, each with probability `p`: booleans (N, 1, ..., 1) on its device."""
        return (self.uniform(len(x)) < p).to(x.device).view(-1, *[1] * (x.dim() - 1))

    def betas(self, alpha: float, count: int) -> Tensor:
        """Numbers from Beta(alpha, alpha), (count,), float64, on the CPU."""
        numbers = random.Random(self._seed())
        return torch.tensor([numbers.betavariate(alpha, alpha) for _ in range(count)], dtype=torch.float64)

    def partners(self, x: Tensor, device: str | None = None) -> Tensor:
        """A random permutation of the examples of `x`, on its device unless another one is given."""
        return torch.randperm(len(x), generator=self.generator).to(x.device if device is None else device)

    def normal_like(self, x: Tensor) -> Tensor:
        """Standard normal noise in shape, dtype and memory format of `x`, drawn on its device."""
        on_device = torch.Generator(x.device).manual_seed(self._seed()) if x.device.type != "meta" else None
        return torch.empty_like(x).normal_(generator=on_device)

    def get_extra_state(self) -> Tensor:
        """The state of the generator, for checkpoints."""
        return self.generator.get_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Continues from a saved state."""
        self.generator.set_state(state.cpu())

    def _seed(self) -> int:
        return int(torch.randint(2**62, (1,), generator=self.generator))
