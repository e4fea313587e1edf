# SPDX-License-Identifier: Apache-2.0
"""Surrogate gap guided sharpness-aware minimization with automatic optimization."""

from lightning_optkit._checks import check_in
from lightning_optkit.callbacks._combined_gradient import CombinedGradientSAM, Gradients
from lightning_optkit.regularization.gsam import gsam

__all__ = ["GSAM"]


class GSAM(CombinedGradientSAM):
    """Sharpness-aware as SAM, and lowers the gap of perturbed loss and loss, too; see `regularization.gsam`.

    As `SAM` in everything else. The paper lets `rho` fall with the rate: set `callback.rho` in a hook.

    Cost: about twice the forward and backward time, and a copy of the weights and of the gradients.

    Args:
        rho: Radius, in (0, inf). Default: 0.05; 0.5 if `adaptive`.
        alpha: Weight of the gap, in [0, inf). 0: SAM.
        adaptive: ASAM: scale the radius by the weights.
        eta: For ASAM, added to the magnitude of a weight, in [0, inf).
        sync: Average the ascent over all processes.

    Raises:
        ValueError: as `SAM`.

    Source: Zhuang et al. 2022, arXiv:2203.08065, Algorithm 1.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(callbacks=[GSAM(rho=0.05, alpha=0.4)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        rho: float | None = None,
        alpha: float = 0.4,
        adaptive: bool = False,
        eta: float = 0.01,
        sync: bool = False,
    ) -> None:
        super().__init__(rho, adaptive, eta, sync)
        self.alpha = check_in(type(self).__name__, "alpha", alpha, "[0, inf)")

    def _combined(self, grads: Gradients, perturbed: Gradients) -> Gradients:
        return gsam(grads, perturbed, self.alpha)
