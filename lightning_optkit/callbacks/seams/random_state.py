# SPDX-License-Identifier: Apache-2.0
"""The random generators of a training run, as tensors and plain types."""

import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

__all__ = ["get_random_state", "seed_of_process", "set_random_state", "set_seed_of_process"]

_SEED = "PL_GLOBAL_SEED"  # of seed_everything: Lightning gives it to the samplers of every loader that it makes


def get_random_state(loaders: Iterable[object], device: torch.device) -> dict[str, Any]:
    """The states of Python, NumPy, torch on CPU, torch on `device` if it is CUDA, and of loaders and their samplers."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "loaders": [generator.get_state() for generator in own_generators(loaders)],
        "seeds": [sampler.seed for sampler in _seeded(loaders)],
        "seed": seed_of_process(),
    }


def set_random_state(state: dict[str, Any], loaders: Iterable[object], device: torch.device) -> None:
    """Restores the result of `get_random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    for generator, saved in zip(own_generators(loaders), state["loaders"], strict=True):
        generator.set_state(saved.cpu())
    for sampler, seed in zip(_seeded(loaders), state.get("seeds", ()), strict=False):
        sampler.seed = seed
    if "seed" in state:  # of older versions no checkpoint has it
        set_seed_of_process(state["seed"])


def seed_of_process() -> str | None:
    """The seed that loaders made from now on get; None if there is none."""
    return os.environ.get(_SEED)


def set_seed_of_process(seed: str | None) -> None:
    """Sets what `seed_of_process` returns."""
    if seed is None:
        os.environ.pop(_SEED, None)
    else:
        os.environ[_SEED] = seed


def own_generators(loaders: Iterable[object]) -> Iterator[torch.Generator]:
    """Each generator once: a DataLoader passes its own to the sampler it creates."""
    seen = set()
    for loader in loaders:
        sampler, batches = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
        for owner in (loader, sampler, batches, getattr(batches, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator) and id(generator) not in seen:
                seen.add(id(generator))
                yield generator


def _seeded(loaders: Iterable[object]) -> list[Any]:
    """Samplers that use a seed and the epoch: Lightning seeds them from the process that starts a run."""
    samplers = [getattr(loader, "sampler", None) for loader in loaders]
    return [sampler for sampler in samplers if isinstance(sampler, DistributedSampler)]
