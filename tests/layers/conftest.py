# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the four norm layers."""

import sys
from pathlib import Path

import pytest

from lightning_optkit._native import extension, node
from lightning_optkit.layers import _dispatch

sys.path.insert(0, str(Path(__file__).parent))
from norm_cases import never_small


@pytest.fixture(params=["node in C++", "node in Python"] if node is not None else ["node in Python"])
def always_ours(request, monkeypatch):
    """Treats no input as small: every call takes one of our kernels, in C++ or in Python."""
    if request.param == "node in Python":
        monkeypatch.setattr(_dispatch, "node", None)
    never_small(monkeypatch)


@pytest.fixture(params=extension.cpu_isas() if extension else [])
def isa(request):
    """Each instruction set that this CPU has."""
    before = extension.cpu_isa()
    extension.use_cpu_isa(request.param)
    yield request.param
    extension.use_cpu_isa(before)
