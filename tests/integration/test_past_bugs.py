# SPDX-License-Identifier: Apache-2.0
"""Faults that other libraries had in exact resume and checkpoints, each put into this one: a check must fail with it.

`docs/distributed.md` lists them with their sources.
"""

import copy
import io
import os
import resource
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import past_bugs_worker
import test_left_out as left_out
import whole_run
from test_left_out import SaveAt, runs  # noqa: F401  a fixture

from lightning_optkit.callbacks import (
    ExactResume,
    SafeCheckpointIO,
    _order_of_epoch,
    _saved_data,
    exact_resume,
    safe_checkpoint_io,
)
from lightning_optkit.callbacks.seams import sealed_files, sharded_saves, whole_checkpoints
from lightning_optkit.callbacks.seams.whole_checkpoints import damage_of
from tests.workers import launch

pytestmark = pytest.mark.filterwarnings("ignore")

# --- the faults: each replaces a function of this package ---


def iterator_made_after(monkeypatch):
    def begins(self, run, fetcher):
        is_resumed = self._resume is not None
        real(self, run, fetcher)
        if is_resumed:
            iter(self._loaders[0])

    real = ExactResume._epoch_begins
    monkeypatch.setattr(ExactResume, "_epoch_begins", begins)


def batches_skipped_after(monkeypatch):
    def begins(self, run, fetcher):
        is_resumed = self._resume is not None
        real(self, run, fetcher)
        if is_resumed:
            _ = [self._loaders[0].dataset[index] for index in range(self._fetches * whole_run.BATCH)]

    real = ExactResume._epoch_begins
    monkeypatch.setattr(ExactResume, "_epoch_begins", begins)


def changed_fast_forward(monkeypatch, change):
    real = ExactResume._fast_forward
    monkeypatch.setattr(ExactResume, "_fast_forward", lambda self, *args: real(self, *change(self, *args)))


def steps_skipped_instead_of_batches(monkeypatch):
    changed_fast_forward(
        monkeypatch, lambda self, fetcher, epoch, batches: (fetcher, epoch, batches // whole_run.WINDOW)
    )


def epoch_of_the_sampler_reset(monkeypatch):
    real = _order_of_epoch.set_sampler_epoch
    monkeypatch.setattr(_order_of_epoch, "set_sampler_epoch", lambda loader, epoch: real(loader, 0))


def order_drawn_from_the_middle(monkeypatch):
    def change(self, fetcher, epoch, batches):
        middle = self._random_state()
        return fetcher, {**epoch, "iter": middle, "fetches": {0: middle}}, batches

    changed_fast_forward(monkeypatch, change)


def beginning_forgotten(monkeypatch):
    def fast_forward(self, *args):
        real(self, *args)
        self._epoch = {"iter": self._random_state(), "fresh": True, "fetches": {}}

    real = ExactResume._fast_forward
    monkeypatch.setattr(ExactResume, "_fast_forward", fast_forward)


def incomplete_at_first(monkeypatch):
    def fast_forward(self, fetcher, epoch, batches):
        real(self, fetcher, epoch, batches)
        self.complete_after = self._fetches + 4

    def state(self):
        whole = real_state(self)
        if self._fetches < getattr(self, "complete_after", 0):
            whole["ranks"][0]["epoch"].update(iter=self._random_state(), fetches={})
        return whole

    real, real_state = ExactResume._fast_forward, ExactResume._state
    monkeypatch.setattr(ExactResume, "_fast_forward", fast_forward)
    monkeypatch.setattr(ExactResume, "_state", state)


def skipped_in_every_epoch(monkeypatch):
    def begins(self, run, fetcher):
        was_resumed = hasattr(self, "skipped")
        if self._resume is not None:
            self.skipped = 3
        real(self, run, fetcher)
        if was_resumed:
            _ = [next(fetcher) for _ in range(self.skipped)]

    real = ExactResume._epoch_begins
    monkeypatch.setattr(ExactResume, "_epoch_begins", begins)


def processes_not_compared(monkeypatch):
    monkeypatch.setattr(_saved_data, "differences", lambda before, here: "")
    monkeypatch.setattr(exact_resume, "fill_in", lambda ranks, rank, mine: None)


def marker_without_content(monkeypatch):
    real = sealed_files.damage_of_file
    monkeypatch.setattr(
        whole_checkpoints, "damage_of_file", lambda path: "" if sealed_files.read_seal(path) else real(path)
    )


def folder_without_parts(monkeypatch):
    monkeypatch.setattr(
        whole_checkpoints, "_damage_of_folder", lambda path, *share: "" if (path / "meta.pt").exists() else "missing"
    )


def marker_beside_the_file(monkeypatch):
    def write(target, *args, **kwargs):
        real_write(target, *args, **kwargs)
        target.with_name(f".{target.name}.committed").touch()

    real_write, real = safe_checkpoint_io.write_file, whole_checkpoints.damage_of
    monkeypatch.setattr(safe_checkpoint_io, "write_file", write)
    monkeypatch.setattr(
        whole_checkpoints,
        "damage_of",
        lambda path, *share: (
            real(path, *share) if path.with_name(f".{path.name}.committed").exists() else "it is not committed"
        ),
    )


def written_elsewhere_and_moved(monkeypatch):
    def write_file(target, write, save_id, saved_at, replaces_folder):
        with tempfile.NamedTemporaryFile(delete=False) as file:
            sealing = sealed_files.SealingFile(file)
            write(sealing)
            sealing.seal(save_id, saved_at)
        shutil.copyfile(file.name, target)  # what moving does from one file system to another
        os.unlink(file.name)

    monkeypatch.setattr(safe_checkpoint_io, "write_file", write_file)


def written_in_place(monkeypatch):
    def write_file(target, write, save_id, saved_at, replaces_folder):
        with target.open("wb") as file:
            sealing = sealed_files.SealingFile(file)
            write(sealing)
            sealing.seal(save_id, saved_at)

    monkeypatch.setattr(safe_checkpoint_io, "write_file", write_file)


# --- the checks: what is wrong, or nothing ---


def resumed(runs, folder, name, checkpoint=None, *callbacks):  # noqa: F811
    torch.save(checkpoint or runs[name][1], folder / "saved.ckpt")
    return left_out.run(name, 2, *callbacks, ckpt_path=folder / "saved.ckpt")


def is_exact(name):
    def check(runs, folder, monkeypatch):  # noqa: F811
        return whole_run.differing(runs[name][0], resumed(runs, folder, name))

    check.__name__ = f"exact: {name}"
    return check


def is_exact_twice(batch):
    """Saved again after so many batches of the same epoch."""

    def check(runs, folder, monkeypatch):  # noqa: F811
        second = folder / "second.ckpt"
        first = resumed(runs, folder, "scaled", None, SaveAt(second, (1, batch)))
        assert whole_run.differing(runs["scaled"][0], first) == []  # with the fault too
        return whole_run.differing(first, left_out.run("scaled", 3, ckpt_path=second))

    return check


def epochs_are_whole(runs, folder, monkeypatch):  # noqa: F811
    kwargs = dict(num_workers=1, persistent_workers=True, epochs=4)
    whole = whole_run.run("one", 1, 1, SaveAt(folder / "saved.ckpt"), **kwargs)
    after = whole_run.run("one", 1, 2, ckpt_path=folder / "saved.ckpt", **kwargs)
    return [places for state in (whole, after) if (places := [each[:2] for each in state["losses"]]) != EVERY_BATCH]


EVERY_BATCH = [(epoch, batch) for epoch in range(4) for batch in range(whole_run.SAMPLES // whole_run.BATCH)]


def other_processes_are_named(runs, folder, monkeypatch):  # noqa: F811
    checkpoint = copy.deepcopy(runs["workers"][1])
    checkpoint["callbacks"]["ExactResume"]["ranks"] *= 2
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        resumed(runs, folder, "workers", checkpoint)
    said = "ExactResume: the run was saved with processes 2 "
    return [] if any(str(record.message).startswith(said) for record in records) else ["nothing was said"]


def save(path, number):
    SafeCheckpointIO().save_checkpoint({"x": torch.full((9999,), float(number))}, path)
    return path


def number_in(path):
    return SafeCheckpointIO(falls_back=False).load_checkpoint(path, weights_only=True)["x"][0].item()


def half_a_file_with_its_seal_is_damaged(runs, folder, monkeypatch):  # noqa: F811
    old, new = (save(folder / name, number).read_bytes() for number, name in enumerate(("old.ckpt", "new.ckpt")))
    (folder / "old.ckpt").write_bytes(new[: len(new) // 2] + old[len(new) // 2 :])
    return [] if whole_checkpoints.damage_of(folder / "old.ckpt") else ["it is not noticed"]


def a_folder_without_a_part_is_damaged(runs, folder, monkeypatch):  # noqa: F811
    staged, target = folder / "staged", folder / "a.ckpt"
    staged.mkdir()
    names = ["__0_0.distcp", "__1_0.distcp"]
    for name in (*names, "meta.pt"):
        (staged / name).write_bytes(name.encode())
    parts = [(name, len(name), sealed_files.checksum_of(staged / name, len(name))) for name in names]
    sharded_saves._finish(SimpleNamespace(is_global_zero=True), staged, target, parts, "1" * 32, 1)
    assert not damage_of(target)
    (target / names[1]).unlink()
    return [] if damage_of(target) else ["it is not noticed"]


def a_copy_is_loaded(runs, folder, monkeypatch):  # noqa: F811
    shutil.copyfile(save(folder / "a.ckpt", 3), folder / "copy.ckpt")
    try:
        return [] if number_in(folder / "copy.ckpt") == 3 else ["another one is loaded"]
    except RuntimeError as error:
        return [str(error)]


def the_target_is_not_opened_for_writing(runs, folder, monkeypatch):  # noqa: F811
    opened, real = [], io.open

    def spy(file, mode="r", *args, **kwargs):
        opened.append(os.fspath(file) if isinstance(file, (str, Path)) and mode.strip("rbt") else "")
        return real(file, mode, *args, **kwargs)

    save(folder / "a.ckpt", 3)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", spy), patch.setattr("io.open", spy)
        save(folder / "a.ckpt", 4)
    assert any(opened) and number_in(folder / "a.ckpt") == 4
    return [path for path in opened if path == str(folder / "a.ckpt")]


def on_a_full_disk_the_one_before_is_loaded(runs, folder, monkeypatch):  # noqa: F811
    path, before = save(folder / "a.ckpt", 3), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError):
            save(path, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return [damage_of(path)] if damage_of(path) else []


BUGS = [
    (iterator_made_after, is_exact("scaled")),
    (batches_skipped_after, is_exact("scaled")),
    (steps_skipped_instead_of_batches, is_exact("workers")),
    (epoch_of_the_sampler_reset, is_exact("distributed sampler")),
    (order_drawn_from_the_middle, is_exact("scaled")),
    (beginning_forgotten, is_exact_twice(9)),
    (incomplete_at_first, is_exact_twice(7)),
    (skipped_in_every_epoch, epochs_are_whole),
    (processes_not_compared, other_processes_are_named),
    (marker_without_content, half_a_file_with_its_seal_is_damaged),
    (folder_without_parts, a_folder_without_a_part_is_damaged),
    (marker_beside_the_file, a_copy_is_loaded),
    (written_elsewhere_and_moved, the_target_is_not_opened_for_writing),
    (written_in_place, on_a_full_disk_the_one_before_is_loaded),
]


@pytest.mark.parametrize(("bug", "check"), BUGS, ids=[bug.__name__ for bug, _ in BUGS])
def test_the_check_fails_with_the_fault_alone(runs, tmp_path, monkeypatch, bug, check):  # noqa: F811
    for name in ("without", "with"):
        (tmp_path / name).mkdir()
    assert check(runs, tmp_path / "without", monkeypatch) == []
    bug(monkeypatch)
    assert check(runs, tmp_path / "with", monkeypatch) != []


def test_the_numbers_of_the_first_process_in_all(tmp_path):
    launch(Path(past_bugs_worker.__file__), tmp_path, timeout=100)
    result = torch.load(tmp_path / "result.pt")
    assert result["without"] == [[], []]
    assert result["with"][0] != [] and result["with"][1] != []
