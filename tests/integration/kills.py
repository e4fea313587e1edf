# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed again and again, resumed, and compared with the one that was not, byte by byte.

Usage: python kills.py FOLDER MINUTES [SEED]. Prints one line of counts; the exit status is 1 if a run ended differently
or not at all. With 0 minutes, one run of each kind is killed twice.
"""

import json
import logging
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import whole_run
from forked import KINDS, finish, start, values

SETTINGS = [  # arguments of the run, and of its loader
    {"window": whole_run.WINDOW},
    {},
    {"num_workers": 2},
    {"window": whole_run.WINDOW, "num_workers": 1},
    {"scaled": True, "window": 2},
]
PLACES = ("batch", "backward", "step", "batch end", "validation", "epoch end", "save")
NO_FAULT = ("", 0, 0, None)  # the place, how often it is passed, the rank that dies; seconds after which all die
BEFORE_THE_FIRST_STEP = ("backward", 3, 0, None)  # of a window, after a save
LIMIT = 60.0  # seconds for a run of half a second
MOST_KILLS = 6
MARK = "epoch"  # a file with the epoch of a kill


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Saves(pl.Callback):
    """Writes `last.ckpt` at most batch ends, at the ends of validations and of epochs."""

    def __init__(self, folder):
        self.path = folder / "last.ckpt"

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 3 != 1:
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


class Dies(pl.Callback):
    """Ends its process when it comes to a place for the n-th time; while it saves, up to 5 ms later."""

    def __init__(self, folder, place, count, rank):
        self.folder, self.place, self.count, self.rank = folder, place, count, rank

    def _reached(self, trainer, place):
        if place == self.place and trainer.global_rank == self.rank:
            self.count -= 1
            if self.count == 0:
                (self.folder / MARK).write_text(str(trainer.current_epoch))
                threading.Timer(random.random() * 0.005, die).start() if place == "save" else die()

    def on_train_batch_start(self, trainer, *args):
        self._reached(trainer, "batch")

    def on_after_backward(self, trainer, pl_module):
        self._reached(trainer, "backward")

    def on_before_optimizer_step(self, trainer, *args):
        self._reached(trainer, "step")

    def on_train_batch_end(self, trainer, *args):
        self._reached(trainer, "batch end")

    def on_validation_batch_end(self, trainer, *args):
        self._reached(trainer, "validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self._reached(trainer, "epoch end")

    def on_save_checkpoint(self, trainer, *args):
        self._reached(trainer, "save")


def until_one_dies(pids, delay):
    """Waits until all have ended or one was killed, then kills the others, as a launcher does; whether one was.

    Args:
        pids: The processes.
        delay: Seconds after which all are killed, whatever they do; None for never.
    """
    begun, flags = time.monotonic(), os.WEXITED | os.WNOHANG | os.WNOWAIT
    while (took := time.monotonic() - begun) < LIMIT:
        ended = [os.waitid(os.P_PID, pid, flags) for pid in pids]
        was_killed = any(each is not None and each.si_code == os.CLD_KILLED for each in ended)
        if was_killed or (delay is not None and took > delay):
            time.sleep(random.random() * 0.02)
            for pid in pids:
                os.killpg(pid, signal.SIGKILL)
            return True
        if all(each is not None for each in ended):
            return False
        time.sleep(0.002)
    return False


def attempt(folder, kind, settings, seed, fault):
    """One start of a run, from its last checkpoint if there is one.

    Returns:
        How each process ended, whether one was killed, and whether the run was resumed.
    """
    world, last = KINDS[kind], folder / "last.ckpt"
    ckpt_path = last if last.exists() else None
    own = seed if ckpt_path is None else random.randrange(1 << 30)  # a resumed run must not need the seed
    place, count, rank, delay = fault
    callbacks = [Dies(folder, place, count, rank), Saves(folder)]  # it dies before the save of the same moment
    function = partial(whole_run.run, kind, world, own, *callbacks, ckpt_path=ckpt_path, **settings)
    pids, results = start(function, world)
    was_killed = until_one_dies(pids, delay)
    return finish(pids, results, LIMIT), was_killed, ckpt_path is not None


def draw_fault(world):
    """At a place that comes soon, so that several kills fall into one epoch; or at any moment."""
    place = random.choice(PLACES)
    count = 1 if place in ("validation", "epoch end") else random.randint(1, 4)
    delay = random.random() * 0.8 if random.random() < 0.25 else None
    return place, count, random.randrange(world), delay


def chain(folder, kind, settings, seed, whole, faults):
    """Kills a run by one fault after the other, resumes it each time, and compares its end; counts."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    counts, by_epoch, faults = Counter(), Counter(), [*faults, NO_FAULT]
    while True:
        fault = faults[0]
        ended, was_killed, is_resumed = attempt(folder, kind, settings, seed, fault)
        counts["resumes"] += is_resumed
        if was_killed:
            faults.pop(0)
            at = "any moment" if fault[3] is not None else fault[0]
            counts.update(["kills", f"kills: {at}"])
            mark = folder / MARK
            if mark.exists():
                by_epoch[mark.read_text()] += 1
                mark.unlink()
            continue
        results = [each.value for each in ended]
        if errors := [each.error for each in ended if each.error or each.value is None]:
            print(f"{kind} {settings} {seed}: {errors[0] or 'it hangs'}", flush=True)
            return counts + Counter(failed=1)
        parts = {part for one, other in zip(whole, results, strict=True) for part in whole_run.differing(one, other)}
        if parts:
            print(f"{kind} {settings} {seed}: {sorted(parts)} differ", flush=True)
        counts[f"{'mismatches' if parts else 'byte-equal'}"] += 1
        counts["with three kills in an epoch"] += max(by_epoch.values(), default=0) >= 3
        return counts


def campaign(folder, seconds, seed):
    """Chains of kills over all kinds of runs in turn, for so long; the counts, in all and by kind."""
    random.seed(seed)
    end, total, kinds, number = time.monotonic() + seconds, Counter(), {kind: Counter() for kind in KINDS}, 0
    wholes = {}
    while time.monotonic() < end or number < len(KINDS):
        kind = [*KINDS][number % len(KINDS)]
        settings = SETTINGS[(number // len(KINDS)) % (len(SETTINGS) - (kind != "one"))]  # the scaler in one process
        key = kind, str(settings)
        if key not in wholes:
            wholes[key] = values(partial(whole_run.run, kind, KINDS[kind], 1, **settings), KINDS[kind])
        faults = [draw_fault(KINDS[kind]) for _ in range(random.randint(3, MOST_KILLS) if seconds else 1)]
        if "window" in settings:
            faults.insert(0, BEFORE_THE_FIRST_STEP)
        counts = chain(folder / "run", kind, settings, 1, wholes[key], faults)
        total.update(counts), kinds[kind].update(counts)
        number += 1
    return {"chains": number, **total, "kinds": {kind: dict(counts) for kind, counts in kinds.items()}}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    folder, minutes = Path(sys.argv[1]), float(sys.argv[2])
    seed = int(sys.argv[3]) if len(sys.argv) > 3 else random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}", flush=True)
    result = campaign(folder, minutes * 60, seed)
    torch.save(result, folder / "result.pt")
    print(json.dumps(result))
    sys.exit(bool(result.get("mismatches") or result.get("failed")))
