# SPDX-License-Identifier: Apache-2.0
"""Saving and loading a checkpoint: SafeCheckpointIO against Lightning's own plugin, in turn, in a folder given or made.

Usage: python benchmarks/bench_checkpoints.py [--mb 64] [--seconds 10] [--folder .]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from harness import environment, interleaved
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_optkit.callbacks import SafeCheckpointIO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=64, help="size of the checkpoint")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for saving, and for loading")
    parser.add_argument("--folder", type=Path, help="where to write; default: a folder for temporary files")
    given = parser.parse_args()
    checkpoint = {"state_dict": {str(number): torch.randn(1 << 18) for number in range(given.mb)}}
    plugins = {"SafeCheckpointIO": SafeCheckpointIO(), "Lightning": TorchCheckpointIO()}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        paths = {name: Path(folder) / f"{name}.ckpt" for name in plugins}

        def save(name: str) -> None:
            plugins[name].save_checkpoint(checkpoint, paths[name])

        def load(name: str) -> None:
            plugins[name].load_checkpoint(paths[name])

        for what, call in (("save", save), ("load", load)):
            times = interleaved({name: lambda name=name, call=call: call(name) for name in plugins}, given.seconds)
            for name, measured in times.items():
                row = {"benchmark": "checkpoints", "what": what, "plugin": name, "mb": given.mb}
                print(json.dumps({**row, "median_ms": round(1e3 * statistics.median(measured), 1), **environment()}))


if __name__ == "__main__":
    main()
