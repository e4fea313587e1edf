# SPDX-License-Identifier: Apache-2.0
"""What `optkit demo` says without its data; the rest is in tests/integration/test_demo.py."""

import sys

import pytest

from lightning_optkit.cli import main


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"^optkit demo needs scikit-learn for its data: pip install scikit-learn\.$"):
        main(["demo", "--fast"])
