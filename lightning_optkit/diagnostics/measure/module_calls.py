# SPDX-License-Identifier: Apache-2.0
"""Calls of modules, seen without a hook of their own.

A hook on a module switches the fast path of `nn.TransformerEncoder` off, which computes something else where a mask
pads, and is copied and pickled with the module. So these are torch's hooks for every module, and pass over others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["ModuleCalls"]


class ModuleCalls:
    """Tells of the calls of modules from its creation on, until `close`.

    Args:
        modules: Modules by name, as of `named_modules()`; the root, of name "", is left out, and so is TorchScript.
        before: Called with name, module and positional arguments, before hooks of the module change these.
        after: Called with these, as its hooks left them, and the output, before hooks of the module see that.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        before: Callable[[str, nn.Module, Any], None] | None = None,
        after: Callable[[str, nn.Module, Any, Any], None] | None = None,
    ) -> None:
        self._before, self._after, self._modules = before, after, modules  # held, so that no other gets an id of theirs
        self._names = {
            id(module): name
            for name, module in modules.items()
            if name and not isinstance(module, torch.jit.ScriptModule)
        }
        self._handles = [] if before is None else [register_module_forward_pre_hook(self._enter)]
        self._handles += [] if after is None else [register_module_forward_hook(self._leave)]

    def close(self) -> None:
        """Removes the hooks; no-op the second time."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))
        if name is not None and self._before is not None:
            self._before(name, module, args)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        name = self._names.get(id(module))
        if name is not None and self._after is not None:
            self._after(name, module, args, output)
