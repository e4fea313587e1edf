# SPDX-License-Identifier: Apache-2.0
"""Every optimization and regularization strategy for an unchanged Lightning run, at the cost of one pass.

Nothing is imported here: take names from the folder that says what they are, e.g.
`from lightning_optkit.optimizers import AdamW` or `from lightning_optkit.callbacks import Fuse`.
"""

__version__ = "0.1.0"
