# SPDX-License-Identifier: Apache-2.0
"""AdamW: Adam with decoupled weight decay, in one pass.

Source: Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.
Differs from the paper: the schedule's multiplier is already inside `lr`, as in `torch.optim.AdamW`.
"""

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from lightning_optkit.optimizers.adam import Adam
from lightning_optkit.step.stages import Stages

__all__ = ["AdamW"]


class AdamW(Adam, torch.optim.AdamW):
    """AdamW with the arguments of `torch.optim.AdamW`, and every stage of the one-pass step.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`.
        lr: Learning rate (parameter units per step), in [0, inf), or a 1-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the denominator after the square root, in [0, inf).
        weight_decay: Share of each parameter removed per step, times `lr`; in [0, inf).
        amsgrad: Use the largest second moment so far.
        maximize: Ascend.
        foreach: As in torch; kept for state dicts. No effect, since there is only one implementation.
        capturable: As in torch; kept for state dicts.
        differentiable: Must be False: the step writes in place.
        fused: None: the compiled path where possible. False: plain PyTorch.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, no parameters, one given twice, or two devices.
        RuntimeError: for `fused=True` with `foreach=True`, as in torch.

    Cost: 8 bytes of state per parameter (amsgrad 12); one pass, two with a clip.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdamW([weight], lr=0.1, weight_decay=0.5)
        >>> weight.grad = torch.tensor([1.0, 0.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([0.8500, 0.9500])
    """

    _torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **stages: Unpack[Stages],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **stages,
        )
