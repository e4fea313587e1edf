# SPDX-License-Identifier: Apache-2.0
"""Tests specific to RMSNorm; the others are in test_norms.py."""

import pytest
import torch
import torch.nn.functional as F
from norm_cases import DTYPES

from lightning_optkit.layers import rms_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eps_of_none_is_that_of_torch(dtype, always_ours):
    x = torch.full((2, 40), 1e-4 if dtype != torch.float64 else 1e-8, dtype=dtype)
    torch.testing.assert_close(rms_norm(x, (40,)), F.rms_norm(x, (40,)), atol=1e-3, rtol=1e-2)
