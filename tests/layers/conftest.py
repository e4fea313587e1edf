# SPDX-License-Identifier: Apache-2.0
"""What the tests of the four layers share."""

import sys
from pathlib import Path

import pytest

from lightning_optkit._native import extension, node
from lightning_optkit.layers import _dispatch

sys.path.insert(0, str(Path(__file__).parent))
from norm_cases import never_small


@pytest.fixture(params=["node in C++", "node in Python"] if node is not None else ["node in Python"])
def always_ours(request, monkeypatch):
    """No input is small: every call takes a kernel of ours, by either road."""
    if request.param == "node in Python":
        monkeypatch.setattr(_dispatch, "node", None)
    never_small(monkeypatch)


@pytest.fixture(params=extension.cpu_isas() if extension else [])
def isa(request):
    """Each instruction set that this processor has."""
    before = extension.cpu_isa()
    extension.use_cpu_isa(request.param)
    yield request.param
    extension.use_cpu_isa(before)
