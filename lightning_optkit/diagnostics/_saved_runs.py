# SPDX-License-Identifier: Apache-2.0
"""Runs from what they left behind: records of `Report`, checkpoints that hold one, and logs of CSVLogger."""

import csv
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lightning_optkit.diagnostics._curve import Curve
from lightning_optkit.diagnostics._record import RunRecord, record_from

__all__ = ["saved_runs"]

_PAGES = (".html", ".htm")
_VALIDATION = re.compile(r"(^|[_/. -])(val|valid|validation|dev)([_/. -]|$)", re.IGNORECASE)
_LOSS = re.compile(r"^(train(ing)?[_/. -]+)?loss([_/. -]step)?$", re.IGNORECASE)


def saved_runs(
    paths: Sequence[str | os.PathLike[str]], say: Callable[[str], object] = lambda sentence: None
) -> list[RunRecord]:
    """One record per run, each with a name of its own.

    Args:
        paths: Files that end in .json (of `Report`), .ckpt (of a run with `Report`) or .csv (of CSVLogger), and
            folders, which are searched for report.json, any other .json that has a page of its name beside it and,
            where there is no record beside it, metrics.csv. In a folder, logs of a validation or test are left out.
        say: Called with a sentence for each file in a folder that is left out, since it holds no run.

    Raises:
        FileNotFoundError: if there is no such file, or nothing in a folder.
        ValueError: if a file holds no run, or all those in a folder.
    """
    read: dict[Path, tuple[Path, RunRecord]] = {}
    for path in map(Path, paths):
        for file, run in _found_in(path, say) if path.is_dir() else [(path, _read(path))]:
            read.setdefault(file.resolve(), (file, run))
    return _named_apart([*read.values()])


def _found_in(folder: Path, say: Callable[[str], object]) -> list[tuple[Path, RunRecord]]:
    """The runs below a folder. One that was killed while it wrote must not hide the others."""
    logs = [file for file in sorted(folder.rglob("metrics.csv")) if file.is_file()]
    runs, failed, with_record = [], [], set()
    for file in [*_records_in(folder), *logs]:
        if file.name == "metrics.csv" and file.parent in with_record:
            continue
        try:
            runs.append((file, _trained(file)))
        except (ValueError, OSError) as error:
            failed.append(error)
        else:
            with_record.add(file.parent)
    if failed and not runs:
        raise failed[0]
    for each in failed:
        say(f"Left out: {each}")
    if not runs:
        raise FileNotFoundError(
            f"{folder}: there is no record of Report and no metrics.csv in this folder; give the Trainer a Report or a "
            "CSVLogger, or name a checkpoint of a run with Report."
        )
    return runs


def _records_in(folder: Path) -> list[Path]:
    """`Report("lr=0.1.html")` has its record in lr=0.1.json; a .json without a page is somebody else's."""

    def is_record(file: Path) -> bool:
        has_page = any(file.with_suffix(suffix).is_file() for suffix in _PAGES)
        return file.is_file() and (has_page or file.name == "report.json")

    return [file for file in sorted(folder.rglob("*.json")) if is_record(file)]


def _trained(path: Path) -> RunRecord:
    """The run of a file in a folder, where validations and tests have folders of their own beside those of fits."""
    run = _read(path)
    curves = [*run.metrics.values(), *run.logged.values()]
    is_of_fit = run.loss.steps or run.learning_rate or run.grad_norm or run.grad_norm_clipped
    if path.suffix == ".csv" and not is_of_fit and all(curve.steps == [1] for curve in curves):
        raise ValueError(
            f"{path}: it has metrics of one moment and no training step, as a validation or a test leaves it; give the "
            "file itself to have it on the page."
        )
    return run


def _read(path: Path) -> RunRecord:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file.")
    if path.suffix == ".csv":
        return _of_csv(path)
    if path.suffix == ".ckpt":
        return _of_checkpoint(path)
    try:
        return RunRecord.load(path)
    except ValueError as error:
        raise ValueError(
            f"{path}: it is no record of Report, or only a part of one; a checkpoint of the run has it too. {error}"
        ) from None


def _of_checkpoint(path: Path) -> RunRecord:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged file raises
        raise ValueError(f"{path}: it is no checkpoint that can be read safely ({type(error).__name__}).") from None
    callbacks = saved.get("callbacks") if isinstance(saved, dict) else None
    callbacks = callbacks if isinstance(callbacks, dict) else {}
    state = next((state for key, state in callbacks.items() if str(key).partition("{")[0] == "Report"), None)
    if state is None:
        raise ValueError(f"{path}: the run had no Report among its callbacks, so its checkpoint holds no curves.")
    try:
        return record_from(state, "saved_runs(checkpoint")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its record of Report is damaged; {error}") from None


def _of_csv(path: Path) -> RunRecord:
    """The columns by name: "lr-..." are rates, what speaks of validation metrics, "loss" or "train_loss" the loss."""
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        try:
            columns, rows = [*(reader.fieldnames or ())], [*reader]
        except csv.Error as error:
            raise ValueError(f"{path}: it is no log of CSVLogger ({error}).") from None
    if "step" not in columns:
        raise ValueError(f"{path}: it has no column 'step' as the logs of CSVLogger.")
    if not rows:
        raise ValueError(f"{path}: nothing was logged; it has no row but its head.")
    record = RunRecord(path.parent.name or "run")
    for name in rows[0]:
        if name in ("step", "epoch", None, ""):
            continue
        curve = _column(rows, name)
        if not curve.steps:
            continue
        if name.startswith("lr-"):
            record.learning_rate[name[3:]] = curve
        elif _VALIDATION.search(name):
            record.metrics[name] = curve
        elif _LOSS.match(name) and not record.loss.steps:
            record.loss = curve
        elif name in ("grad_norm", "grad_norm_clipped"):
            getattr(record, name)["optimizer 0"] = curve
        else:
            record.logged[name] = curve
    if record == RunRecord(record.name):
        raise ValueError(f"{path}: none of its columns has a number beside one in 'step'.")
    curves = [record.loss, *record.metrics.values(), *record.logged.values()]
    record.num_steps = max((curve.steps[-1] for curve in curves if curve.steps), default=0)
    return record


def _column(rows: Iterable[dict[str, str]], name: str) -> Curve:
    curve = Curve()
    for row in rows:
        try:
            step, value = int(float(row["step"])), float(row[name])
        except (TypeError, ValueError, OverflowError):  # empty, or no number
            continue
        curve.append(step + 1, value if math.isfinite(value) else math.nan)  # CSVLogger counts from 0
    return curve


def _named_apart(found: Sequence[tuple[Path, RunRecord]]) -> list[RunRecord]:
    """Runs of the same name get what differs in their paths, and a number if another run has that name.

    A name that all have, as that of the module, tells nothing, and is left out.
    """
    names = [run.name for _, run in found]
    is_shared = len(set(names)) == 1
    alike = {name: [file.resolve() for file, run in found if run.name == name] for name in names}
    taken: set[str] = set()
    runs = []
    for file, run in found:
        files = alike[run.name]
        name = run.name
        if len(files) > 1:
            differs = _what_differs(files)[files.index(file.resolve())]
            name = differs if is_shared else f"{name}, {differs}"
        each, number = name, 2
        while each in taken:
            each, number = f"{name} {number}", number + 1
        taken.add(each)
        runs.append(replace(run, name=each))
    return runs


def _what_differs(files: Sequence[Path]) -> list[str]:
    """The end of each path that no other has, from the folders or, within one, the files; without what all share."""
    of_folders = [file.parent.parts for file in files]
    of_files = [file.with_suffix("").parts for file in files]
    if len(set(of_files)) < len(files):  # a.json, a.ckpt
        of_files = [file.parts for file in files]
    paths = of_folders if len(set(of_folders)) == len(files) else of_files
    depth = next(
        depth for depth in range(1, max(map(len, paths)) + 1) if len({path[-depth:] for path in paths}) == len(paths)
    )
    ends = [path[-depth:] for path in paths]
    shared = 0
    while shared < depth - 1 and len({end[-1 - shared :] for end in ends}) == 1:
        shared += 1
    return ["/".join(end[: len(end) - shared]) for end in ends]
