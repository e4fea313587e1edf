# SPDX-License-Identifier: Apache-2.0
"""SafeCheckpointIO in whole fits, as a plugin and by ExactResume."""

import pytest
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from safe_checkpoint_cases import bend, names

from lightning_optkit.callbacks import ExactResume, SafeCheckpointIO
from lightning_optkit.callbacks.seams.whole_checkpoints import damage_of

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def module_of(regression):
    return regression(lambda module: torch.optim.SGD(module.parameters(), lr=0.1))


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


KEEPING = dict(enable_checkpointing=True, accumulate_grad_batches=1)


@pytest.mark.filterwarnings("ignore:You.re resuming")  # Lightning cannot know of ExactResume
@pytest.mark.parametrize("how", ["plugin", "ExactResume"])
def test_a_run_resumes_from_last_after_its_file_was_torn(fit, regression, tmp_path, how):
    def run(ckpt_path=None):
        keep = ModelCheckpoint(tmp_path, save_last=True, save_top_k=-1, every_n_train_steps=1)
        callbacks = [keep, ExactResume()] if how == "ExactResume" else [keep]
        plugins = {} if how == "ExactResume" else {"plugins": [SafeCheckpointIO()]}
        module = module_of(regression)
        trainer = fit(module, *callbacks, epochs=2, ckpt_path=ckpt_path, **KEEPING, **plugins)
        return trainer, weights(module)

    trainer, whole = run()
    assert type(trainer.strategy.checkpoint_io) is SafeCheckpointIO
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 9 and not any(damage_of(path) for path in files)
    last = tmp_path / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])  # a kill of a writer that writes in place
    bend(tmp_path / "epoch=1-step=8.ckpt")
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged .*; .*step=7\.ckpt is loaded instead"):
        trainer, resumed = run("last")
    assert trainer.global_step == 8
    if how == "ExactResume":
        assert torch.equal(whole, resumed)


def test_a_checkpoint_io_of_the_users_own_stays(fit, regression, tmp_path):
    class Own(TorchCheckpointIO):
        pass

    own = Own()
    trainer = fit(module_of(regression), ExactResume(), plugins=[own])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert trainer.strategy.checkpoint_io is own
    assert b"lightning_optkit save" not in (tmp_path / "a.ckpt").read_bytes()[-200:]


def test_after_a_fit_and_on_an_exception_it_is_written_the_same_way(fit, regression, tmp_path):
    trainer = fit(module_of(regression), ExactResume())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    bend(tmp_path / "a.ckpt")
    assert damage_of(tmp_path / "a.ckpt") == "it is not as it was saved"


def test_lightnings_asynchronous_writer_takes_it(fit, regression, tmp_path):
    keep = ModelCheckpoint(tmp_path, save_top_k=2, monitor="train_loss", every_n_train_steps=1)
    trainer = fit(module_of(regression), keep, plugins=[AsyncCheckpointIO(SafeCheckpointIO())], **KEEPING)
    trainer.strategy.checkpoint_io.teardown()
    # Lightning removes a file at once and writes it later, so that one which was slow to write can stay.
    assert len(names(tmp_path)) >= 2 and not any(damage_of(path) for path in tmp_path.iterdir())


def test_lightning_checkpoints_of_modules_load(fit, regression, tmp_path):
    module = module_of(regression)
    fit(module, ExactResume()).save_checkpoint(tmp_path / "a.ckpt")
    same = regression.load_from_checkpoint(tmp_path / "a.ckpt", configure=None, weights_only=True)
    assert torch.equal(weights(module), weights(same))
