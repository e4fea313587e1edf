# SPDX-License-Identifier: Apache-2.0
"""SafeCheckpointIO and the folders of sharded checkpoints."""

import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

from lightning_optkit.callbacks import SafeCheckpointIO
from lightning_optkit.callbacks.seams import staged_paths
from lightning_optkit.callbacks.seams.staged_paths import staged_path
from lightning_optkit.callbacks.seams.whole_checkpoints import damage_of, whole_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))
import torture
from safe_checkpoint_cases import CONTENT, bend, load, names, save

from tests.workers import launch


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    launch(Path(__file__).with_name("sharded_saves_worker.py"), folder, processes=2, timeout=100)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["sharded", "full"])
def test_fsdp2_falls_back_to_the_newest_whole_one(two_processes, kind):
    """In a fit of a Trainer that has evaluated, and in an evaluation."""
    for rank, results in enumerate(two_processes[1]):
        case = results[kind]
        assert case["whole"]["said"] == case["resumed"]["said"] == []
        for name in ("resumed", "before"):
            torch.testing.assert_close(case[name]["weights"], case["whole"]["weights"], rtol=0, atol=0)
        said = [] if rank else [f"/{kind}/last.ckpt is damaged", f"/{kind}/1.ckpt is loaded instead, the newest whole"]
        for name in ("before", "evaluated"):
            assert len(case[name]["said"]) == (not rank)
            assert all(part in case[name]["said"][0] for part in said)
        assert "last.ckpt is damaged" in case["none"]["error"] and "restore a copy" in case["none"]["error"]


@pytest.fixture
def folders(two_processes, tmp_path):
    """Two saves of one run, of two processes."""
    for name in ("1.ckpt", "3.ckpt"):
        shutil.copytree(two_processes[0] / name, tmp_path / name)
    return tmp_path / "1.ckpt", tmp_path / "3.ckpt"


def test_every_damage_of_a_folder_is_noticed(folders):
    random.seed(2)
    assert names(folders[1]) == [".metadata", "__0_0.distcp", "__1_0.distcp", "checksums.txt", "meta.pt"]
    counts = torture.unnoticed_in_folder(folders[1], folders[0], 8)
    assert {sum(part.values()) for part in counts.values()} == {0}


def test_a_folder_of_lightning_is_loaded(folders):
    for path in folders[1].iterdir():
        if path.name == "meta.pt":
            torch.save(torch.load(path, weights_only=True), path)
    (folders[1] / "checksums.txt").unlink()
    assert damage_of(folders[1]) == ""
    bend(folders[1] / "meta.pt")
    assert damage_of(folders[1])


def test_killed_between_the_renames_of_two_folders(folders):
    """Where a file system cannot exchange two names in one step."""
    folder = folders[0].parent
    last, staged = folder / "last.ckpt", staged_path(folder / "last.ckpt", "5" * 32)
    folders[1].rename(staged)
    save(folder / "x.ckpt")  # sweeps
    assert staged.exists()
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged \(it is missing\); .*saving is loaded instead"):
        assert whole_checkpoint(last, True) == staged
    folders[0].rename(last)
    save(folder / "x.ckpt")
    assert names(folder) == ["last.ckpt", "x.ckpt"]


def test_folders_are_replaced_and_removed(folders, monkeypatch):
    from lightning_optkit.callbacks.seams import staged_paths

    for exchanges in (True, False):
        if not exchanges:
            monkeypatch.setattr(staged_paths, "_exchange", lambda one, other: False)
        staged = staged_path(folders[0], "6" * 32)
        shutil.copytree(folders[1], staged)
        staged_paths.put_in_place(staged, folders[0])
        assert names(folders[0].parent) == sorted([staged.name, "1.ckpt", "3.ckpt"])
        assert (folders[0] / "meta.pt").read_bytes() == (folders[1] / "meta.pt").read_bytes()
        shutil.rmtree(staged)
    SafeCheckpointIO().remove_checkpoint(folders[0])
    assert names(folders[0].parent) == ["3.ckpt"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_file_takes_the_place_of_a_sharded_folder_and_of_no_other(folders, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(staged_paths, "_exchange", lambda one, other: False)
    content = load(save(folders[0]))
    assert content.keys() == CONTENT.keys() and names(folders[0].parent) == ["1.ckpt", "3.ckpt"]
    (folders[1] / "meta.pt").unlink()
    with pytest.raises(IsADirectoryError, match=r"3\.ckpt was not written .* as it was before"):
        save(folders[1])
    assert len(names(folders[1])) == 4 and names(folders[1].parent) == ["1.ckpt", "3.ckpt"]


def test_a_folder_is_gathered_for_one_process(folders):
    loaded = load(folders[1])
    (state,) = loaded["optimizer_states"]
    assert sorted(state["parameter_names"].values()) == sorted(name for name in loaded["state_dict"])
    for number, name in state["parameter_names"].items():
        moments = [value for value in state["state"][number].values() if value.numel() > 1]
        assert moments and all(each.shape == loaded["state_dict"][name].shape for each in moments)
