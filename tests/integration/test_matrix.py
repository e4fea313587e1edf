# SPDX-License-Identifier: Apache-2.0
"""Rows of `make matrix`: a clip with a history, weights in two parts, and a callback that FSDP2 refuses."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_rows_are_right_or_refused(tmp_path):
    script = Path(__file__).with_name("matrix.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "AutoClip", 'Fuse(rounding="split32")', "CompressCheckpoint"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    clip, split, compressed = done.stdout.splitlines()[2:5]
    for row in (clip, split):
        assert row.count("byte-equal, 4 of 4") == 1 and "7 of 7" in row
    assert "refused: CompressCheckpoint(...): ModelParallelStrategy is not supported" in compressed
