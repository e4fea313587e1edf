# SPDX-License-Identifier: Apache-2.0
"""When Initialize draws: not in a run that is resumed, nor over weights that were trained."""

import pytest
import torch
from initialize_cases import Classifier, drawn, loader, starting, weights
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_optkit.callbacks import Initialize
from lightning_optkit.init import he, xavier

start = pytest.fixture(starting)


def test_a_resumed_run_is_left_alone_and_equals_an_uninterrupted_one(start, tmp_path, frozen, printed):
    def train(steps, ckpt_path=None):
        module = Classifier()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            trainer = start(
                module, Initialize(he, seed=1), steps=steps, ckpt_path=ckpt_path, train=loader(shuffle=False)
            )
        return trainer, module

    trainer, _ = train(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    saved = torch.load(tmp_path / "two.ckpt", weights_only=True)["state_dict"]
    printed()
    _, module = train(2, tmp_path / "two.ckpt")
    torch.testing.assert_close(dict(module.state_dict()), dict(saved), rtol=0, atol=0)
    assert "Initialize: nothing drawn, since the run resumes from a checkpoint." in printed()


def test_a_second_fit_of_the_same_trainer_goes_on(start, printed):
    module = Classifier(norm=False)
    trainer = start(module, Initialize(he), steps=2)
    before = weights(module)
    trainer.fit(module, loader())
    torch.testing.assert_close(weights(module), before, rtol=0, atol=0)
    assert "nothing drawn, since the trainer has trained already" in printed()


def test_batch_norm_statistics_of_an_earlier_training_are_a_sign(start, printed):
    trained = Classifier()
    trained.net[1].num_batches_tracked += 5
    before = weights(trained)
    start(trained, Initialize(he))
    torch.testing.assert_close(weights(trained), before, rtol=0, atol=0)
    assert "nothing drawn, since 'net.1' holds statistics of an earlier training" in printed()
    start(trained, Initialize(he, seed=0, even_if_trained=True))
    torch.testing.assert_close(weights(trained), drawn(he), rtol=0, atol=0)


@pytest.mark.parametrize(("norm", "said"), [
    (True, "'net.1' is a norm with trained weights"),
    (False, "its parameters hold gradients of an earlier training"),
])  # fmt: skip
def test_other_signs_of_an_earlier_training(start, printed, norm, said):
    trained = Classifier(norm=norm)
    if norm:
        trained.net[1] = nn.LayerNorm(8)
        trained.net[1].weight.data[3] += 0.1
    else:  # by another Trainer
        start(trained, steps=1)
    before = weights(trained)
    start(trained, Initialize(he))
    torch.testing.assert_close(weights(trained), before, rtol=0, atol=0)
    assert f"nothing drawn, since {said} (even_if_trained=True draws)" in printed()
    start(trained, Initialize(he, seed=0, even_if_trained=True))
    torch.testing.assert_close(weights(trained)["net.0.weight"], drawn(he)["net.0.weight"], rtol=0, atol=0)


def test_for_fine_tuning_only_what_is_named_and_not_frozen(start):
    module = Classifier()
    module.net[1].num_batches_tracked += 5
    module.net[6].bias.requires_grad_(False)
    before = weights(module)
    start(module, Initialize(xavier, only="net.6"))
    changed = {name for name, value in weights(module).items() if not torch.equal(value, before[name])}
    assert changed == {"net.6.weight"}


def test_a_module_on_the_meta_device_is_materialized_with_ties_kept(start):
    def tied():
        module = Classifier()
        module.net[2], module.net[3] = nn.Linear(8, 8), nn.ReLU()
        module.net[4].weight = module.net[2].weight
        return module

    with torch.device("meta"):
        module = tied()
        module.accuracy = MulticlassAccuracy(3)
    module.accuracy = MulticlassAccuracy(3)
    torch.manual_seed(3)
    start(module, Initialize(he, seed=0))
    after = torch.rand(1)
    expected = tied()
    drawn(he, expected)
    assert module.net[2].weight is module.net[4].weight
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=0)
    torch.testing.assert_close(dict(module.named_buffers()), dict(expected.named_buffers()), rtol=0, atol=0)
    assert not any(value.is_meta for value in module.state_dict().values())
    plain = tied()
    torch.manual_seed(3)
    start(plain)
    assert torch.equal(after, torch.rand(1))


def test_what_nobody_can_fill_is_refused(start):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(4))

    with torch.device("meta"):
        module = Classifier()
        module.token = Own()
    module.accuracy = MulticlassAccuracy(3)
    with pytest.raises(NotImplementedError) as raised:  # Lightning then tries to move the module to the CPU
        start(module, Initialize(he))
    message = (
        "Initialize(...): 'token' (Own) is on the meta device and has no reset_parameters() to fill it; define one"
    )
    assert str(raised.value.__context__).startswith(message)
