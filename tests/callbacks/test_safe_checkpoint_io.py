# SPDX-License-Identifier: Apache-2.0
"""SafeCheckpointIO and single files: every damage is noticed and said, and a save that fails leaves the one before."""

import errno
import os
import random
import re
import resource
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_optkit.callbacks import SafeCheckpointIO
from lightning_optkit.callbacks.seams import staged_paths
from lightning_optkit.callbacks.seams.sealed_files import Seal, checksum_of, seal_file
from lightning_optkit.callbacks.seams.staged_paths import staged_path
from lightning_optkit.callbacks.seams.whole_checkpoints import CHECKSUMS, SHARED_STATE, damage_of

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
import torture
from safe_checkpoint_cases import CONTENT, bend, load, names, save

from tests.workers import launch

SEAL = len(Seal("0" * 32, 0, 0, 0).line())


def test_what_was_saved_is_loaded_also_by_torch(tmp_path):
    path = save(tmp_path / "new folder" / "a.ckpt")
    for loaded in (
        load(path),
        torch.load(path),
        torch.load(path, mmap=True),
        TorchCheckpointIO().load_checkpoint(path),
    ):
        torch.testing.assert_close(loaded, CONTENT, rtol=0, atol=0)
    assert names(path.parent) == ["a.ckpt"]


def test_a_file_of_lightning_is_loaded_and_its_damage_noticed(tmp_path):
    path = tmp_path / "a.ckpt"
    TorchCheckpointIO().save_checkpoint(CONTENT, path)
    torch.testing.assert_close(load(path), CONTENT, rtol=0, atol=0)
    assert torture.unnoticed(path, path, 10, [torture.truncated, torture.with_a_page_zeroed]) == {
        "truncated": 0,
        "with_a_page_zeroed": 0,
    }
    with pytest.raises(RuntimeError, match=r"a\.ckpt is damaged \(\S+ in it is not as it was saved\)"):
        load(bend(path))


def test_every_damage_is_noticed(tmp_path):
    random.seed(1)
    path = save(tmp_path / "a.ckpt")
    assert torture.unnoticed(path, path, 40) == dict.fromkeys(
        ["truncated", "with_a_bit_flipped", "with_a_page_zeroed", "grown"], 0
    )


def test_every_byte_of_the_seal_matters(tmp_path):
    path = save(tmp_path / "a.ckpt")
    whole = path.read_bytes()
    for place in range(len(whole) - 160, len(whole)):  # the end of the archive, and the seal
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert damage_of(path), place
    for length in range(len(whole) - 160, len(whole)):
        path.write_bytes(whole[:length])
        assert bool(damage_of(path)) != (length == len(whole) - SEAL), length  # without its seal, a whole file of torch


def test_the_newest_whole_one_is_loaded_instead(tmp_path):
    for number, name in enumerate(("old", "newer", "newest")):
        save(tmp_path / f"{name}.ckpt", number)
    os.utime(tmp_path / "old.ckpt")  # a copy: the time of the file says nothing
    last = save(tmp_path / "last.ckpt", 9)
    bend(last), bend(tmp_path / "newest.ckpt")
    said = (
        r"^SafeCheckpointIO: .*last\.ckpt is damaged \(it is not as it was saved\); .*newer\.ckpt is loaded instead, "
    )
    with pytest.warns(UserWarning, match=said):
        assert load(last)["number"] == 1
    with pytest.raises(RuntimeError, match=r"last\.ckpt is damaged .*: give .*newer\.ckpt, the newest whole"):
        load(last, falls_back=False)


def test_if_none_is_whole_it_says_what_to_do(tmp_path):
    last = bend(save(tmp_path / "last.ckpt"))
    with pytest.raises(
        RuntimeError, match=r"last\.ckpt is damaged \(.*\) and no whole .*: restore a copy, give another"
    ):
        load(last)
    last.write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"is damaged \(it is empty\)"):
        load(last)


@pytest.mark.parametrize("content", [b"oops", b"hello world", bytes(range(1, 200)), b"\x00\x00PK\x03\x04"], ids=repr)
def test_what_no_torch_has_written_is_damaged(tmp_path, content):
    for name in "ab":
        SafeCheckpointIO().save_checkpoint({"x": torch.ones(9)}, tmp_path / f"{name}.ckpt")
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"a\.ckpt is damaged \(it is not a file that torch saved\).*b\.ckpt is loaded"
    ):
        assert bool(SafeCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")["x"].all())


END, CHANGED = "its end is missing, or other bytes follow it", "it is not as it was saved"
DAMAGES = {  # of a file of ours, or of Lightning: what is done to its bytes, and what is said
    "cut off": (lambda b: b[: len(b) // 2], END, END),
    "cut off by a little": (lambda b: b[:-5], END, END),
    "grown": (lambda b: b + b"xx", END, END),
    "one bit": (lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 4]) + b[len(b) // 2 + 1 :], CHANGED, CHANGED),
    "first page": (lambda b: bytes(4096) + b[4096:], CHANGED, "it begins with zeros"),
    "zeros": (lambda b: bytes(len(b)), "it begins with zeros", "it begins with zeros"),
    "empty": (lambda b: b"", "it is empty", "it is empty"),
    "list of contents": (lambda b: b[:-400] + b"Z" * 300 + b[-100:], END, "its list of contents cannot be read"),
    "text": (lambda b: b"hello", "it is not a file that torch saved", "it is not a file that torch saved"),
}


@pytest.mark.parametrize("writer", ["ours", "Lightning's"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_file_is_said_in_plain_words(tmp_path, damage, writer):
    path, (change, of_ours, of_lightning) = tmp_path / "a.ckpt", DAMAGES[damage]
    kind = SafeCheckpointIO if writer == "ours" else TorchCheckpointIO
    kind().save_checkpoint({"x": torch.zeros(9000)}, path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RuntimeError) as caught:
        load(path)
    said = str(caught.value).removeprefix(f"SafeCheckpointIO: {path} is damaged (")
    wrong, next_step = said.split(") and no whole checkpoint that SafeCheckpointIO saved is beside it: ")
    assert re.sub(r"^\S+/data/0 in ", "", wrong) == (of_ours if writer == "ours" else of_lightning)
    assert next_step == "restore a copy, give another ckpt_path, or none to begin anew."


def test_a_damaged_file_of_an_old_torch_is_said_too(tmp_path):
    path = tmp_path / "old.ckpt"
    path.write_bytes(b"\x80\x02garbage")
    with pytest.raises(
        RuntimeError, match=r"^SafeCheckpointIO: .*old\.ckpt is damaged \(what it holds cannot be read\): "
    ):
        SafeCheckpointIO().load_checkpoint(path, weights_only=False)


def folder_of_parts(path):
    """As FSDP2 writes it."""
    path.mkdir()
    for name in (".metadata", "__0_0.distcp"):
        (path / name).write_bytes(b"part of " + name.encode())
    torch.save({"x": 1}, path / SHARED_STATE)
    parts = [(path / name) for name in (".metadata", "__0_0.distcp")]
    lines = [f"{checksum_of(part, part.stat().st_size):08x} {part.stat().st_size} {part.name}\n" for part in parts]
    (path / CHECKSUMS).write_text("".join(lines))
    for name in (SHARED_STATE, CHECKSUMS):
        seal_file(path / name, "0" * 32, 1)
    assert damage_of(path) == ""
    return path


def sealed_anew(path, content=None, save_id="0" * 32):
    path.write_bytes(path.read_bytes()[:-SEAL] if content is None else content)
    seal_file(path, save_id, 1)


FOLDERS = {
    "no shared state": (lambda p: (p / SHARED_STATE).unlink(), "its part meta.pt is missing"),
    "no checksums": (lambda p: (p / CHECKSUMS).unlink(), "its part checksums.txt is missing"),
    "no shard": (lambda p: (p / "__0_0.distcp").unlink(), "its part __0_0.distcp is missing"),
    "cut shard": (lambda p: (p / "__0_0.distcp").write_bytes(b"part"), "its part __0_0.distcp has 4 of 20 bytes"),
    "bent shard": (
        lambda p: (p / "__0_0.distcp").write_bytes(b"x" * 20),
        "its part __0_0.distcp is not as it was saved",
    ),
    "empty list": (lambda p: (p / CHECKSUMS).write_bytes(b""), "of its part checksums.txt: it is empty"),
    "no list": (lambda p: sealed_anew(p / CHECKSUMS, b"no list"), "its part checksums.txt is no list of parts"),
    "two saves": (
        lambda p: sealed_anew(p / CHECKSUMS, save_id="1" * 32),
        "its parts meta.pt and checksums.txt are of two different saves",
    ),
    "Lightning's, no list of torch": (
        lambda p: [
            (p / CHECKSUMS).unlink(),
            (p / ".metadata").unlink(),
            torch.save({"x": 1}, p / SHARED_STATE),
        ],
        "its part .metadata is missing",
    ),
}


@pytest.mark.parametrize("damage", FOLDERS)
def test_what_is_wrong_with_a_folder_is_said_in_plain_words(tmp_path, damage):
    path, (change, said) = folder_of_parts(tmp_path / "a.ckpt"), FOLDERS[damage]
    change(path)
    assert damage_of(path) == said


def test_a_checkpoint_of_an_old_torch_is_loaded(tmp_path):
    torch.save({"x": torch.ones(9)}, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert bool(SafeCheckpointIO().load_checkpoint(tmp_path / "old.ckpt")["x"].all())


def test_a_path_that_does_not_exist_is_not_replaced(tmp_path):
    save(tmp_path / "other.ckpt")
    with pytest.raises(
        FileNotFoundError,
        match=r"Checkpoint file not found: .*typo\.ckpt; give the path of a checkpoint, or none to begin",
    ):
        load(tmp_path / "typo.ckpt")


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 100 kB: a write fails as on a full disk, at a place within the archive."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    yield fill
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_on_a_full_disk_the_one_before_stays(tmp_path, full_disk):
    path = save(tmp_path / "a.ckpt", 3)
    full_disk()
    with pytest.raises(
        OSError, match=r"SafeCheckpointIO: .*a\.ckpt was not written \(File too large\) .*make room"
    ) as info:
        save(path, 4)
    assert info.value.errno == errno.EFBIG
    assert names(tmp_path) == ["a.ckpt"] and load(path)["number"] == 3


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_if_a_call_fails_the_one_before_stays(tmp_path, monkeypatch, call):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = save(tmp_path / "a.ckpt", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Path if call == "open" else os, call, refuse)
        with pytest.raises(
            PermissionError, match=r"a\.ckpt was not written \(Permission denied\) and is as it was before"
        ):
            save(path, 4)
    assert names(tmp_path) == ["a.ckpt"] and load(path)["number"] == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_in_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="was not written"):
        save(tmp_path / "a.ckpt")


def test_it_is_on_the_disk_before_it_is_renamed_and_the_name_after(tmp_path, monkeypatch):
    calls, real_fsync, real_replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), real_fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("renamed"), real_replace(a, b)))
    monkeypatch.setenv("TMPDIR", "/does/not/exist")
    save(tmp_path / "a.ckpt")
    file, renamed, folder = calls
    assert Path(file).parent == tmp_path and renamed == "renamed" and folder == str(tmp_path)


def test_orphans_are_swept_but_not_what_is_being_written(tmp_path):
    mine, other = staged_path(tmp_path / "a.ckpt", "1" * 32), staged_path(tmp_path / "b.ckpt", "2" * 32)
    folder, young = staged_path(tmp_path / "c.ckpt", "3" * 32), staged_path(tmp_path / "d.ckpt", "4" * 32)
    for orphan in (mine, other):
        orphan.write_bytes(b"half a checkpoint")
    folder.mkdir(), (folder / "__0_0.distcp").write_bytes(b"half"), young.touch()
    (tmp_path / ".hidden").touch()
    import fcntl

    with other.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        save(tmp_path / "a.ckpt")
        assert names(tmp_path) == sorted([".hidden", "a.ckpt", other.name, young.name])
    os.utime(young, (time.time() - 100,) * 2)
    save(tmp_path / "a.ckpt")
    assert names(tmp_path) == [".hidden", "a.ckpt"]


def test_without_locks_it_is_written_and_loaded_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(staged_paths, "fcntl", None)  # as on Windows
    io = SafeCheckpointIO()
    orphan = staged_path(tmp_path / "last.ckpt", "0" * 32)
    orphan.write_bytes(b"torn")
    for number in (1, 2):
        io.save_checkpoint(torture.content(number), tmp_path / "last.ckpt")
    assert io.load_checkpoint(tmp_path / "last.ckpt")["number"] == 2
    assert orphan.exists()  # nobody can tell whether its writer lives


def test_kills_during_saves(tmp_path):
    launch(Path(torture.__file__), tmp_path, "12", timeout=60)
    assert torch.load(tmp_path / "result.pt") == {"kills": 12, "lost": 0, "orphans": 0, "unnoticed": 0}
