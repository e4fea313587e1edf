# SPDX-License-Identifier: Apache-2.0
"""`optkit completion`: a script that a shell can read, and that completes commands and options."""

import shutil
import subprocess
import sys

import pytest

from lightning_optkit.cli import main

TRY = """
source optkit.bash
for line in "$@"; do
    read -ra COMP_WORDS <<< "$line"
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 )); COMPREPLY=()
    _shtab_optkit
    echo "${COMPREPLY[*]}"
done
"""


def test_bash_completes_commands_options_and_choices(tmp_path, capsys, monkeypatch):
    pytest.importorskip("shtab")
    monkeypatch.setattr(sys, "argv", ["somewhere/lightning_optkit/__main__.py"])  # whoever asks, the word is optkit
    main(["completion", "bash"])
    (tmp_path / "optkit.bash").write_text(capsys.readouterr().out)
    lines = ["optkit plot", "optkit demo --", "optkit completion z", "optkit test --c", "optkit doctor --m"]
    words = [shutil.which("bash"), "-c", TRY, "try", *lines]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == [
        "plot-schedule", "--help --fast --report", "zsh", "--config --ckpt_path", "--max_steps --max_seconds",
    ]  # fmt: skip


def test_without_shtab_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stopped:
        main(["completion", "zsh"])
    assert stopped.value.code == "optkit completion needs shtab: pip install shtab."
    with pytest.raises(SystemExit) as refused:
        main(["completion", "fish"])
    assert refused.value.code == 2 and "fish" in capsys.readouterr().err
