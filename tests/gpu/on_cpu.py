# SPDX-License-Identifier: Apache-2.0
"""Runs CUDA tests without a GPU: their tensors go to the CPU, and GPU-only parts are skipped."""

import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


def _on_cpu(value):
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return "cpu"
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        args = tuple(_on_cpu(value) for value in args)
        return func(*args, **{key: _on_cpu(value) for key, value in (kwargs or {}).items()})


@contextlib.contextmanager
def dry_run(skip):
    """The device "cuda" is the CPU; `skip(reason)` ends a test that needs streams, graphs or much memory."""

    def absent(*args, **kwargs):
        skip("a dry run has neither streams nor graphs")

    def nothing(*args):
        pass

    replaced = {
        "Stream": absent, "CUDAGraph": absent, "synchronize": nothing, "set_sync_debug_mode": nothing,
        "mem_get_info": lambda: (0, 0),
    }  # fmt: skip
    with _OnCpu(), contextlib.ExitStack() as patches:
        for name, value in replaced.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, value))
        yield
