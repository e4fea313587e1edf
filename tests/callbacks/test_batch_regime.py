# SPDX-License-Identifier: Apache-2.0
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_optkit.callbacks import BatchRegime, ExactAccumulation, ExactResume, Fuse

pytestmark = pytest.mark.filterwarnings("ignore")


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def trained(regression, make_trainer, loader, *callbacks, double=True, ckpt_path=None, **kwargs):
    module = regression(sgd)
    if double:
        module.loss = lambda batch: nn.functional.mse_loss(module.net(batch[0].double()), batch[1].double())
    options = {"precision": "64-true" if double else "32-true", "accumulate_grad_batches": 1, **kwargs}
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer, module.state_dict()


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        yield from (self.dataset[index] for index in range(len(self.dataset)))


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_full_equals_one_big_batch(regression, make_trainer, data, streams, double):
    loader = DataLoader(Stream(data().dataset), batch_size=3) if streams else data(3)
    trainer, parts = trained(regression, make_trainer, loader, BatchRegime("full"), double=double)
    _, whole = trained(regression, make_trainer, data(8), double=double)
    assert trainer.global_step == 3
    assert trainer.accumulate_grad_batches == 1
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-13 if double else 1e-6)


@pytest.mark.parametrize("regime, size", [("single", 1), (3, 3), (5, 5)])
@pytest.mark.parametrize("workers, streams", [(0, False), (1, False), (0, True)])
def test_a_size_equals_a_loader_of_that_size(regression, make_trainer, data, regime, size, workers, streams):
    dataset = Stream(data().dataset) if streams else data().dataset
    loader = DataLoader(dataset, batch_size=2, num_workers=workers)
    trainer, ours = trained(regression, make_trainer, loader, BatchRegime(regime), epochs=1)
    _, expected = trained(regression, make_trainer, data(size), epochs=1)
    assert trainer.global_step == -(-8 // size)
    assert loader.batch_size == loader.batch_sampler.batch_size == 2
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)


def test_accumulation_composes_with_a_size(regression, make_trainer, data):
    _, ours = trained(regression, make_trainer, data(8), BatchRegime("single"), accumulate_grad_batches=4)
    _, expected = trained(regression, make_trainer, data(4))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_full_under_fuse(regression, make_trainer, data, precision):
    weights = []
    for extra in ([], [Fuse(verbose=False)]):
        module = regression(sgd)
        options = dict(precision=precision, gradient_clip_val=0.5, accumulate_grad_batches=1)
        trainer = make_trainer(*extra, BatchRegime("full"), **options)
        trainer.fit(module, data(3))
        assert all(p.isfinite().all() for p in module.parameters())
        weights.append(module.state_dict())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)


class SaveAt(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("regime", ["full", 3])
def test_resumed_equals_uninterrupted(regression, make_trainer, data, tmp_path, regime):
    path, single = tmp_path / "saved.ckpt", dict(double=False)  # Lightning restores through fp32 under 64-true
    _, whole = trained(regression, make_trainer, data(), BatchRegime(regime), ExactResume(), SaveAt(path), **single)
    _, resumed = trained(regression, make_trainer, data(), BatchRegime(regime), ExactResume(), ckpt_path=path, **single)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


def test_an_exception_leaves_all_as_it_was(regression, make_trainer, data):
    module, loader = regression(sgd), data()

    def fails(batch):
        raise ZeroDivisionError

    for regime in ("full", 5):
        module.loss = fails
        trainer = make_trainer(BatchRegime(regime), accumulate_grad_batches=1)
        with pytest.raises(ZeroDivisionError):
            trainer.fit(module, loader)
        assert trainer.accumulate_grad_batches == 1
        assert loader.batch_size == loader.batch_sampler.batch_size == 2
        assert "training_step" not in vars(module)


def test_bad_input(regression, make_trainer, data):
    with pytest.raises(ValueError, match=r"BatchRegime\(regime='half'\): regime must be \"full\", \"single\" or"):
        BatchRegime("half")
    with pytest.raises(ValueError, match=r"BatchRegime\(regime=0\): regime must be an integer >= 1"):
        BatchRegime(0)
    with pytest.raises(ValueError, match=r"BatchRegime\(\"full\"\) and Trainer\(accumulate_grad_batches=2\)"):
        make_trainer(BatchRegime("full")).fit(regression(sgd), data())
    accumulation = GradientAccumulationScheduler({0: 2})
    with pytest.raises(ValueError, match=r"^BatchRegime\(\"full\"\) and GradientAccumulationScheduler: both say when"):
        make_trainer(BatchRegime("full"), accumulation, accumulate_grad_batches=1).fit(regression(sgd), data())
    with pytest.raises(ValueError, match=r"BatchRegime\(...\) and ExactAccumulation\(...\): both weight"):
        make_trainer(BatchRegime(3), ExactAccumulation()).fit(regression(sgd), data())


def test_a_loader_without_a_size_of_its_own(regression, make_trainer, data):
    class Odd(BatchSampler):
        pass

    dataset = data().dataset
    for loader, kind in [
        (DataLoader(dataset, batch_sampler=Odd(SequentialSampler(dataset), 2, False)), "Odd, a batch_sampler"),
        (DataLoader(Stream(dataset), batch_size=None), r"DataLoader\(batch_size=None\), whose dataset"),
        ([data(), data()], "list, which is no DataLoader"),
        (
            DataLoader(dataset, batch_sampler=data().batch_sampler),
            r"DataLoader\(batch_sampler=BatchSampler\(\.\.\.\)\)",
        ),
    ]:
        with pytest.raises(ValueError, match=rf"BatchRegime\(regime=3\): the batch size of {kind}.*; give one"):
            make_trainer(BatchRegime(3)).fit(regression(sgd), loader)
