# SPDX-License-Identifier: Apache-2.0
"""PowerSnapshots: the files of a run give the average of any length, whole, resumed and with any optimizer."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_optkit.averaging import EMA, PowerEMA, post_hoc_ema, stored_snapshots
from lightning_optkit.callbacks import Fuse, PowerSnapshots, WeightAveraging


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.05)


class Trained(Callback):
    """The weights after every step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2 == 1:
            self.weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def power_ema(weights, std):
    """The average of the paper, one update after another."""
    average = PowerEMA(std)
    current = weights[0]
    for n, now in enumerate(weights[1:], start=1):
        decay = average.decay_at(0.0, n)
        current = {name: decay * value + (1 - decay) * now[name] for name, value in current.items()}
    return current


def two(folder, every):
    return (
        WeightAveraging(PowerEMA(0.05)),
        WeightAveraging(PowerEMA(0.1), evaluate=False),
        PowerSnapshots(folder, every),
    )


@pytest.mark.parametrize("fuse", [[], [Fuse]], ids=["own pass", "folded"])
@pytest.mark.parametrize(("every", "counts"), [(2, [2, 4, 6]), (4, [4, 6]), (1 / 3, [2, 4, 6]), (100, [6])])
def test_every_average_is_written_whole(regression, fit, tmp_path, fuse, every, counts):
    trained = Trained()
    fit(regression(adamw), trained, *(make() for make in fuse), *two(tmp_path / "a" / "b", every))
    found = stored_snapshots(tmp_path / "a" / "b")
    assert [(each.num_averaged, each.std) for each in found] == [(n, std) for n in counts for std in (0.05, 0.1)]
    assert len(list((tmp_path / "a" / "b").iterdir())) == len(found)
    for each in found:
        stored = torch.load(each.checkpoint, weights_only=True)["state_dict"]
        torch.testing.assert_close(stored, power_ema(trained.weights[: each.num_averaged], each.std), rtol=0, atol=1e-6)


def test_the_files_give_an_average_of_another_length(regression, fit, tmp_path):
    trained, module = Trained(), regression(adamw)
    fit(module, trained, *two(tmp_path, 1), epochs=20)
    made = post_hoc_ema(stored_snapshots(tmp_path), std=0.075)
    expected = power_ema(trained.weights, 0.075)
    for name, value in expected.items():
        error = (made[name] - value).norm() / (trained.weights[-1][name] - value).norm()
        assert error < 0.05


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
@pytest.mark.parametrize("every", [2, 1 / 3])
def test_a_resumed_run_writes_what_the_whole_one_wrote(regression, fit, tmp_path, every):
    saver = ModelCheckpoint(dirpath=tmp_path / "runs", every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fit(regression(adamw), *two(tmp_path / "whole", every), saver, enable_checkpointing=True)
    for name in ("epoch=0", "epoch=1"):
        folder = tmp_path / name
        fit(regression(adamw), *two(folder, every), ckpt_path=tmp_path / "runs" / f"{name}.ckpt")
        for each in stored_snapshots(folder):
            stored = torch.load(each.checkpoint, weights_only=True)["state_dict"]
            same = torch.load(tmp_path / "whole" / each.checkpoint.name, weights_only=True)["state_dict"]
            torch.testing.assert_close(stored, same, rtol=0, atol=0)
        assert stored_snapshots(folder)[-1].num_averaged == 6


def test_the_trained_weights_stay_and_an_average_that_starts_later_has_fewer_updates(regression, fit, tmp_path):
    module, plain = regression(adamw), regression(adamw)
    late = WeightAveraging(PowerEMA(0.1, start=2, start_interval="epoch", every=2), evaluate=False)
    fit(module, late, PowerSnapshots(tmp_path, 1))
    fit(plain)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert [each.num_averaged for each in stored_snapshots(tmp_path)] == [1, 2]  # steps 3 and 5 of 6


def test_without_such_an_average_it_is_refused(regression, fit, tmp_path):
    with pytest.raises(ValueError, match=r"PowerSnapshots\(dirpath=.*\): the run has no PowerEMA; add WeightAveraging"):
        fit(regression(adamw), WeightAveraging(EMA(0.9)), PowerSnapshots(tmp_path))


def test_a_fraction_of_a_run_without_an_end_is_refused(regression, fit, tmp_path):
    with pytest.raises(
        ValueError, match=r"PowerSnapshots\(every=0.5\): every must be a number of steps where the length"
    ):
        fit(regression(adamw), *two(tmp_path, 0.5), epochs=-1)


@pytest.mark.parametrize(
    ("every", "message"),
    [(0, r"every=0\): every must be an integer >= 1"), (1.5, r"every=1.5\): every must be in \(0, 1\]")],
)
def test_wrong_arguments_are_refused(every, message):
    with pytest.raises(ValueError, match=message):
        PowerSnapshots("snapshots", every)


def test_a_folder_without_files_of_its_own_is_refused(tmp_path):
    (tmp_path / "other.pt").touch()
    with pytest.raises(
        ValueError, match=r"stored_snapshots\(dirpath=.*\): it must be a folder with files of PowerSnap"
    ):
        stored_snapshots(tmp_path)
    with pytest.raises(FileNotFoundError):
        stored_snapshots(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copied", "pickled"]
)
def test_after_a_fit_it_is_copied_and_the_copy_writes_the_same(regression, fit, tmp_path, copied):
    original = PowerSnapshots(tmp_path, 2)
    fit(regression(adamw), *two(tmp_path, 2)[:2], original)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before
    for path in tmp_path.iterdir():
        path.unlink()
    fit(regression(adamw), *two(tmp_path, 2)[:2], copied(original))
    assert before.keys() == {path.name for path in tmp_path.iterdir()}
