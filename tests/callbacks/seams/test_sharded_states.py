# SPDX-License-Identifier: Apache-2.0
import torch
from torch import nn

from lightning_optkit import optimizers
from lightning_optkit.callbacks.seams.sharded_states import with_wide_integers


def test_no_int16_is_gathered_and_int16_is_saved():
    """Neither gloo nor NCCL has collectives of int16."""
    param = nn.Parameter(torch.linspace(0.1, 1, 7).bfloat16())
    optimizer = optimizers.AdamW([param], lr=1e-2, rounding="split32")
    param.grad = torch.ones_like(param)
    optimizer.step()
    gathered = []

    def gather(optimizer):
        gathered.append(optimizer.state_dict())
        return optimizer.state_dict()

    saved = with_wide_integers(gather, optimizer)["state"][0]["correction16"]
    assert gathered[0]["state"][0]["correction16"].dtype == torch.int32
    assert saved.dtype == torch.int16 and saved.any()
    assert torch.equal(saved, optimizer.state[param]["correction16"])
    assert optimizer.state_dict()["state"][0]["correction16"].dtype == torch.int16
