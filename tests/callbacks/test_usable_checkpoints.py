# SPDX-License-Identifier: Apache-2.0
"""What is loaded in place of a damaged checkpoint is of use to the run; what is no checkpoint is named."""

import pytest
import torch
from torch import nn

from lightning_optkit.callbacks import ExactResume, Fuse

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def saved(make_trainer, regression, data, tmp_path):
    """A folder with a whole checkpoint, and a newer one that is damaged."""
    first = make_trainer(ExactResume(), epochs=1)
    first.fit(regression(adam), data())
    for name in ("old", "damaged"):
        first.save_checkpoint(tmp_path / f"{name}.ckpt")
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(path.read_bytes()[:2000])
    return first, path


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.01)


def other_module(regression):
    module = regression(adam)
    module.net[2] = nn.Linear(8, 2, bias=False)
    return module


def test_a_newer_file_of_weights_alone_is_not_resumed(make_trainer, regression, data, saved):
    first, path = saved
    first.save_checkpoint(path.with_name("weights.ckpt"), weights_only=True)
    second = make_trainer(ExactResume(), epochs=2)
    with pytest.warns(UserWarning, match=r"damaged\.ckpt is damaged .* .*old\.ckpt is loaded instead"):
        second.fit(regression(adam), data(), ckpt_path=path)
    assert second.global_step == 2 * first.global_step


def test_without_a_better_one_it_is_not_resumed_either_but_evaluated(make_trainer, regression, data, saved):
    first, path = saved
    first.save_checkpoint(path.with_name("weights.ckpt"), weights_only=True)
    path.with_name("old.ckpt").unlink()
    with pytest.raises(RuntimeError, match=r"is damaged .* and no whole checkpoint .* that this run can use is beside"):
        make_trainer(ExactResume(), epochs=2).fit(regression(adam), data(), ckpt_path=path)
    with pytest.warns(UserWarning, match=r"weights\.ckpt is loaded instead"):
        make_trainer(ExactResume()).validate(regression(adam), data(), ckpt_path=path)


def test_a_newer_file_of_another_module_is_not_resumed(make_trainer, regression, data, saved):
    _, path = saved
    another = make_trainer(ExactResume(), epochs=1)
    another.fit(other_module(regression), data())
    another.save_checkpoint(path.with_name("another.ckpt"))
    with pytest.warns(UserWarning, match=r"old\.ckpt is loaded instead"):
        make_trainer(ExactResume(), epochs=2).fit(regression(adam), data(), ckpt_path=path)
    with pytest.warns(UserWarning, match=r"another\.ckpt is loaded instead"):
        make_trainer(ExactResume(), epochs=2).fit(other_module(regression), data(), ckpt_path=path)


@pytest.mark.parametrize("name", ["validate", "test", "predict"])
def test_it_is_noticed_wherever_a_checkpoint_is_loaded(make_trainer, regression, data, saved, name):
    _, path = saved
    content = bytearray(path.with_name("old.ckpt").read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"damaged\.ckpt is damaged \(it is not as it was saved\)"):
        getattr(make_trainer(ExactResume()), name)(regression(adam), data(), ckpt_path=path)


NO_CHECKPOINT = "and no checkpoint of Lightning; "
OTHERS = {
    "state dict": (lambda: nn.Linear(1, 1).state_dict(), f"a state dict, {NO_CHECKPOINT}load it by load_state_dict"),
    "list": (lambda: [1, 2], f"a list, {NO_CHECKPOINT}give a file that a Trainer saved"),
    "empty": (dict, f"a dict, {NO_CHECKPOINT}give a file that a Trainer saved"),
}


@pytest.mark.parametrize("callback", [ExactResume, lambda: Fuse(verbose=False)], ids=["ExactResume", "Fuse"])
@pytest.mark.parametrize("case", OTHERS)
def test_what_no_trainer_saved_is_named(make_trainer, regression, data, tmp_path, case, callback):
    make, message = OTHERS[case]
    torch.save(make(), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"^Trainer\.fit\(ckpt_path='.*x\.ckpt'\): it is " + message):
        make_trainer(callback(), epochs=1).fit(regression(adam), data(), ckpt_path=tmp_path / "x.ckpt")


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "32-true"])
def test_weights_are_loaded_in_the_precision_of_the_run(make_trainer, regression, data, tmp_path, precision):
    first = make_trainer(ExactResume(), epochs=1, precision=precision)
    module = regression(adam)
    first.fit(module, data())
    first.save_checkpoint(tmp_path / "x.ckpt")
    for name in ("fit", "validate"):
        loaded = regression(adam)
        getattr(make_trainer(ExactResume(), epochs=1, precision=precision), name)(
            loaded, data(), ckpt_path=tmp_path / "x.ckpt"
        )
        torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_a_renamed_parameter_is_said_with_the_next_step(make_trainer, regression, data, saved):
    _, path = saved
    module = regression(adam)
    module.renamed = module.net
    del module.net
    with pytest.raises(
        RuntimeError, match=r"Missing key.* \"renamed\.0(.|\n)*Regression: .* rename it in checkpoint\['"
    ):
        make_trainer(ExactResume(), epochs=2).fit(module, data(), ckpt_path=path.with_name("old.ckpt"))


@pytest.mark.parametrize("others", [[], [Fuse]], ids=["alone", "Fuse"])
def test_a_trainer_that_has_evaluated_goes_on_from_the_replacement(make_trainer, regression, data, saved, others):
    first, path = saved
    trainer = make_trainer(ExactResume(), *[other() for other in others], epochs=2)
    trainer.validate(regression(adam), data(), ckpt_path=path.with_name("old.ckpt"))
    with pytest.warns(UserWarning, match=r"old\.ckpt is loaded instead"):
        trainer.fit(regression(adam), data(), ckpt_path=path)
    assert trainer.global_step == 2 * first.global_step
