# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lightning_optkit.callbacks import ExactAccumulation, ExactResume, Fuse
from tests.workers import launch

pytestmark = pytest.mark.filterwarnings("ignore")


class Norms(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).clone())


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.0)


def gradient(module, x, y):
    loss = nn.functional.mse_loss(module.net(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_step_sees_the_gradient_of_one_big_batch(regression, make_trainer, data, dtype):
    norms, module = Norms(), regression(sgd)
    module.loss = lambda batch: nn.functional.mse_loss(module.net(batch[0].to(dtype)), batch[1].to(dtype))
    precision = "64-true" if dtype == torch.float64 else "32-true"
    trainer = make_trainer(ExactAccumulation(), norms, epochs=1, precision=precision)
    trainer.fit(module, data(3))  # batches of 3, 3 and 2 samples: windows of 6 and 2
    x, y = (part.to(dtype) for part in data(8).dataset.tensors)
    module = module.to(dtype)
    expected = [gradient(module, x[:6], y[:6]), gradient(module, x[6:], y[6:])]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(norms.seen, expected, rtol=tolerance, atol=tolerance)


def test_lightning_divides_the_last_window_by_k(regression, make_trainer, data):
    norms, module = Norms(), regression(sgd)
    make_trainer(norms, epochs=1).fit(module, data(3))
    x, y = data(8).dataset.tensors
    torch.testing.assert_close(norms.seen[1], gradient(module, x[6:], y[6:]) / 2)


def test_a_weight_counts_tokens(regression, make_trainer, data):
    norms, module = Norms(), regression(sgd)
    make_trainer(ExactAccumulation(lambda batch: (batch[0] > 0).sum()), norms, epochs=1).fit(module, data(4))
    parts = list(data(4))
    counts = [(x > 0).sum() for x, _ in parts]
    expected = sum(n * gradient(module, *part) for n, part in zip(counts, parts, strict=True)) / sum(counts)
    torch.testing.assert_close(norms.seen, [expected], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_a_batch_that_the_module_leaves_out(regression, make_trainer, data, left_out):
    class Skips(regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == left_out else super().training_step(batch, batch_idx)

    norms, module = Norms(), Skips(sgd)
    trainer = make_trainer(ExactAccumulation(), norms, epochs=1, accumulate_grad_batches=3, limit_train_batches=3)
    trainer.fit(module, data())
    parts = [part for index, part in enumerate(data()) if index < 3 and index != left_out]
    expected = gradient(module, *(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    torch.testing.assert_close(norms.seen, [expected], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_fuse_gives_the_same(regression, make_trainer, data, precision, clip):
    weights = []
    for extra in ([], [Fuse(verbose=False)]):
        module = regression(lambda module: torch.optim.AdamW(module.parameters(), lr=0.01))
        trainer = make_trainer(*extra, ExactAccumulation(), precision=precision, gradient_clip_val=clip)
        trainer.fit(module, data(3))
        weights.append(module.state_dict())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-5)


class SaveAt(pl.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 0):  # inside a window
            trainer.save_checkpoint(self.path)


def test_resumed_in_a_window(regression, make_trainer, data, tmp_path):
    weights, path = [], tmp_path / "window.ckpt"
    for ckpt_path in (None, path):
        module = regression(lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
        own = [] if ckpt_path else [SaveAt(path)]
        make_trainer(ExactAccumulation(), ExactResume(), *own).fit(module, data(3), ckpt_path=ckpt_path)
        weights.append(module.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_teardown_leaves_the_module_as_it_was(regression, make_trainer, data):
    module = regression(sgd)
    make_trainer(ExactAccumulation()).fit(module, data())
    assert "training_step" not in vars(module)


def test_an_exception_leaves_the_module_as_it_was(regression, make_trainer, data):
    module = regression(sgd)
    with pytest.raises(ZeroDivisionError):
        make_trainer(ExactAccumulation(lambda batch: 1 // 0)).fit(module, data())
    assert "training_step" not in vars(module)


def test_bad_input(regression, make_trainer, data):
    with pytest.raises(TypeError, match=r"ExactAccumulation\(weight=3\): weight must be a function"):
        ExactAccumulation(3)
    module = regression(sgd)
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="with manual optimization the module divides its losses itself"):
        make_trainer(ExactAccumulation(), accumulate_grad_batches=1).fit(module, data())


def test_two_processes(tmp_path):
    worker, results = Path(__file__).with_name("exact_accumulation_worker.py"), {}
    for name, processes, *case in (("one", 1), ("ddp", 2), ("fsdp", 2, "shards")):
        launch(worker, tmp_path / name, processes, *case, processes=processes, timeout=120)
        results[name] = torch.load(tmp_path / name)
    for name in ("ddp", "fsdp"):
        torch.testing.assert_close(results[name], results["one"], rtol=0, atol=1e-6)
