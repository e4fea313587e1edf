# SPDX-License-Identifier: Apache-2.0
"""What Preprocess has fitted once goes with the checkpoint, and is not fitted again."""

import pytest
import torch
from preprocess_cases import ROWS, TARGETS, Seen, inputs_of, loader, running
from torch import nn

from lightning_optkit.callbacks import Fuse, Preprocess
from lightning_optkit.data import Impute, MinMaxScale, Standardize

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`.*")

run = pytest.fixture(running)


def test_a_resumed_run_takes_the_checkpoint_and_equals_an_uninterrupted_one(run, tmp_path, frozen):
    def train(epochs, rows, ckpt_path=None):
        module, preprocess = Seen(), Preprocess([Impute(add_indicator=False), Standardize()])
        trainer = run(module, [preprocess], train=loader(rows, TARGETS), epochs=epochs, ckpt_path=ckpt_path)
        return trainer, frozen(module.net.state_dict()), frozen(preprocess.state_dict())

    _, expected, learned = train(2, ROWS)
    trainer, _, _ = train(1, ROWS)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed, relearned = train(2, ROWS, ckpt_path=tmp_path / "half.ckpt")
    assert resumed == expected and relearned == learned
    _, _, others = train(2, ROWS * 7, ckpt_path=tmp_path / "half.ckpt")  # other rows now: still not fitted again
    assert others == learned


def test_evaluation_of_a_checkpoint_in_a_new_process_needs_no_training_data(run, make_trainer, tmp_path):
    module = Seen()
    run(module, [Preprocess(Standardize())]).save_checkpoint(tmp_path / "done.ckpt")
    later, preprocess = Seen(), Preprocess(Standardize())
    make_trainer(preprocess).test(later, loader(ROWS, TARGETS), ckpt_path=tmp_path / "done.ckpt", verbose=False)
    assert torch.equal(inputs_of(later, "test"), Standardize().fit(ROWS)(ROWS))
    alone = Preprocess(Standardize())
    saved = torch.load(tmp_path / "done.ckpt", weights_only=True)["callbacks"][alone.state_key]
    alone.load_state_dict(saved)
    exported = torch.export.export(nn.Sequential(alone.transform, module.net.cpu()), (ROWS,)).module()
    torch.testing.assert_close(exported(ROWS), module.net(Standardize().fit(ROWS)(ROWS)))


@pytest.mark.parametrize("stage", ["resume", "test"])
def test_a_checkpoint_without_statistics_is_refused(run, make_trainer, tmp_path, stage):
    run(Seen(), []).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(
        RuntimeError, match=r"Preprocess\(field=0\): Standardize is not fitted; fit without ckpt_path, or"
    ):
        if stage == "resume":
            run(Seen(), [Preprocess(Standardize())], epochs=2, ckpt_path=tmp_path / "plain.ckpt")
        else:
            trainer = make_trainer(Preprocess(Standardize()))
            trainer.test(Seen(), loader(ROWS, TARGETS), ckpt_path=tmp_path / "plain.ckpt", verbose=False)


def test_a_fitted_transform_is_used_as_it_is(run):
    fitted, module = Standardize().fit(ROWS * 3), Seen()
    preprocess = Preprocess([fitted, MinMaxScale()])
    trainer = run(module, [preprocess])
    assert torch.equal(fitted.mean, Standardize().fit(ROWS * 3).mean)
    learned = preprocess.transform[1].data_min.clone()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(ROWS * 9, TARGETS))  # the same run goes on
    assert torch.equal(preprocess.transform[1].data_min, learned)


@pytest.mark.parametrize("configure", [
    lambda module: torch.optim.AdamW(module.parameters(), lr=0.1),
    lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
])  # fmt: skip
def test_training_on_raw_data_with_it_equals_training_on_transformed_data(run, configure):
    def train(x, *callbacks):
        module = Seen(configure)
        run(module, callbacks, train=loader(x, TARGETS), epochs=2)
        return module.net.weight.detach()

    expected = train(Standardize().fit(ROWS)(ROWS))
    assert torch.equal(train(ROWS, Preprocess(Standardize())), expected)
    torch.testing.assert_close(train(ROWS, Fuse(verbose=False), Preprocess(Standardize())), expected)
