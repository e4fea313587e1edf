# SPDX-License-Identifier: Apache-2.0
"""Runs a model without side effects."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_optkit._torch_private import AnyBatchNorm, own_buffers

__all__ = ["probing", "run_forward"]


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Disables autograd; restores modes, buffers and torch's random state afterwards.

    Inside, the model is in eval mode (dropout off), except that BatchNorm normalizes with the batch, as in training;
    SyncBatchNorm does not, since it would wait for other ranks. FSDP2 modules are resharded on exit: after a forward,
    the root keeps its parameters unsharded.
    """
    modes = [(module, module.training) for module in model.modules()]
    # Saves both the objects and their contents: a forward may write into a buffer or replace it.
    buffers = [(module, dict(own_buffers(module))) for module in model.modules() if own_buffers(module)]
    contents = [
        (b, b.detach().clone()) for _, held in buffers for b in held.values() if b is not None and not b.is_meta
    ]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for module, _ in modes:
            module.training = isinstance(module, AnyBatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        # Not inference_mode: autograd could not use tensors that a forward caches.
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
            reshard: Any = getattr(module, "reshard", None)
            if reshard is not None:
                reshard()
        for module, held in buffers:
            own_buffers(module).clear()
            own_buffers(module).update(held)
        with torch.no_grad():
            for buffer, content in contents:
                buffer.copy_(content)


def run_forward(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], object] | None) -> None:
    """Calls `forward(model, batch)`, by default `model(batch)`."""
    if forward is None:
        model(batch)
    else:
        forward(model, batch)
