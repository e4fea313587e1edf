# SPDX-License-Identifier: Apache-2.0
"""The buffers in which the processes of a run differ, such as BatchNorm's running statistics under FSDP2; so may the
directions that `LookSAM` reuses.

DDP sends those of the first process before a forward pass, but not after one without its sum of gradients: within an
accumulation window, and with manual optimization never again. Averages of them it does not send.

A checkpoint has those of one process: of the first one, or in a sharded folder of any.
"""

import hashlib

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_optkit.callbacks.look_sam import LookSAM
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.weight_averaging import WeightAveraging

__all__ = ["Buffers", "are_replaced", "buffers_of", "set_buffers", "those_that_differ"]

Buffers = dict[str, Tensor]


def buffers_of(trainer: pl.Trainer) -> Buffers:
    """Copies on the CPU of the buffers that are a process's own; not of those to be replaced by the first one's."""
    if trainer.world_size == 1:
        return {}
    live, model, own = _live(trainer), trainer.strategy.model, dict(trainer.lightning_module.named_buffers())
    sends = isinstance(model, DistributedDataParallel) and model.broadcast_buffers and model.require_forward_param_sync
    # An average of them, shown in a validation, would be replaced in their place.
    if sends and live.keys() <= own.keys():
        live = {}
    for callback in callbacks_of(trainer, LookSAM):
        live |= {f"{callback.state_key} {place}": t for place, t in callback.own_direction().items()}
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in live.items()}


def are_replaced(trainer: pl.Trainer) -> bool:
    """Whether DDP sends the buffers of the first process before the next forward pass, if it is to send them at all."""
    model = trainer.strategy.model
    return not isinstance(model, DistributedDataParallel) or model.require_forward_param_sync


def set_buffers(trainer: pl.Trainer, buffers: Buffers, replaces: bool) -> None:
    """Puts values of `buffers_of` back, in place, and the result of `are_replaced`."""
    for name, buffer in _live(trainer).items() if buffers else ():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])
    if isinstance(trainer.strategy.model, DistributedDataParallel):
        trainer.strategy.model.require_forward_param_sync = replaces
    for callback in callbacks_of(trainer, LookSAM):
        start = f"{callback.state_key} "
        own = {name.removeprefix(start): value for name, value in buffers.items() if name.startswith(start)}
        callback.set_own_direction({int(place): value for place, value in own.items() if place.isdecimal()})


def those_that_differ(buffers: Buffers) -> Buffers:
    """Those that are not equal in all processes; every process calls it."""
    mine = {name: _digest(buffer) for name, buffer in buffers.items()}
    everyone: list[dict[str, bytes]] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return {name: buffer for name, buffer in buffers.items() if any(each.get(name) != mine[name] for each in everyone)}


def _live(trainer: pl.Trainer) -> Buffers:
    """The tensors themselves, those of the trained module, and the averages of them, by names of their own."""
    module, averages = trainer.lightning_module, callbacks_of(trainer, WeightAveraging)
    kept = module.state_dict()
    buffers = {name: b for name, b in module.named_buffers() if name in kept and not hasattr(b, "to_local")}
    for callback in averages:
        buffers = {name: callback.trained(buffer) for name, buffer in buffers.items()}
    for callback in averages:
        for name, state in callback.state_dict()["buffers"].items():
            held = {entry: value for entry, value in state.items() if isinstance(value, Tensor)}
            buffers |= {f"{callback.state_key} {name} {entry}": value for entry, value in held.items()}
    return buffers


def _digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).digest()
