# SPDX-License-Identifier: Apache-2.0
"""Parameter initialization: schemes for one tensor, rules for a whole model, and checks that the signal survives.

Three kinds of functions:

- schemes fill one weight in place, and `initialize(model, scheme)` applies one to a module tree:
  `xavier he lecun orthogonal truncated_normal sparse identity`;
- model schemes take the model: `lsuv` (also given a batch), `fixup` and `mup_width` draw it, `depth_scaled` and
  `zero_residual` change the ends of its residual branches afterwards;
- `activation_statistics` measures the result, layer by layer; `render_rows` and `render_activations` print tables.
"""

from typing import TYPE_CHECKING

from lightning_optkit._near_names import refusing_names
from lightning_optkit.init.activation_statistics import ActivationRow, activation_statistics, render_activations
from lightning_optkit.init.depth_scaled import depth_scaled
from lightning_optkit.init.fixup import fixup
from lightning_optkit.init.gain import Activation, gain
from lightning_optkit.init.he import he
from lightning_optkit.init.identity import identity
from lightning_optkit.init.initialize import Scheme, initialize
from lightning_optkit.init.lecun import lecun
from lightning_optkit.init.lsuv import lsuv
from lightning_optkit.init.mup_width import MupRow, mup_parameter_groups, mup_width
from lightning_optkit.init.orthogonal import orthogonal
from lightning_optkit.init.report import InitRow, render_rows
from lightning_optkit.init.sparse import sparse
from lightning_optkit.init.truncated_normal import truncated_normal
from lightning_optkit.init.xavier import xavier
from lightning_optkit.init.zero_residual import zero_residual

__all__ = [
    "Activation",
    "ActivationRow",
    "InitRow",
    "MupRow",
    "Scheme",
    "activation_statistics",
    "depth_scaled",
    "fixup",
    "gain",
    "he",
    "identity",
    "initialize",
    "lecun",
    "lsuv",
    "mup_parameter_groups",
    "mup_width",
    "orthogonal",
    "render_activations",
    "render_rows",
    "sparse",
    "truncated_normal",
    "xavier",
    "zero_residual",
]

if not TYPE_CHECKING:
    __getattr__ = refusing_names(__name__, __all__)
