# SPDX-License-Identifier: Apache-2.0
"""The folder of a user, in which a command finds the user's module."""

import sys

import pytest


@pytest.fixture
def users_net(tmp_path, monkeypatch):
    """users_net(source) writes the module users_net into the current folder, an empty one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Python takes the bytecode of another source with the same length and the same second for its own.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "users_net", raising=False)
    yield (tmp_path / "users_net.py").write_text
    sys.modules.pop("users_net", None)
