# SPDX-License-Identifier: Apache-2.0
"""What the tests of CUDA share; tests/gpu/run.py finds the same modules without pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # gpu_cases.py, emulated.py
