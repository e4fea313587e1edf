# SPDX-License-Identifier: Apache-2.0
"""Rows of `make matrix`: a clip with a history, and a callback that FSDP2 refuses."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_rows_are_right_or_refused(tmp_path):
    script = Path(__file__).with_name("matrix.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "AutoClip", "CompressCheckpoint"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    clip, compressed = done.stdout.splitlines()[2:4]
    assert clip.count("byte-equal, 4 of 4") == 1 and "7 of 7" in clip
    assert "refused: CompressCheckpoint(...): ModelParallelStrategy is not supported" in compressed
