# SPDX-License-Identifier: Apache-2.0
"""The program of docs/distributed.md runs in two processes, goes on from its folder, and does so in one process too."""

import os
import subprocess
import sys

import pytest
import torch

from tests.integration.test_docs import ROOT, examples
from tests.workers import _OF_A_LAUNCH

SHARDED = "strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the program would take the GPUs")
def test_the_program_goes_on_from_its_folder(tmp_path):
    (program,) = examples(ROOT / "docs" / "distributed.md")
    assert SHARDED in program and "max_epochs=2" in program
    first, second = program, program.replace("max_epochs=2", "max_epochs=3")
    one = program.replace("max_epochs=2", "max_epochs=4").replace(SHARDED, 'strategy="auto"')
    one = one.replace("devices=2", "devices=1")
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCH}
    said = []
    for number, code in enumerate((first, second, one)):
        path = tmp_path / "train.py"
        path.write_text(code)
        done = subprocess.run(
            [sys.executable, path.name],
            cwd=tmp_path,
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
        last = tmp_path / "checkpoints" / "last.ckpt"
        assert last.is_dir() == (number < 2)
    assert ["Restored all states" in each for each in said] == [False, True, True]
    saved = torch.load(last, weights_only=True)
    steps = [float(state["step"]) for state in saved["optimizer_states"][0]["state"].values()]
    assert saved["global_step"] == 3 * 16 + 32 and {*steps} == {80.0}
