# SPDX-License-Identifier: Apache-2.0
"""`optkit doctor`: the checks of a configuration that need no training, as a table or as JSON."""

import contextlib
import io
import sys
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lightning_optkit._terminal import announce
from lightning_optkit.callbacks import Fuse, Initialize, ParameterGroups, Preprocess
from lightning_optkit.cli.doctor import Examination, examine

__all__ = ["doctor_of", "show"]

_KEPT = (Fuse, Initialize, ParameterGroups, Preprocess)  # without which a module may not be what it will be
_WITHOUT_RULE = {
    "one batch": (
        "the batch could not be fitted",
        "no rule says why; is every layer used, and is the loss that of the targets?",
    ),
    "parameters": (
        "the first optimizer took no step with a gradient",
        "does configure_optimizers return one, does the loss depend on its parameters, and does training_step return "
        "that loss or, with manual optimization, call the step of an optimizer?",
    ),
}
_NARROW = 60  # columns, below which what was seen stands below its check
_STATES = {"ok": "green", "hint": "yellow", "fault": "bold red", "unknown": "dim"}


def doctor_of(cli: LightningCLI) -> None:
    """Examines what the configuration describes.

    Raises:
        SystemExit: with 1 if there is a fault.
    """
    configured: Any = cli.trainer
    kept = [callback for callback in configured.callbacks if isinstance(callback, _KEPT)]

    def make(own: Sequence[pl.Callback], **limits: Any) -> pl.Trainer:
        return cli.instantiate_trainer(callbacks=[*kept, *own], **limits)

    options = {name: cli.config[name] for name in ("max_steps", "max_seconds")}
    announce(
        f"Fitting the first batch: at most {options['max_steps']} steps, or {options['max_seconds']:g} seconds ..."
    )
    with contextlib.redirect_stdout(io.StringIO()):  # of callbacks: the table or the JSON is all there is to read
        examination = examine(make, cli.model, None, cli.datamodule, **options)
    if cli.config["json"]:
        print(examination.to_json())
    else:
        show(Console(highlight=False, markup=False), examination)
    if not examination.is_healthy:
        sys.exit(1)


def show(console: Console, examination: Examination) -> None:
    """Prints the checks, then what is wrong."""
    narrow = console.width < _NARROW
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("seen", overflow="fold")
    for place, each in enumerate(examination.findings):
        is_same = place > 0 and examination.findings[place - 1].check == each.check
        state = Text(each.state, style=_STATES[each.state])
        if not narrow:
            table.add_row("" if is_same else each.check, state, "" if is_same else each.seen)
            continue
        console.print(Text(f"{each.check}: ").append_text(state))
        if not is_same:
            console.print(Padding(each.seen, (0, 0, 0, 4)))
    console.print("" if narrow else table)
    for each in examination.findings:
        if each.verdict is not None:
            where = f" in {each.verdict.layer}" if each.verdict.layer else ""
            console.print(Text(f"{each.state}: {each.verdict.symptom}{where}", style=_STATES[each.state]))
            console.print(f"  {each.verdict.cause}")
            console.print(f"  seen: {each.verdict.evidence}")
            console.print(f"  try:  {each.verdict.remedy}")
        elif each.state == "fault":
            what, advice = _WITHOUT_RULE[each.check]
            console.print(Text(f"fault: {what}", style=_STATES["fault"]))
            console.print(f"  {advice}")
    took = f"{examination.steps} step{'s' * (examination.steps != 1)} on one batch, {examination.seconds:.1f} s"
    verdict = "No fault found" if examination.is_healthy else "Something is wrong"
    console.print(f"{verdict} ({took}).")
