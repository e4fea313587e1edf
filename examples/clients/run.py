# SPDX-License-Identifier: Apache-2.0
"""Trains every client whose package is installed and prints the rows of docs/clients.md.

    python examples/clients/run.py [words of names ...] [--steps 20] [--rounds 3] [--rows build/clients.jsonl]

`pip install -e '.[clients]'` installs the packages. Some minutes on one core.
"""

import argparse
import importlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from _client import STEPS, VARIANTS, Loop, Result, measure

FILES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith(("_", "run")))
HEAD = (
    "| project | losses apart by | in double precision | time with `Fuse` | with the stack | stops |\n"
    + "|---" * 6
    + "|"
)


def clients(files: list[str] = FILES) -> tuple[dict[str, Loop], dict[str, str]]:
    """The clients by name, and the files that cannot be imported with what they lack."""
    found: dict[str, Loop] = {}
    missing: dict[str, str] = {}
    for name in files:
        try:
            found.update(importlib.import_module(name).CLIENTS)
        except ImportError as error:
            missing[name] = str(error)
    return found, missing


def row(result: Result) -> str:
    """One row of the page."""
    losses = " | ".join("-" if apart != apart else f"{apart:.0e}" for apart in (result.apart, result.apart64))
    stopped = {variant: why for variant, why in result.stopped.items() if not variant.endswith("64")}
    stops = "; ".join(f"{variant}: {why}" for variant, why in stopped.items()) or "no"
    times = " | ".join(f"{ratio:.2f}" for ratio in (result.fuse, result.stack))
    return f"| {result.name} | {losses} | {times} | {stops} |"


def main() -> None:
    """Measures what the command line names, or everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="train only the clients whose name has one of these words")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant, in turn")
    parser.add_argument("--rows", type=Path, help="a file for the rows, as JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found, missing = clients()
    chosen = {
        name: train for name, train in found.items() if not options.words or any(w in name for w in options.words)
    }
    print(HEAD)
    results = []
    for name, train in chosen.items():
        started = time.perf_counter()
        results.append(measure(name, train, options.steps, options.rounds))
        print(row(results[-1]), flush=True)
        print(f"  {time.perf_counter() - started:.0f} s", *results[-1].said, sep="\n  ", file=sys.stderr)
        if options.rows:
            with options.rows.open("a") as file:
                file.write(json.dumps(asdict(results[-1])) + "\n")
    stops = sum(bool({"README", "stack", "Fuse"} & result.stopped.keys()) for result in results)
    print(f"\n{stops} of {len(results)} stop. Variants: {', '.join(VARIANTS)}.", *missing.items(), sep="\n")


if __name__ == "__main__":
    main()
