# SPDX-License-Identifier: Apache-2.0
"""ExactResume says what of the data is not as it was saved, and nothing of what is."""

import warnings

import pytest
import torch
from exact_resume_cases import Dropping, Plain, SaveAt, Stateful
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from lightning_optkit.callbacks import BatchSizeSchedule, ExactResume

pytestmark = pytest.mark.filterwarnings("ignore")


class Longer(Plain):
    def __len__(self):
        return 12


def plain(data=None, batch_size=2, **kwargs):
    return lambda: DataLoader(data or Plain(), batch_size, **{"shuffle": True, **kwargs})


CHANGED = {
    "samples": (plain(Longer()), "samples 10, .*goes on with samples 12"),
    "fewer samples": (plain(list(range(4)), batch_size=2), "samples 10, .*goes on with samples 4"),
    "batch size": (plain(batch_size=5), "batch size 2, .*goes on with batch size 5"),
    "drop_last": (plain(drop_last=True), "drop_last False and goes on with drop_last True"),
    "order": (plain(shuffle=False), r"sampler RandomSampler\(replacement=False\) and goes on with sampler Seq"),
    "replacement": (
        plain(shuffle=None, sampler=torch.utils.data.RandomSampler(Plain(), replacement=True)),
        r"goes on with sampler RandomSampler\(replacement=True\)",
    ),
    "batch sampler": (
        lambda: DataLoader(Plain(), batch_sampler=torch.utils.data.BatchSampler(range(10), 2, drop_last=False)),
        r"goes on with sampler BatchSampler\(\)",
    ),
    "generator": (plain(generator=torch.Generator()), "own generators 0 and goes on with own generators 1"),
    "loaders": (lambda: CombinedLoader([plain()(), plain()()]), r"loaders 1, .*goes on with loaders 2"),
}


@pytest.mark.parametrize("where", [(1, 2), (1, "end")], ids=str)
@pytest.mark.parametrize("case", CHANGED)
@pytest.mark.filterwarnings("default")
def test_says_what_is_not_as_it_was(make_trainer, tmp_path, case, where):
    path, (changed, message) = tmp_path / "saved.ckpt", CHANGED[case]
    make_trainer(ExactResume(), SaveAt(path, where), epochs=2).fit(Dropping(), plain()())
    module = Dropping()
    module.training_step = lambda batch, batch_idx: module.net(torch.ones(2, 4)).square().mean()
    with pytest.warns(UserWarning, match=rf"^ExactResume: the run was saved with .*{message}.*; it is not exact\.$"):
        make_trainer(ExactResume(), epochs=3).fit(module, changed(), ckpt_path=path)


@pytest.mark.filterwarnings("default")
def test_says_that_the_batches_of_an_epoch_are_others(make_trainer, tmp_path):
    path = tmp_path / "saved.ckpt"
    make_trainer(ExactResume(), SaveAt(path, (1, 2)), epochs=2).fit(Dropping(), plain()())
    with pytest.warns(UserWarning, match=r"batches per epoch 5 and goes on with batches per epoch 4; it is not exact"):
        make_trainer(ExactResume(), epochs=3, limit_train_batches=4).fit(Dropping(), plain()(), ckpt_path=path)


@pytest.mark.filterwarnings("default")
def test_says_that_workers_draw_others(make_trainer, tmp_path):
    path = tmp_path / "saved.ckpt"
    make_trainer(ExactResume(), SaveAt(path, (1, 2)), epochs=2).fit(Dropping(), plain()())
    with pytest.warns(UserWarning, match=r"with num_workers 0 and goes on with num_workers 1; what its data set draws"):
        make_trainer(ExactResume(), epochs=3).fit(Dropping(), plain(num_workers=1)(), ckpt_path=path)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.filterwarnings("default")
def test_says_that_workers_of_loaders_that_restore_themselves_draw_others(make_trainer, tmp_path, num_workers):
    path = tmp_path / "saved.ckpt"
    make = lambda: Stateful(Plain(), batch_size=2, shuffle=True, num_workers=num_workers)  # noqa: E731
    make_trainer(ExactResume(), SaveAt(path, (1, 2)), epochs=2).fit(Dropping(), make())
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        make_trainer(ExactResume(), epochs=3).fit(Dropping(), make(), ckpt_path=path)
    expected = "ExactResume: a loader that restores itself does not restore what its workers draw."
    assert said(records) == [expected] * num_workers


def said(records):
    return [str(record.message) for record in records if "ExactResume" in str(record.message)]


SAME = {
    "batch size schedule": (lambda: [BatchSizeSchedule({1: 5}, verbose=False)], {}),
    "reloaded": (list, dict(reload_dataloaders_every_n_epochs=1)),
    "another length of the run": (list, dict(max_steps=12)),
}


@pytest.mark.parametrize("where", [(0, 2), (0, "end"), (1, 1)], ids=str)
@pytest.mark.parametrize("case", SAME)
@pytest.mark.filterwarnings("default")
def test_says_nothing_of_what_is_as_it_was(make_trainer, tmp_path, case, where):
    path, (make, kwargs) = tmp_path / "saved.ckpt", SAME[case]
    make_trainer(ExactResume(), *make(), SaveAt(path, where), epochs=2).fit(Dropping(), plain()())
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        make_trainer(ExactResume(), *make(), epochs=3, **kwargs).fit(Dropping(), plain()(), ckpt_path=path)
    assert said(records) == []


@pytest.mark.filterwarnings("default")
def test_a_checkpoint_that_says_nothing_of_the_data_is_resumed(make_trainer, tmp_path):
    path = tmp_path / "saved.ckpt"
    make_trainer(ExactResume(), SaveAt(path, (1, 2)), epochs=2).fit(Dropping(), plain()())
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["ExactResume"]["loaders"], checkpoint["callbacks"]["ExactResume"]["num_workers"]
    torch.save(checkpoint, path)
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        make_trainer(ExactResume(), epochs=3).fit(Dropping(), plain()(), ckpt_path=path)
    assert said(records) == []
