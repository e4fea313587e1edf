# SPDX-License-Identifier: Apache-2.0
"""What `optkit demo` says without its data; the rest is in tests/integration/test_demo.py."""

import sys
from pathlib import Path

import pytest

from lightning_optkit.cli import main


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match=r"^optkit demo needs scikit-learn for its data: pip install scikit-learn\.$"):
        main(["demo", "--fast"])


@pytest.mark.parametrize("report", ["/dev/null/demo.html", "/proc/demo.html"])
def test_a_report_that_cannot_be_written_is_refused_before_the_training(monkeypatch, capsys, report):
    monkeypatch.setattr("lightning_optkit.cli.demo_command.digits", lambda: pytest.fail("the training has begun"))
    if not Path(report).parent.exists():
        pytest.skip(f"no {Path(report).parent} here")
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["demo", "--fast", "--report", report])
    assert capsys.readouterr().err.startswith(f"optkit demo: --report {report}: {Path(report).parent} ")
