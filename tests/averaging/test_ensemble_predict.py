# SPDX-License-Identifier: Apache-2.0
"""Predictions of an ensemble, against explicit formulas over its members."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optkit.averaging import EnsemblePrediction, ensemble_predict


def net(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)).double()


X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LOADER = DataLoader(TensorDataset(X, torch.zeros(10)), batch_size=4)
MEMBERS = [net(seed).state_dict() for seed in range(3)]


def outputs(seed):
    return net(seed).eval()(X).detach()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "identity"])
def test_the_mean_and_what_the_members_disagree_on(activation):
    found = ensemble_predict(net(9), MEMBERS, LOADER, activation)
    assert isinstance(found, EnsemblePrediction)
    logits = torch.stack([outputs(seed) for seed in range(3)])
    values = {"softmax": logits.softmax(2), "sigmoid": logits.sigmoid(), "identity": logits}[activation]
    torch.testing.assert_close(found.mean, values.mean(0))
    torch.testing.assert_close(found.std, values.std(0, correction=0))
    if activation == "identity":
        assert found.entropy is found.mutual_information is None
        return

    def entropy(p):
        if activation == "softmax":
            return torch.distributions.Categorical(p).entropy()
        return torch.distributions.Bernoulli(p).entropy()

    torch.testing.assert_close(found.entropy, entropy(values.mean(0)))
    torch.testing.assert_close(found.mutual_information, entropy(values.mean(0)) - entropy(values).mean(0))
    assert (found.mutual_information > 0).all()


def test_one_member_agrees_with_itself():
    found = ensemble_predict(net(9), MEMBERS[:1], LOADER)
    assert found.std.abs().max() == found.mutual_information.max() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails, frozen):
    model = net(9)
    model[1].eval()
    before, modes = frozen(copy.deepcopy(model.state_dict())), [m.training for m in model.modules()]
    if fails:
        with pytest.raises(
            ValueError, match=r"^ensemble_predict\(checkpoints=\[\.\.\.\]\): number 2 must fit: .*Missing"
        ):
            ensemble_predict(model, [MEMBERS[0], {"w": torch.ones(1)}], LOADER)
    else:
        ensemble_predict(model, MEMBERS, LOADER)
    assert frozen(model.state_dict()) == before
    assert [m.training for m in model.modules()] == modes


def test_a_function_that_predicts_and_files(tmp_path):
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    for path, member in zip(paths, MEMBERS, strict=True):
        torch.save({"state_dict": member}, path)
    found = ensemble_predict(net(9), paths, [{"x": X}], predict=lambda model, batch: model(batch["x"]))
    torch.testing.assert_close(found.mean, ensemble_predict(net(9), MEMBERS, LOADER).mean)


def test_bf16_outputs_are_summed_in_fp32():
    members = [{key: value.bfloat16() for key, value in member.items()} for member in MEMBERS]
    assert ensemble_predict(net(9).bfloat16(), members, [X.bfloat16()]).mean.dtype == torch.float32


def test_refuses():
    with pytest.raises(ValueError, match=r"^ensemble_predict\(activation='relu'\)"):
        ensemble_predict(net(9), MEMBERS, LOADER, "relu")
    with pytest.raises(ValueError, match=r"^ensemble_predict\(checkpoints=\[\]\)"):
        ensemble_predict(net(9), [], LOADER)
    with pytest.raises(ValueError, match=r"^ensemble_predict\(batches=<iterator>\)"):
        ensemble_predict(net(9), MEMBERS, iter(LOADER))
    with pytest.raises(ValueError, match=r"^ensemble_predict\(batches=\[\]\)"):
        ensemble_predict(net(9), MEMBERS, [])
