# SPDX-License-Identifier: Apache-2.0
"""Kills processes and damages files, and counts what was not noticed or not recovered.

Usage: python torture.py FOLDER KILLS: so many processes are killed while they save
checkpoints in a loop, and a file is damaged as often in each of four ways. The exit status is 1 if anything was lost.
"""

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from lightning_optkit.callbacks import SafeCheckpointIO
from lightning_optkit.callbacks.seams.whole_checkpoints import damage_of, saved_at

TENSORS, PAGE = 8, 4096


def content(number):
    """A checkpoint of one number, so that one of two saves is noticed."""
    return {"number": number, "state_dict": {f"{i}": torch.full((64, 256), float(number)) for i in range(TENSORS)}}


def save_for_ever(folder):
    """Saves last.ckpt and a file of another name each time, as ModelCheckpoint does, and removes all but two."""
    io, number = SafeCheckpointIO(), int(time.time())
    while True:
        number += 1
        io.save_checkpoint(content(number), folder / f"{number}.ckpt")
        io.save_checkpoint(content(number), folder / "last.ckpt")
        for old in sorted(folder.glob("[0-9]*.ckpt"))[:-2]:
            io.remove_checkpoint(old)


def is_consistent(checkpoint):
    return all((each == checkpoint["number"]).all() for each in checkpoint["state_dict"].values())


def kill_while_saving(folder, kills):
    """How many kills left last.ckpt damaged, gone or of two saves, and how many left other files behind."""
    io, lost = SafeCheckpointIO(falls_back=False), 0
    io.save_checkpoint(content(1), folder / "last.ckpt")
    for _ in range(kills):
        before = saved_at(folder / "last.ckpt")
        if (child := os.fork()) == 0:
            save_for_ever(folder)
        while saved_at(folder / "last.ckpt") == before:  # until it saves
            time.sleep(0.0005)
        time.sleep(random.random() * 0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        damaged = [path for path in folder.glob("*.ckpt") if damage_of(path)]
        lost += bool(damaged) or not is_consistent(io.load_checkpoint(folder / "last.ckpt", weights_only=True))
    io.save_checkpoint(content(2), folder / "last.ckpt")
    orphans = [path for path in folder.glob(".*") if path.stat().st_size]
    return {"kills": kills, "lost": lost, "orphans": len(orphans)}


# --- damage ---


def truncated(data):
    return data[: random.randrange(len(data))]


def with_a_bit_flipped(data):
    data, place = bytearray(data), random.randrange(len(data))
    data[place] ^= 1 << random.randrange(8)
    return bytes(data)


def with_a_page_zeroed(data):
    pages = [start for start in range(0, len(data), PAGE) if any(data[start : start + PAGE])]
    start = random.choice(pages)
    return data[:start] + bytes(len(data[start : start + PAGE])) + data[start + PAGE :]


def grown(data):
    return data + bytes(random.randrange(1, PAGE))


DAMAGES = [truncated, with_a_bit_flipped, with_a_page_zeroed, grown]


def unnoticed(path, checkpoint, number, damages=DAMAGES):
    """How many of so many damages of each kind to a file were not noticed in its checkpoint; it is left whole."""
    whole, counts = path.read_bytes(), {}
    for damage in damages:
        counts[damage.__name__] = 0
        for _ in range(number):
            path.write_bytes(damage(whole))
            counts[damage.__name__] += not damage_of(checkpoint)
    path.write_bytes(whole)
    assert not damage_of(checkpoint)
    return counts


def unnoticed_in_folder(folder, other, number):
    """The same of every part of a sharded checkpoint, of parts that are missing, and of parts of another save."""
    counts = {}
    for part in sorted(folder.iterdir()):
        counts[part.name] = unnoticed(part, folder, number)
        whole, others = part.read_bytes(), (other / part.name).read_bytes()
        part.unlink()
        counts[part.name]["missing"] = int(not damage_of(folder))
        part.write_bytes(others)
        counts[part.name]["of another save"] = int(whole != others and not damage_of(folder))
        part.write_bytes(whole)
    assert not damage_of(folder)
    return counts


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    result = kill_while_saving(folder, kills)
    result["unnoticed"] = sum(unnoticed(folder / "last.ckpt", folder / "last.ckpt", kills).values())
    torch.save(result, folder / "result.pt")
    print(result)
    sys.exit(bool(result["lost"] or result["orphans"] or result["unnoticed"]))
