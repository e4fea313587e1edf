# SPDX-License-Identifier: Apache-2.0
"""What Lightning says of itself when a Trainer is built and starts, left out where no run follows."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning

import lightning_optkit

__all__ = ["LIGHTNINGS_LOGGERS", "quiet_start"]

_OURS = str(Path(lightning_optkit.__file__).parent)
# Of both names of Lightning, which speak by the logger of the one imported last.
LIGHTNINGS_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
_LIGHTNINGS = tuple(str(Path(lightning.__file__).parents[1] / each.partition(".")[0]) for each in LIGHTNINGS_LOGGERS)
_LOGGERS = [f"{package}.utilities.{name}" for package in LIGHTNINGS_LOGGERS for name in ("rank_zero", "seed")]
_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*No seed found",
    r".*does not have many workers",
    r"The number of training batches",
)


@contextmanager
def quiet_start(*, prints_ours: bool) -> Iterator[None]:
    """Leaves out what Lightning says of devices, packages and loaders. Other warnings stay.

    Args:
        prints_ours: Print what this package says when a training starts, since it is the answer; otherwise it is left
            out, too.
    """

    def keeps(record: logging.LogRecord) -> bool:
        if record.levelno > logging.INFO:
            return True
        is_ours = record.pathname.startswith(_OURS)
        if is_ours and prints_ours:
            print(record.getMessage())
        return not is_ours and not record.pathname.startswith(_LIGHTNINGS)

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.addFilter(keeps)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(keeps)
