# SPDX-License-Identifier: Apache-2.0
"""Resumed within an epoch with other processes or batches, every sample of the epoch is seen once."""

import logging
import warnings
from collections import Counter
from pathlib import Path

import elastic_worker
import lightning.pytorch as pl
import pytest
import torch
from elastic_worker import BATCH, SAMPLES
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_optkit.callbacks import ExactResume
from lightning_optkit.callbacks._gradients_of_processes import mean_gradients
from tests.workers import launch

pytestmark = pytest.mark.filterwarnings("ignore")
ONCE = "each sample of the epoch is seen once, but batches and random numbers are others; it is not exact."


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """What the runs of several processes saw, and the folder of their checkpoints."""
    folder = tmp_path_factory.mktemp("elastic")
    launch(Path(elastic_worker.__file__), folder, timeout=200)
    return {**torch.load(folder / "result.pt", weights_only=False), "folder": folder}


def seen(parts, epoch):
    return Counter(sample for part in parts for rank in part for sample in rank["seen"].get(epoch, ()))


@pytest.mark.parametrize("name", elastic_worker.PATHS)
def test_every_sample_of_the_epoch_is_seen_once(several, name):
    parts = several["result"][name]
    counts = seen(parts, 1)
    worlds = [world for _, world, _ in elastic_worker.PATHS[name]]
    padding = (-(SAMPLES - sum(seen(parts[:-1], 1).values()))) % worlds[-1]  # of the last batches of all processes
    assert set(counts) == {*range(SAMPLES)} and counts.total() == SAMPLES + padding
    later = seen(parts[-1:], 2)
    assert set(later) == {*range(SAMPLES)} and later.total() == SAMPLES + -SAMPLES % worlds[-1]
    assert not seen(parts[-1:], 3)


@pytest.mark.parametrize("name", elastic_worker.PATHS)
def test_it_says_that_order_and_bits_differ(several, name):
    (said, *others) = several["result"][name][1][0]["said"]
    assert not others and "ExactResume: the run was saved with processes " in said
    assert said.endswith(ONCE if name != "last batch" else "; batches and random numbers are others; it is not exact.")


@pytest.mark.parametrize("name", ["2 to 1", "2 to 3"])
def test_a_second_resume_in_the_same_epoch_is_exact(several, name):
    once, twice = several["result"][name][-1], several["result"][f"{name} to {name[-1]}"][-1]
    for rank, (one, two) in enumerate(zip(once, twice, strict=True)):
        torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=0)
        assert two["said"] == [] and two["seen"][2] == one["seen"][2]
        assert one["seen"][1][-len(two["seen"][1]) :] == two["seen"][1], rank


@pytest.mark.parametrize("name", ["2", "fsdp 2"])
def test_within_a_window_it_is_exact_in_several_processes(several, name):
    (whole,), (_, resumed) = several["windows"][name], several["windows"][f"{name} to 2"]
    for one, two in zip(whole, resumed, strict=True):
        assert two["said"] == []
        torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("name, missing", [("2 to 1", 1), ("fsdp 2 to ddp 3", 2), ("2 to fsdp 2", 1)])
def test_the_window_goes_on_with_the_mean_over_the_processes_before(several, name, missing):
    before, after = several["windows"][name]
    path = several["folder"] / f"window {name} 0.ckpt"
    net = nn.Linear(2, 8)
    net.load_state_dict({key.removeprefix("net."): value for key, value in torch.load(path)["state_dict"].items()})
    first = [rank["seen"][1][: 3 * BATCH] for rank in before]
    then = [rank["seen"][1][: missing * BATCH] for rank in after]
    for seen_by in (first, then):
        for batch in torch.tensor(seen_by).float().view(-1, BATCH, 1).expand(-1, -1, 2):
            (elastic_worker.loss(net, batch) / 4 / len(seen_by)).backward()
    for rank in after:
        torch.testing.assert_close(rank["grads"][0], net.weight.grad)
    assert not any("misses the gradients" in each for rank in after for each in rank["said"])


def entry(part, shape, rows):
    return {"weight": {"part": torch.tensor(part), "shape": shape, "rows": rows}}


@pytest.mark.parametrize(
    "processes, mean",
    [
        ([entry([4.0, 2.0], (2,), False), {}], [2.0, 1.0]),  # DDP with find_unused_parameters=True: it adds nothing
        ([{}, entry([4.0, 2.0], (2,), False)], [2.0, 1.0]),
        ([entry([1.0, 2.0], (3,), True), entry([3.0], (3,), True)], [1.0, 2.0, 3.0]),
        ([entry([5.0], (1,), True), entry([], (1,), True)], [5.0]),
        ([{"weight": {"part": torch.tensor([1.0]), "shape": (2,)}}] * 2, [1.0, 1.0]),  # of an older version
    ],
)
def test_the_mean_of_gradients_of_which_some_are_missing_or_sharded(processes, mean):
    assert mean_gradients(processes)["weight"]["part"].tolist() == mean


@pytest.mark.parametrize("other", [{}, entry([1.0, 2.0], (4,), False)], ids=["a part is missing", "columns"])
def test_it_says_that_parts_of_a_gradient_are_not_put_together(other):
    with pytest.warns(UserWarning, match="misses the gradients of its batches .* resume from one that was saved after"):
        assert mean_gradients([entry([1.0, 2.0], (4,), bool(not other)), other]) == {}


# --- one process, another batch size ---


class Seeing(elastic_worker.Net):
    def configure_model(self):
        pass


def fit(folder, make, ckpt_path=None, at=None, **kwargs):
    """What was seen, by epoch, and said."""
    module = Seeing()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[ExactResume(), *([] if at is None else [elastic_worker.SaveAt(folder / "saved.ckpt", at)])],
        **{"max_epochs": 3, **kwargs},
    )
    torch.manual_seed(1 if ckpt_path is None else 2)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        trainer.fit(module, make(), ckpt_path=ckpt_path)
    return module.seen, [str(record.message) for record in records if "ExactResume" in str(record.message)]


def loader(batch_size, samples=23, **kwargs):
    data = TensorDataset(torch.arange(samples).float()[:, None].expand(samples, 2))
    return lambda: DataLoader(data, batch_size, **{"shuffle": True, **kwargs})


def with_generator(batch_size):
    return lambda: loader(batch_size, generator=torch.Generator().manual_seed(5))()


CASES = {
    "larger": (loader(4), loader(7)),
    "smaller": (loader(4), loader(3)),
    "in order": (loader(4, shuffle=False), loader(7, shuffle=False)),
    "own generator": (with_generator(4), with_generator(7)),
    "workers": (loader(4, num_workers=1), loader(7, num_workers=2)),
    "persistent workers": (
        loader(4, num_workers=1, persistent_workers=True),
        loader(7, num_workers=1, persistent_workers=True),
    ),
    "no workers then": (loader(4, num_workers=1), loader(7)),
    "larger than what is left": (loader(4), loader(20)),
}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("case", CASES)
def test_with_another_batch_size_every_sample_is_seen_once(tmp_path, case, at):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    first, second = CASES[case]
    before, _ = fit(tmp_path, first, at=at)
    after, said = fit(tmp_path, second, ckpt_path=tmp_path / "saved.ckpt")
    assert sorted([*before[1], *after[1]]) == [*range(23)]
    assert sorted(after[2]) == [*range(23)] and 3 not in after
    assert sum(each.endswith(ONCE) for each in said) == 1


def test_incomplete_batches_are_left_out_as_in_every_epoch(tmp_path):
    before, _ = fit(tmp_path, loader(4, drop_last=True), at=1)
    after, _ = fit(tmp_path, loader(6, drop_last=True), ckpt_path=tmp_path / "saved.ckpt")
    together = [*before[1], *after[1]]
    assert len(together) == len({*together}) == 8 + 12
    before, _ = fit(tmp_path, loader(4, drop_last=True), at=3)
    after, _ = fit(tmp_path, loader(20, drop_last=True), ckpt_path=tmp_path / "saved.ckpt")
    assert {*range(23)} == {*before[1], *after[1]}
    assert len(after[1]) == len(after[2]) == 20  # a whole batch, though only seven samples are left


@pytest.mark.parametrize(
    "second",
    [loader(7, 24), loader(7, shuffle=False), loader(7, shuffle=None, sampler=RandomSampler(range(23), True))],
    ids=["other samples", "other order", "replacement"],
)
def test_other_data_are_not_dealt_anew(tmp_path, second):
    fit(tmp_path, loader(4), at=2)
    _, (said,) = fit(tmp_path, second, ckpt_path=tmp_path / "saved.ckpt")
    assert said.endswith("; it is not exact.") and "each sample" not in said


def test_an_epoch_that_is_cut_short_is_not_dealt_anew(tmp_path):
    fit(tmp_path, loader(4), at=1, limit_train_batches=3)
    _, (said,) = fit(tmp_path, loader(7), ckpt_path=tmp_path / "saved.ckpt", limit_train_batches=3)
    assert "each sample" not in said


def test_the_loader_keeps_its_own_order(tmp_path):
    fit(tmp_path, loader(4), at=2)
    kept = loader(7)()
    fit(tmp_path, lambda: kept, ckpt_path=tmp_path / "saved.ckpt", max_epochs=2)
    assert type(kept.batch_sampler.sampler) is RandomSampler and sorted(kept.sampler) == [*range(23)]
