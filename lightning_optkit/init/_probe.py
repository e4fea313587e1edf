# SPDX-License-Identifier: Apache-2.0
"""Runs a model to look at it, and leaves no trace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_optkit._torch_private import AnyBatchNorm, own_buffers

__all__ = ["probing", "run_forward"]


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """No autograd; modes, buffers and torch's random state are put back afterwards.

    Inside, the model is in eval mode (dropout off), save that BatchNorm normalizes by the batch, as in training;
    SyncBatchNorm does not, since it would wait for other ranks. Modules of FSDP2 are sharded again on leaving: after a
    forward the outermost one keeps its parameters whole.
    """
    modes = [(module, module.training) for module in model.modules()]
    # Both the objects and what they hold: a forward may write into a buffer or put another in its place.
    buffers = [(module, dict(own_buffers(module))) for module in model.modules() if own_buffers(module)]
    contents = [
        (b, b.detach().clone()) for _, held in buffers for b in held.values() if b is not None and not b.is_meta
    ]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        for module, _ in modes:
            module.training = isinstance(module, AnyBatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        # Not inference_mode: tensors cached by a forward would be useless to autograd later.
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
