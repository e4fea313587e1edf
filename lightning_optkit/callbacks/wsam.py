# SPDX-License-Identifier: Apache-2.0
"""Weighted sharpness-aware minimization with automatic optimization."""

from lightning_optkit._checks import check_in
from lightning_optkit.callbacks._combined_gradient import CombinedGradientSAM, Gradients
from lightning_optkit.regularization.wsam import wsam

__all__ = ["WSAM"]


class WSAM(CombinedGradientSAM):
    """SAM with a weight of the sharpness against the loss; see `regularization.wsam`.

    As `SAM` in everything else. The sharpness passes through the optimizer with the loss (the authors'
    `decouple=False`).

    Cost: about twice the forward and backward time, and a copy of the weights and of the gradients.

    Args:
        rho: Radius, in (0, inf). Default: 0.05; 0.5 if `adaptive`.
        gamma: In [0, 1). 0: no sharpness; 0.5: SAM; above: more sharpness than loss.
        adaptive: ASAM: scale the radius by the weights.
        eta: For ASAM, added to the magnitude of a weight, in [0, inf).
        sync: Average the ascent over all processes.

    Raises:
        ValueError: as `SAM`.

    Source: Yue et al. 2023, arXiv:2305.15817, Equations 6 and 7.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[WSAM(rho=0.05, gamma=0.9)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rho: float | None = None,
        gamma: float = 0.9,
        adaptive: bool = False,
        eta: float = 0.01,
        sync: bool = False,
    ) -> None:
        super().__init__(rho, adaptive, eta, sync)
        self.gamma = check_in(type(self).__name__, "gamma", gamma, "[0, 1)")

    def _combined(self, grads: Gradients, perturbed: Gradients) -> Gradients:
        return wsam(grads, perturbed, self.gamma)
