# SPDX-License-Identifier: Apache-2.0
"""Calls every public name with one or two wrong arguments, and counts errors that name owner and argument.

    python tests/fuzz/fuzz_arguments.py --calls 20000 --seed 0

prints the answers that do not, and a JSON row with the counts. `--accepted` lists what was taken, to be looked through.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.fuzz.cases import Case, constructors_and_functions, methods, wrong_values

REFUSALS = (TypeError, ValueError, RuntimeError, FileNotFoundError)


@dataclass
class Result:
    """The outcomes of the calls.

    Args:
        refused: Number of errors that name owner and argument.
        refused: How many were answered by a sentence that names owner and argument.
        others: Case, arguments and error of every other call.
    """

    accepted: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: int = 0
    others: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def share(self) -> float:
        """The fraction of refused calls whose error names owner and argument."""
        return self.refused / max(1, self.refused + len(self.others))

    def row(self) -> dict[str, Any]:
        calls = sum(self.accepted.values()) + self.refused + len(self.others)
        counts = {"accepted": sum(self.accepted.values()), "refused": self.refused, "other": len(self.others)}
        return {"calls": calls, **counts, "share": round(self.share, 5)}


def is_answer(error: BaseException, owners: Iterable[str], names: Iterable[str]) -> bool:
    """Whether the error names an owner and one of the arguments, in one sentence of less than 600 characters."""
    message = str(error)
    begin = re.match(rf"(?:{'|'.join(owners)})(\.\w+)?\(", message)
    named = any(re.search(rf"\b{re.escape(name)}", message) for name in names)
    return isinstance(error, REFUSALS) and bool(begin) and named and "\n" not in message and len(message) < 600


def is_of_a_given_function(error: BaseException, values: Any) -> bool:
    """Whether it was raised inside a function of the user."""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        for value in values:
            if frame.f_locals.get("self") is value or frame.f_code is getattr(value, "__code__", None):
                return callable(value)
        trace = trace.tb_next
    return False


def one_call(case: Case, values: dict[str, Any], result: Result, draw: random.Random) -> None:
    from lightning_optkit._checks import shown

    text = ", ".join(f"{name}={shown(value)}" for name, value in values.items())
    call, owner = case.call, case.owner
    if isinstance(call, type) and draw.random() < 0.2:  # a message names the class that the user wrote
        owner = f"My{owner}"
        call = type(owner, (call,), {})
    arguments = {**case.arguments(), **values}
    try:
        call(**arguments)
    except Exception as error:
        if is_answer(error, [owner, *case.also], [*values, *case.also]):
            result.refused += 1
        elif is_of_a_given_function(error, arguments.values()):
            result.accepted[case.name, text] += 1
        else:
            result.others.append((case.name, text, f"{type(error).__name__}: {str(error)[:300]}"))
    else:
        result.accepted[case.name, text] += 1


def fuzz(calls: int, seed: int, seconds: float = float("inf"), only: str = "") -> Result:
    """Makes `calls` calls at most, for `seconds` at most; the same ones for the same seed."""
    draw, result, stop = random.Random(seed), Result(), time.monotonic() + seconds
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), ExitStack() as stack:
        stack.callback(os.chdir, before)
        os.chdir(folder)  # a wrong value may be the name of a file to write
        warnings.simplefilter("ignore")
        pool = wrong_values(Path(folder))
        cases = [case for case in constructors_and_functions() + methods(Path(folder)) if only in case.name]
        cases = [case for case in cases if case.names()]
        for _ in range(calls):
            if time.monotonic() > stop:
                break
            case = draw.choice(cases)
            names = case.names()
            chosen = draw.sample(names, min(len(names), draw.choice([1, 1, 1, 2])))
            one_call(case, {name: draw.choice(pool)() for name in chosen}, result, draw)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--accepted", action="store_true", help="list what was taken")
    arguments = parser.parse_args()
    result = fuzz(arguments.calls, arguments.seed, arguments.seconds, arguments.only)
    if arguments.accepted:
        for (name, text), _ in sorted(result.accepted.items()):
            print(f"accepted {name}({text})")
    for name, text, answer in result.others:
        print(f"other {name}({text}) -> {answer}")
    print(json.dumps(result.row()))


if __name__ == "__main__":
    main()
