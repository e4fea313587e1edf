# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of this folder that need a GPU, with pytest's decorators or, where it is absent, with stand-ins.

One line per test that failed, as it fails, and one in the end; a device that a test left unusable is taken up again in
a fresh process from the next test on. A dry run takes the CPU for the GPU, which tests the tests.
Usage: python tests/gpu/run.py [FILE...] [-k WORDS] [--minutes 3] [--json FILE] [--dry-run]
"""

import argparse
import contextlib
import faulthandler
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import sys
import time
import traceback
import types
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


class Skipped(BaseException):
    """A test that does not apply here."""


def stand_in():
    """As much of pytest as these tests use."""
    module = types.ModuleType("pytest")

    class Marks:
        def __getattr__(self, name):
            def mark(*args, **kwargs):
                one = types.SimpleNamespace(name=name, args=args, kwargs=kwargs, mark=None)

                def decorate(function):
                    function.pytestmark = [*getattr(function, "pytestmark", []), one]
                    return function

                decorate.mark = one
                return decorate

            plain = mark()
            return plain if name in ("gpu", "slow") else mark

    def skip(reason=""):
        raise Skipped(reason)

    def importorskip(name):
        try:
            return importlib.import_module(name)
        except ImportError:
            raise Skipped(f"{name} is not installed") from None

    @contextlib.contextmanager
    def raises(kind, match=""):
        try:
            yield
        except kind as error:
            assert re.search(match, str(error)), f"{error} does not match {match}"
        else:
            raise AssertionError(f"{kind} was not raised")

    skip.Exception = Skipped
    module.mark, module.skip, module.importorskip, module.raises = Marks(), skip, importorskip, raises
    return module


def cases(function):
    """(name, arguments) for every combination of its parameters."""
    axes = []
    for decorator in getattr(function, "pytestmark", []):
        mark = getattr(decorator, "mark", None) or decorator
        if mark.name != "parametrize":
            continue
        names = [name.strip() for name in mark.args[0].split(",")] if isinstance(mark.args[0], str) else mark.args[0]
        axes.append([dict(zip(names, v if len(names) > 1 else [v], strict=True)) for v in mark.args[1]])
    for chosen in itertools.product(*axes):
        arguments = {name: value for one in chosen for name, value in one.items()}
        label = ", ".join(str(value) for value in arguments.values())
        yield f"{function.__name__}[{label}]" if label else function.__name__, arguments


def collect(files, words):
    """Every test that the words, all of them, are in; since the time may not do for all, those of many cases come after
    the others, and last what waits for torch's compiler.
    """
    found = []
    for path in files:
        module = importlib.import_module(path.stem)
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if not function.__name__.startswith("test_") or function.__module__ != module.__name__:
                continue
            chosen = [(name, values) for name, values in cases(function) if all(word in name for word in words)]
            is_slow = "compiled" in function.__name__
            place = path.name, is_slow, len(chosen), function.__code__.co_firstlineno
            found += [(place, f"{path.stem}::{name}", function, values) for name, values in chosen]
    return sorted(found, key=lambda one: one[0])


def run_one(function, arguments, skipped):
    """(result, message)"""
    try:
        function(**arguments)
    except skipped as reason:
        return "skipped", str(reason)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        here = [frame for frame in frames if FOLDER.name in frame.filename] or frames
        where = f"{Path(here[-1].filename).name}:{here[-1].lineno}"
        return "FAILED", f"{where}: {type(error).__name__}: {str(error)[:400]}"
    return "passed", ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("-k", dest="words", nargs="*", default=[])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--start", type=int, default=0, help="number of the first test")
    parser.add_argument("--so-far", type=int, nargs=3, default=[0, 0, 0], help="passed, failed, skipped before it")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    faulthandler.enable()  # a crash of a kernel's host code ends the process: this says in which test
    sys.path[:0] = [str(FOLDER), str(FOLDER.parents[1])]
    if importlib.util.find_spec("pytest") is None:
        sys.modules["pytest"] = stand_in()
    import pytest
    import torch

    if arguments.dry_run:
        from on_cpu import dry_run

        assert not torch.cuda.is_available(), "there is a GPU: leave --dry-run out"
    default = ["test_step.py", "test_norms.py", "test_training.py"]
    files = [FOLDER / path.name for path in arguments.files] or [FOLDER / name for name in default]
    tests = collect(files, arguments.words)
    count = dict(zip(("passed", "FAILED", "skipped"), arguments.so_far, strict=True))
    done = arguments.start
    for number, (_, name, function, values) in enumerate(tests):
        if number < arguments.start:
            continue
        if time.monotonic() > end:
            break
        began = time.monotonic()
        with dry_run(pytest.skip) if arguments.dry_run else contextlib.nullcontext():
            result, message = run_one(function, values, pytest.skip.Exception)
        done, count[result] = number + 1, count[result] + 1
        if result == "FAILED":
            print(f"FAILED {name}\n    {message}", flush=True)
        if arguments.json:
            row = dict(test=name, result=result, seconds=round(time.monotonic() - began, 3), message=message)
            with arguments.json.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if result == "FAILED" and torch.cuda.is_available() and not device_answers():
            left = (end - time.monotonic()) / 60
            so_far = [str(count[key]) for key in ("passed", "FAILED", "skipped")]
            rest = ["--start", str(done), "--minutes", str(left), "--so-far", *so_far]
            files_left = [path.name for path in files]
            words = ["-k", *arguments.words] if arguments.words else []
            json_file = ["--json", str(arguments.json)] if arguments.json else []
            os.execv(sys.executable, [sys.executable, __file__, *files_left, *words, *json_file, *rest])
    print(
        f"{count['passed']} passed, {count['FAILED']} failed, {count['skipped']} skipped, {len(tests) - done} not run"
    )
    return 0 if count["FAILED"] == 0 and done == len(tests) else 1


def device_answers():
    """False after an error that only a new process gets rid of."""
    import torch

    try:
        torch.cuda.synchronize()
        return torch.ones(1, device="cuda").item() == 1.0
    except Exception:
        return False


if __name__ == "__main__":
    sys.exit(main())
