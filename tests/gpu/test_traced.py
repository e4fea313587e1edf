# SPDX-License-Identifier: Apache-2.0
"""What torch's compiler makes of the norms, on CUDA too, by tensors that are fake: no device is needed."""

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
    layer = layers.{kind}(768, device="{device}")
    x = torch.randn(64, 768, device="{device}", requires_grad=True)
    torch.compile(layer, fullgraph=True, backend=show)(*[x, x][: 1 + {adds}])
"""


CONSTANT = """
import torch
from lightning_optkit._native import has_cuda_kernels

print(torch.compile(lambda x: x + has_cuda_kernels(), fullgraph=True, backend="eager")(torch.zeros(())).item())
"""

pytestmark = pytest.mark.skipif(extension is None, reason="no compiled extension")
can_be_cuda = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available() or cuda_library() is None,
    reason="without CUDA in torch no tensor can be one, and with a device tests/gpu/test_norms.py compiles for it",
)


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=can_be_cuda)])
def test_a_compiled_norm_is_our_op_without_a_graph_break(device):
    for kind, op in (("LayerNorm", "norm"), ("AddRMSNorm", "add_norm")):
        assert run(TRACE.format(kind=kind, device=device, adds=int(kind.startswith("Add")))) == [op]


def test_whether_the_cuda_kernels_are_there_breaks_no_graph():
    assert run(CONSTANT) == ["0.0" if cuda_library() is None else "1.0"]
