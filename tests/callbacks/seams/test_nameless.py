# SPDX-License-Identifier: Apache-2.0
"""Parameters that are not the module's leave the others their names, and are matched by place and shape or refused."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok

pytestmark = pytest.mark.filterwarnings("ignore")


class Outside(pl.LightningModule):
    """Layers of equal shapes, and two parameters that are not registered."""

    def __init__(self, divide, shapes=((1,), (1,))):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(3)])
        self.divide = divide
        self.__dict__["outside"] = [nn.Parameter(torch.full(shape, 1.5)) for shape in shapes]

    def training_step(self, batch, batch_idx):
        first, *rest = self.outside
        return (self.net(batch[0]) * first - batch[0].flip(1) + sum(p.sum() for p in rest) / 3).square().mean()

    def configure_optimizers(self):
        groups = self.divide([*self.net.parameters()], self.outside)
        return torch.optim.AdamW([{"params": params, "lr": lr} for params, lr in groups])

    def on_save_checkpoint(self, checkpoint):
        checkpoint["outside"] = [param.detach().clone() for param in self.outside]

    def on_load_checkpoint(self, checkpoint):
        for param, value in zip(self.outside, checkpoint["outside"], strict=False):
            param.data.copy_(value)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 6, generator=torch.Generator().manual_seed(1))), 4)


def saved_groups(n, e):
    return [([n[0], n[1], e[0]], 0.04), ([n[2], e[1]], 0.01)]


DIVISIONS = {
    "the same": saved_groups,
    "in another order": lambda n, e: [([e[1], n[2]], 0.01), ([n[1], e[0], n[0]], 0.04)],
    "divided": lambda n, e: [([n[1], e[0]], 0.04), ([n[0]], 0.04), ([n[2], e[1]], 0.01)],
}
REFUSED = {
    "another number": lambda n, e: [([n[0], n[1], *e], 0.04), ([n[2]], 0.01)],
    "one left out": lambda n, e: [([n[0], n[1], e[0]], 0.04), ([n[2]], 0.01)],
    "joined": lambda n, e: [([*n, *e], 0.04)],
    "a group of their own": lambda n, e: [([n[0], n[1]], 0.04), ([n[2], e[1]], 0.01), ([e[0]], 0.04)],
}


def fit(module, *callbacks, ckpt_path=None, path=None):
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1 if path else 2,
        callbacks=[ok.ExactResume(), *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    if path:
        trainer.save_checkpoint(path)
    return [param.detach() for param in (*module.parameters(), *module.outside)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("nameless") / "saved.ckpt"
    fit(Outside(saved_groups), path=path)
    return path


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("fuse", [False, True])
def test_the_others_are_matched_by_name(path, division, fuse):
    same, other = (
        fit(Outside(divide), *([ok.Fuse(verbose=False)] if fuse else []), ckpt_path=path)
        for divide in (saved_groups, DIVISIONS[division])
    )
    torch.testing.assert_close(other, same, rtol=0, atol=0)


def test_the_file_has_names_and_numbers_that_torch_loads(path):
    state = torch.load(path, weights_only=True)["optimizer_states"][0]
    assert state["parameter_names"] == {place: f"net.{place}.weight" for place in range(3)}
    assert state["nameless_shapes"] == {3: (1,), 4: (1,)}
    assert [group["params"] for group in state["param_groups"]] == [[0, 1, 3], [2, 4]]
    optimizer = Outside(saved_groups).configure_optimizers()
    optimizer.load_state_dict(state)
    for group, numbers in zip(optimizer.param_groups, [[0, 1, 3], [2, 4]], strict=True):
        for param, number in zip(group["params"], numbers, strict=True):
            assert torch.equal(optimizer.state[param]["exp_avg"], state["state"][number]["exp_avg"])


@pytest.mark.parametrize("division", REFUSED)
def test_what_is_not_known_is_refused(path, division):
    with pytest.raises(ValueError, match=r"^AdamW: .*not the module's.* resume with the (groups|parameters) of the"):
        fit(Outside(REFUSED[division]), ckpt_path=path)


def test_other_shapes_are_refused(path):
    with pytest.raises(ValueError, match=r"of shapes \[\(2,\)\] here and \[\(1,\)\] in the checkpoint; resume with"):
        fit(Outside(saved_groups, shapes=((2,), (1,))), ckpt_path=path)


def test_a_group_of_them_alone_goes_with_the_one_of_the_checkpoint(tmp_path):
    def alone(n, e):
        return [([*n], 0.04), ([*e], 0.01)]

    def reordered(n, e):
        return [([*e], 0.01), ([n[2], n[0], n[1]], 0.04)]

    path = tmp_path / "alone.ckpt"
    fit(Outside(alone), path=path)
    same, other = (fit(Outside(divide), ckpt_path=path) for divide in (alone, reordered))
    torch.testing.assert_close(other, same, rtol=0, atol=0)
