# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of SafeCheckpointIO: saving, loading, and a flipped bit."""

import sys
from pathlib import Path

from lightning_optkit.callbacks import SafeCheckpointIO

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
import torture

CONTENT = torture.content(3)


def save(path, number=3):
    SafeCheckpointIO().save_checkpoint(torture.content(number), path)
    return path


def load(path, **kwargs):
    return SafeCheckpointIO(**kwargs).load_checkpoint(path, weights_only=True)


def bend(path):
    """Flips a bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())
