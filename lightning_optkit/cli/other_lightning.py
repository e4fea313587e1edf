# SPDX-License-Identifier: Apache-2.0
"""A class made with `import pytorch_lightning`, which is none of `lightning.pytorch` to a LightningCLI."""

import sys
from importlib import import_module
from inspect import isclass

__all__ = ["about_other_lightning"]

_OTHER = "pytorch_lightning"
_KINDS = {"LightningModule": "module", "LightningDataModule": "data module", "Callback": "callback"}


def about_other_lightning(class_path: str) -> str | None:
    """What to do about a class of the other package; None for any other class.

    Args:
        class_path: As the file has it, of a module that can be imported.
    """
    module, _, name = class_path.rpartition(".")
    try:
        named = getattr(import_module(module), name, None)
    except ImportError:  # of which there is another sentence
        return None
    other = sys.modules.get(_OTHER)  # imported by the user's module, if it uses that
    if other is None or not isclass(named):
        return None
    kind = next((_KINDS[base] for base in _KINDS if issubclass(named, getattr(other, base, ()))), None)
    if kind is None:
        return None
    change = "change the import"
    if class_path.startswith(f"{_OTHER}."):
        change = f"say lightning.pytorch{class_path.removeprefix(_OTHER)}"
    return (
        f"{class_path} is a {kind} of {_OTHER}; the commands take those of lightning.pytorch: {change}, or use "
        f"{_OTHER}.Trainer in Python."
    )
