# SPDX-License-Identifier: Apache-2.0
"""By what, when and where a fit was ended before its time, as text."""

import linecache
import sysconfig
import textwrap
import traceback
from pathlib import Path

import lightning.pytorch as pl

from lightning_optkit.callbacks.seams.run import Run

__all__ = ["how_it_ended"]

_LONGEST = 2_000  # characters of a message
_HEAD = 500  # of them from its beginning: a loader's process appends the error itself at the end of its message
_LONGEST_LINE = 100
_SIGNALS = {"KeyboardInterrupt": "KeyboardInterrupt (Ctrl-C)", "SIGTERMException": "SIGTERM"}
_LIBRARIES = [str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")]
_FOREIGN = [*_LIBRARIES, str(Path(__file__).resolve().parents[2])]


def how_it_ended(trainer: pl.Trainer, exception: BaseException) -> dict[str, str]:
    """Text by "by" (exception and message), "when" (step and epoch) and "where" (the user's line, if there is one).

    Reads the trainer's counters only: other processes may not have the exception.
    """
    return {"by": _message(exception), "when": _position(trainer), "where": _place(exception)}


def _message(exception: BaseException) -> str:
    signal = _SIGNALS.get(type(exception).__name__)
    if signal is not None:
        return signal
    text = "".join(traceback.format_exception_only(exception)).strip()
    if len(text) > _LONGEST:
        text = f"{text[:_HEAD]}\n[...]\n{text[_HEAD - _LONGEST :]}"
    return text


def _position(trainer: pl.Trainer) -> str:
    run = Run(trainer)
    steps = "1 step" if run.step == 1 else f"{run.step:,} steps"
    of = "" if run.max_epochs is None else f" of {run.max_epochs:,}"
    epoch = trainer.current_epoch + 1 if run.max_epochs is None else min(trainer.current_epoch + 1, run.max_epochs)
    return f"in {'validation' if trainer.validating else 'training'}, after {steps}, in epoch {epoch:,}{of}"


def _place(exception: BaseException) -> str:
    """The innermost line of the user's own code; of all code if none is."""
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(exception.__traceback__)]
    if not frames:
        return ""
    own = [(code, line) for code, line in frames if not _is_foreign(code.co_filename)]
    code, line = (own or frames)[-1]
    text = textwrap.shorten(linecache.getline(code.co_filename, line), _LONGEST_LINE, placeholder=" ...")
    return f"{_short(code.co_filename)}:{line}, in {code.co_name}" + (f": {text}" if text else "")


def _is_foreign(file: str) -> bool:
    return file.startswith("<") or any(Path(file).resolve().is_relative_to(folder) for folder in _FOREIGN)


def _short(file: str) -> str:
    """The path below the folder of the process or of the packages, if it lies there."""
    for folder in (Path.cwd(), *map(Path, _LIBRARIES[1:])):
        if Path(file).is_relative_to(folder):
            return str(Path(file).relative_to(folder))
    return file
