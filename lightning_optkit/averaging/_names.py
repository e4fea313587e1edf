# SPDX-License-Identifier: Apache-2.0
"""Under which names a state may keep an average: none that the optimizer uses itself."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["OF_OPTIMIZERS", "check_free"]

# What the optimizers of torch, and the rules of this package, keep in the state of a parameter.
OF_OPTIMIZERS = frozenset({
    "H_diag", "acc_delta", "al", "ax", "col_basis", "col_residual", "col_statistics", "col_var", "compensation",
    "correction16", "correction8", "d", "eta", "exp_avg", "exp_avg_diff", "exp_avg_slow", "exp_avg_sq",
    "exp_avg_var", "exp_inf", "func_evals", "grad_avg", "hessian", "max_exp_avg_sq", "momentum_buffer",
    "momentum_step", "mu", "mu_product", "n_iter", "old_dirs", "old_stps", "p0", "prev", "prev_flat_grad",
    "prev_loss", "previous_grad", "ro", "row_basis", "row_residual", "row_statistics", "row_var", "s", "square_avg",
    "step", "step_size", "sum", "t", "variance", "y", "z", "weight_sum", "weight_sum_rest",
})  # fmt: skip


def check_free(
    owner: str, states: Iterable[Mapping[str, Any]], name: str | None, tensors: Iterable[str], counter: str
) -> None:
    """Refuses a name under which the optimizer, or another average, keeps a tensor.

    Args:
        owner: Name of the caller in the message.
        states: Those of the parameters.
        name: What the user gave; None for the name of this kind of average.
        tensors: The names of the average's tensors in a state.
        counter: That of its counter, which stands beside them.

    Raises:
        ValueError: if the name is not free.
    """
    first, *_ = tensors
    is_taken = any(first in state and counter not in state for state in states)
    if is_taken or name in OF_OPTIMIZERS:
        raise ValueError(
            f"{owner}(name={name!r}): {name or first!r} names something else in the state of an optimizer; give the "
            f"average another name, such as '{name or first}_2'."
        )
