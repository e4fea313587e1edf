# SPDX-License-Identifier: Apache-2.0
"""Attention and encoders of torch compute by another path in eval mode, unless a TorchFunctionMode is entered.

The two give other numbers: where a mask pads, the fast one gives zeros. So what only watches is left for such a call.
"""

import threading
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_optkit._torch_private import entered_function_modes, pop_function_mode, push_function_mode

__all__ = ["WatchingMode"]

_WITH_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class _Aside(threading.local):
    """The modes of this thread that are left for a call, by call."""

    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, list[TorchFunctionMode]]] = []


_aside = _Aside()


class WatchingMode(TorchFunctionMode):
    """A TorchFunctionMode that is left, with others of this class, while torch may compute by a fast path."""

    def __init__(self) -> None:
        super().__init__()
        self._handles: list[tuple[RemovableHandle, RemovableHandle]] = []  # by entry, of which there may be several

    def __enter__(self) -> "WatchingMode":
        after = register_module_forward_hook(_enter_modes, always_call=True)
        self._handles.append((register_module_forward_pre_hook(_leave_modes), after))
        push_function_mode(self)
        return self

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles.pop():
            handle.remove()
        while _aside.calls:  # an interrupted call has no end
            _enter_last()
        pop_function_mode()


def _leave_modes(module: nn.Module, args: Any) -> None:
    if not isinstance(module, _WITH_FAST_PATH) or not _may_be_fast(module):
        return
    left: list[TorchFunctionMode] = []
    for mode in reversed(entered_function_modes()):
        if not isinstance(mode, WatchingMode):  # the user's, with which there is no fast path
            break
        left.append(mode)
        pop_function_mode()
    if left:
        _aside.calls.append((module, left))


def _enter_modes(module: nn.Module, args: Any, output: Any) -> None:
    if _aside.calls and _aside.calls[-1][0] is module:
        _enter_last()


def _enter_last() -> None:
    for mode in reversed(_aside.calls.pop()[1]):
        push_function_mode(mode)


def _may_be_fast(module: nn.Module) -> bool:
    """Whether one in it is in eval mode, and not all of it is trained."""
    if all(each.training for each in module.modules() if isinstance(each, _WITH_FAST_PATH)):
        return False
    return not torch.is_grad_enabled() or not all(p.requires_grad for p in module.parameters())
