# SPDX-License-Identifier: Apache-2.0
"""What an optimizer step and its communication cost on 1 to 1024 GPUs, computed from the constants below.

Nothing is run on a GPU. Usage: python benchmarks/scaling.py [--params 7e9] [--tensors 291]
"""

import argparse
import math
from typing import NamedTuple

# Data sheet of the H200 SXM: memory, and NVLink in one direction.
MEMORY = 4.8e12  # bytes per second
NVLINK = 450e9
# Data sheet of an NDR InfiniBand port per GPU: 400 Gbit/s.
NETWORK = 50e9
PER_NODE = 8

# Assumed, neither measured nor in a data sheet: a collective of a few bytes, in a node and for each doubling of nodes.
LATENCY_IN_NODE = 15e-6
LATENCY_PER_DOUBLING = 5e-6

# Measured by bench_sharded.py on an Intel Xeon, 150 sharded parameters of (64, 64): 1.00 ms per step, of which 0.28 ms
# are gloo's all-reduce and 0.34 ms the walks over the elements; torch's fused AdamW with clip_grad_norm_ takes 5.6 ms.
HOST_PER_TENSOR = (1.00e-3 - 0.28e-3 - 0.34e-3) / 150
TORCH_HOST_PER_TENSOR = (5.6e-3 - 0.28e-3 - 0.34e-3) / 150

STEP_BYTES = 4 + 28  # per element in fp32: the norm reads the gradient; AdamW reads p, g, m, v and writes p, m, v
TORCH_STEP_BYTES = 4 + 8 + 28  # clip_grad_norm_ also scales the gradients in memory
GRADIENT_BYTES = 2  # bf16, as reduced and gathered


class Cost(NamedTuple):
    """Seconds of one step of one GPU."""

    gpus: int
    elements: float
    memory: float
    host: float
    norm: float
    torch: float
    sharded: float
    replicated: float

    @property
    def step(self) -> float:
        """The host prepares the next kernels while these run, and waits for the norm."""
        return max(self.memory, self.host) + self.norm


def latency(gpus: int) -> float:
    """A collective of a few bytes."""
    if gpus == 1:
        return 0.0
    return LATENCY_IN_NODE + LATENCY_PER_DOUBLING * math.log2(max(1, gpus / PER_NODE))


def ring(size: float, gpus: int) -> float:
    """An all-gather or a reduce-scatter of so many bytes in all; a ring is as fast as its slowest link."""
    return size * (gpus - 1) / gpus / (NVLINK if gpus <= PER_NODE else NETWORK)


def cost(params: float, tensors: int, gpus: int) -> Cost:
    """With parameters sharded over all GPUs."""
    elements = params / gpus
    memory, host, norm = elements * STEP_BYTES / MEMORY, tensors * HOST_PER_TENSOR, latency(gpus)
    torchs = max(elements * TORCH_STEP_BYTES / MEMORY, tensors * TORCH_HOST_PER_TENSOR) + norm
    gather = ring(params * GRADIENT_BYTES, gpus)
    return Cost(gpus, elements, memory, host, norm, torchs, 3 * gather, 2 * gather)


def table(params: float, tensors: int) -> str:
    """Rows in Markdown, in ms."""
    lines = [
        "| GPUs | elements each | memory | host | norm | step | torch's step | FSDP2: gathers, reduce | DDP: reduce |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for power in range(11):
        c = cost(params, tensors, 2**power)
        times = [c.memory, c.host, c.norm, c.step, c.torch, c.sharded, c.replicated]
        shown = " | ".join(f"{1e3 * t:.3g}" for t in times)
        lines.append(f"| {c.gpus} | {c.elements:.1e} | {shown} |")
    bound = params * STEP_BYTES / MEMORY / (tensors * HOST_PER_TENSOR)
    lines.append(
        f"\nFrom {bound:.0f} GPUs on the step takes as long as the host needs, and more of them do not shorten it."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=float, default=7e9)
    parser.add_argument("--tensors", type=int, default=291)  # of a transformer of 32 layers with 9 each, and 3 more
    args = parser.parse_args()
    print(table(args.params, args.tensors))
