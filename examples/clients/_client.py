# SPDX-License-Identifier: Apache-2.0
"""What the clients share: one project trained plainly, with Fuse, and with the README's stack, and compared.

A file of this folder holds the projects of one package, each as its own documentation writes it: `CLIENTS` maps the
name of a project to a function that makes its module and the arguments of `fit`. A new client is a new entry.
"""

import contextlib
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import torch

import lightning_optkit as ok

STEPS = 20


def stack() -> list[Any]:
    """The callbacks of README.md."""
    return [
        ok.Fuse(),
        ok.GradientClipping(ok.AutoClip(percentile=10)),
        ok.LRSchedule(ok.schedules.warmup_cosine(warmup=0.05)),
        ok.WeightAveraging(ok.EMA(0.999)),
    ]


# name -> callbacks, precision; None: the project's own. In double precision nothing but rounding shrinks.
VARIANTS: dict[str, tuple[Callable[[], list[Any]], str | None]] = {
    "plain": (list, None),
    "Fuse": (lambda: [ok.Fuse()], None),
    "stack": (stack, None),
    "README": (stack, "bf16-mixed"),
    "plain64": (list, "64-true"),
    "Fuse64": (lambda: [ok.Fuse()], "64-true"),
}


@dataclass
class Run:
    """What one training showed: loss of each backward pass, processor time of each step in milliseconds."""

    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Times one step of a loop."""
        started = time.process_time()
        yield
        self.step_ms.append(1e3 * (time.process_time() - started))


Loop = Callable[[str, int], Run]
"""(variant, steps) -> what it showed."""


def watch(run: Run, pl: ModuleType = lightning.pytorch) -> Any:
    """A callback that writes into `run`: the time from batch to batch, everything between them included."""

    class Watch(pl.Callback):  # type: ignore[misc,name-defined]
        started: float | None = None

        def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
            run.losses.append(float(loss))

        def on_train_batch_start(self, *args: Any) -> None:
            now = time.process_time()
            if self.started is not None:
                run.step_ms.append(1e3 * (now - self.started))
            self.started = now

    return Watch()


def fits(make: Callable[[], tuple[Any, dict[str, Any]]], pl: ModuleType = lightning.pytorch, **arguments: Any) -> Loop:
    """A client with a Trainer: `make` returns its module and what `fit` is given; `arguments` are its Trainer's own."""

    def train(variant: str, steps: int) -> Run:
        callbacks, precision = VARIANTS[variant][0](), VARIANTS[variant][1]
        pl.seed_everything(0, verbose=False)
        module, data = make()
        run, given = Run(), {"logger": False, **arguments}
        own = given.pop("callbacks", list)()
        if any(isinstance(callback, ok.GradientClipping) for callback in callbacks):
            given.pop("gradient_clip_val", None)  # of the two the README has the callback
        if precision is not None:
            given["precision"] = precision
        trainer = pl.Trainer(
            max_epochs=10, limit_train_batches=max(steps // 10, 1), limit_val_batches=2, accelerator="cpu", devices=1,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[watch(run, pl), *own, *callbacks], **given,
        )  # fmt: skip
        trainer.fit(module, **data)
        return run

    return train


@dataclass
class Result:
    """A row of the table. `apart` is the largest relative difference of a loss with Fuse from the plain one.

    Both in the project's precision and in double: `apart64`, NaN for a project that cannot be trained so; `early64` is
    that of the first three losses, for one that diverges.
    """

    name: str
    apart: float = float("nan")
    apart64: float = float("nan")
    early64: float = float("nan")
    fuse: float = float("nan")
    stack: float = float("nan")
    stopped: dict[str, str] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


def measure(
    name: str, train: Loop, steps: int = STEPS, rounds: int = 1, variants: Sequence[str] = tuple(VARIANTS)
) -> Result:
    """Trains in every variant, in turn, and compares.

    Args:
        name: The row.
        train: The client.
        steps: Optimizer steps of each run, at least 10.
        rounds: Runs of each variant, for the times.
        variants: Those to train.
    """
    result = Result(name)
    runs: dict[str, list[Run]] = {variant: [] for variant in VARIANTS}
    for turn in range(rounds):
        for variant in variants if turn == 0 else ("plain", "Fuse", "stack"):
            with quiet() as said:
                try:
                    runs[variant].append(train(variant, steps))
                except Exception as error:  # any at all: whether something stops is what is asked
                    result.stopped[variant] = f"{type(error).__name__}: {error}"
            if variant == "README":
                result.said += [line for line in said() if line not in result.said]
    result.apart, result.apart64 = _apart(runs["plain"], runs["Fuse"]), _apart(runs["plain64"], runs["Fuse64"])
    result.early64 = _apart(runs["plain64"], runs["Fuse64"], first=3)
    plain = _step_ms(runs["plain"])
    result.fuse, result.stack = _step_ms(runs["Fuse"]) / plain, _step_ms(runs["stack"]) / plain
    return result


def _apart(some: list[Run], others: list[Run], first: int | None = None) -> float:
    if not some or not others:
        return float("nan")
    pairs = zip(some[0].losses[:first], others[0].losses[:first], strict=True)
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)


def _step_ms(runs: list[Run]) -> float:
    """The median step of the best run; its first quarter, in which memory is fetched, does not count."""
    medians = [statistics.median(run.step_ms[len(run.step_ms) // 4 :]) for run in runs if run.step_ms]
    return min(medians, default=float("nan"))


@contextlib.contextmanager
def quiet() -> Iterator[Callable[[], list[str]]]:
    """Keeps what Lightning and the projects print; warnings that name something of this package can be asked for."""
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")]
    levels = [log.level for log in logs]
    names = [name for name in dir(ok.callbacks) if name[0].isupper()]
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        for log in logs:
            log.setLevel(logging.ERROR)
        yield lambda: [str(each.message) for each in caught if any(f"{name}:" in str(each.message) for name in names)]
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def python_text(characters: int = 200_000) -> str:
    """The text of Python's own library, the same files every time."""
    folder, text = Path(statistics.__file__).parent, ""
    for path in sorted(folder.glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= characters:
            break
    return text[:characters]
