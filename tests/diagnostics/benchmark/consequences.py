# SPDX-License-Identifier: Apache-2.0
"""Whether ReLUs are dead and the gradient vanishes in a network, measured apart from `GradientHealth`."""

import torch
from torch import nn

_SAMPLES = 512


class _Outputs:
    """Outputs of the modules of these kinds, in the order of their calls, until `close`."""

    def __init__(self, module, kinds):
        self.found = []
        self._handles = [m.register_forward_hook(self._keep) for m in module.modules() if isinstance(m, kinds)]

    def _keep(self, module, args, output):
        if output.requires_grad:
            output.retain_grad()
        self.found.append(output)

    def close(self):
        for handle in self._handles:
            handle.remove()


def dead_share(setup, module):
    """The largest share, over its layers, of ReLUs that give 0 for all samples; NaN for weights that are not finite."""
    outputs, _ = _run(setup, module, nn.ReLU)
    shares = [float((_by_unit(each).amax(0) <= 0).float().mean()) for each in outputs]
    return max(shares, default=0.0) if all(bool(each.isfinite().all()) for each in outputs) else float("nan")


def fading(setup, module):
    """Mean size of the gradient at the first layer's output over that at the last layer's; 0 where none arrives."""
    outputs, loss = _run(setup, module, nn.Linear | nn.Conv2d)
    loss.backward()
    module.zero_grad()
    if len(outputs) < 2 or any(each.grad is None for each in (outputs[0], outputs[-1])):
        return float("nan")
    last = float(outputs[-1].grad.abs().mean())
    return float(outputs[0].grad.abs().mean()) / last if last > 0 else float("nan")


def _run(setup, module, kinds):
    x, y = (each[:_SAMPLES] for each in setup.data[:2])
    watch, device_type = _Outputs(module, kinds), torch.get_default_dtype()
    try:
        loss = setup.loss(module(x.to(device_type) if x.is_floating_point() else x), setup.target(y))
    finally:
        watch.close()
    return watch.found, loss


def _by_unit(t):
    return t.movedim(1, -1).reshape(-1, t.shape[1]) if t.ndim >= 4 else t.reshape(-1, t.shape[-1])
