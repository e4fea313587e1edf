# SPDX-License-Identifier: Apache-2.0
"""The page of a run and the record beside it: where they are, and how they are written."""

import os
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_optkit._checks import check_path, shown
from lightning_optkit.diagnostics._files import why_unwritable
from lightning_optkit.diagnostics.report import RunRecord, write_report

__all__ = ["PageOfRun"]


class PageOfRun:
    """Where a run is written.

    Args:
        owner: Name in messages.
        path: The page. None: report.html in `folder`.
    """

    def __init__(self, owner: str, path: str | Path | None) -> None:
        if path is not None:
            _check_page(owner, check_path(owner, "path", path))
        self._owner, self._path = owner, path
        self.folder: str | None = None
        """That of the run, which is known when its training starts."""

    def warn_if_unwritable(self) -> None:
        """Says so before the training rather than after it."""
        reason = why_unwritable(self._target())
        if reason:
            rank_zero_warn(
                f"{self._name()}: no report can be written at the end, since {reason}; checkpoints and `record` will "
                "have it."
            )

    def write(self, record: RunRecord) -> None:
        """Writes the record, then the page; warns where it cannot, since the result of the fit must not be lost."""
        try:
            # First, since it takes a moment only: after another process has failed, Lightning's launcher may kill this
            # one while it draws.
            record.save(self._target().with_suffix(".json"))
            written = write_report([record], self._target())
        except Exception as error:
            self.say_unwritten(error)
        else:
            rank_zero_info(f"Report: {written}")

    def say_unwritten(self, error: Exception) -> None:
        """Warns of what kept the page from being written."""
        reason = f"{type(error).__name__}: {shown(str(error))}"
        with suppress(Warning):  # where warnings are errors
            rank_zero_warn(f"{self._name()}: no report was written ({reason}).")

    def _target(self) -> Path:
        return Path(self._path or Path(self.folder or "") / "report.html")

    def _name(self) -> str:
        return f"{self._owner}(path={str(self._target())!r})"


def _check_page(owner: str, path: Path) -> None:
    where = f"{owner}(path={shown(str(path))})"
    if path.suffix.lower() == ".json":
        raise ValueError(
            f"{where}: path must be that of the page, such as 'run.html'; the record is then in 'run.json'."
        )
    if os.path.isdir(path):
        raise ValueError(f"{where}: path must be a file, such as {shown(str(path / 'report.html'))}; it is a folder.")
    if path.suffix.lower() not in (".html", ".htm"):  # a browser would show its text
        raise ValueError(f"{where}: path must end in .html, such as {shown(f'{path}.html')}.")
