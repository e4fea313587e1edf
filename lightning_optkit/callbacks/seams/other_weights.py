# SPDX-License-Identifier: Apache-2.0
"""What to do where the weights of a checkpoint are not those of the module."""

__all__ = ["with_advice"]


def with_advice(said: str, module: str) -> str:
    r"""The error of `load_state_dict`, and the next step.

    Args:
        said: The error, which names the parameters.
        module: The module, by name.

    Example:
        >>> said = "Error(s) in loading state_dict for Net:\n  size mismatch for weight: ..."
        >>> with_advice(said, "Net").splitlines()[-1][:72]
        'Net: its parameters have other shapes than those of the checkpoint; buil'
    """
    faults = said.splitlines()[1:]
    if faults and all(fault.strip().startswith("size mismatch for ") for fault in faults):
        return (
            f"{said}\n{module}: its parameters have other shapes than those of the checkpoint; build it with the "
            "arguments of the run that saved them."
        )
    return (
        f"{said}\n{module}: its parameters are others than those of the checkpoint; if one was renamed, rename it in "
        "checkpoint['state_dict'], and in 'parameter_names' of checkpoint['optimizer_states'], in on_load_checkpoint; "
        "else begin a run from the weights alone."
    )
