# SPDX-License-Identifier: Apache-2.0
"""What torch's compiler makes of the norms on CUDA, by tensors that are fake: no device is needed."""

import subprocess
import sys

import pytest
import torch

from lightning_optkit._native import cuda_library, extension

# In a process of its own: one opens one CUDA library only, and in this one it may be the emulated one.
TRACE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from lightning_optkit import layers

def show(graph, inputs):
    print(*[n.target.__name__ for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverloadPacket)])
    return graph.forward

with FakeTensorMode():
    layer = layers.{kind}(768, device="cuda")
    x = torch.randn(64, 768, device="cuda", requires_grad=True)
    torch.compile(layer, fullgraph=True, backend=show)(*[x, x][: 1 + {adds}])
"""


@pytest.mark.skipif(extension is None or cuda_library() is None, reason="no CUDA kernels were built")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_norms.py compiles for the device itself")
@pytest.mark.parametrize("kind, op", [("LayerNorm", "norm"), ("AddRMSNorm", "add_norm")])
def test_a_compiled_norm_is_our_op_without_a_graph_break(kind, op):
    code = TRACE.format(kind=kind, adds=int(kind.startswith("Add")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [op]
