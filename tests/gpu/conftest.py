# SPDX-License-Identifier: Apache-2.0
"""Shared by the CUDA tests; tests/gpu/run.py finds the same modules without pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # gpu_cases.py, emulated.py
