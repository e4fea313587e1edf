# SPDX-License-Identifier: Apache-2.0
"""A run resumed with groups in another order has the weights of one resumed with the same; other groups are refused."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

import lightning_optkit as ok

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.workers import launch, load_worker

WORKER = Path(__file__).parents[1] / "regrouped_worker.py"
worker = load_worker(WORKER)
CASES = [case for case in worker.CASES if case not in worker.AVERAGES and case not in worker.OTHERS]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints of one process, by case and whether there is a scheduler."""
    folder = tmp_path_factory.mktemp("regrouped")
    for case in CASES:
        for schedule in (False, True):
            worker.run(case, "saved", "one", path=folder / f"{case} {schedule}.ckpt", schedule=schedule)
    return folder


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("division", ["reordered", "divided"])
@pytest.mark.parametrize("case", CASES)
def test_groups_in_another_order_or_division_train_on_alike(saved, case, division, schedule):
    path = saved / f"{case} {schedule}.ckpt"
    same, other = (worker.run(case, each, "one", ckpt_path=path, schedule=schedule) for each in ("saved", division))
    torch.testing.assert_close(other, same, rtol=0, atol=1e-7 if case == "ours, a clip" else 0)


REFUSED = {
    "moved": r"net.0.weight and net.4.weight|net.2.weight and net.4.weight",
    "joined": r"are in one group here, and in groups of the checkpoint with lr=0.04 and 0.01; resume with the groups",
    "fewer": "has net.1.weight, which this one lacks; resume with the parameters",
}


@pytest.mark.parametrize("division", REFUSED)
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_mapped_is_refused(saved, case, division):
    with pytest.raises(ValueError, match=f"^AdamW: .*({REFUSED[division]})"):
        worker.run(case, division, "one", ckpt_path=saved / f"{case} False.ckpt")


def test_a_checkpoint_of_lightning_alone_is_left_as_it_is(saved, tmp_path):
    path = tmp_path / "plain.ckpt"
    content = torch.load(saved / "Fuse False.ckpt", weights_only=True)
    for state in content["optimizer_states"]:
        del state["parameter_names"], state["optimizer_classes"]
    torch.save(content, path)
    same = worker.run("Fuse", "saved", "one", ckpt_path=path)
    other = worker.run("Fuse", "reordered", "one", ckpt_path=path)
    assert not all(map(torch.equal, same, other))
    with pytest.raises(
        ValueError, match=r"AdamW: the checkpoint has groups of \[3, 3\] parameters and this run of \[6\]; r"
    ):
        worker.run("Fuse", "joined", "one", ckpt_path=path)


@pytest.mark.parametrize("case", ["Fuse", "ExactResume"])
def test_a_folder_that_is_no_checkpoint_is_said(saved, tmp_path, case):
    (tmp_path / "runs").mkdir()
    worker.run("ExactResume", "saved", "one", path=tmp_path / "another.ckpt")  # is not taken instead
    with pytest.raises(IsADirectoryError, match="it is a folder, and none of a sharded checkpoint; give "):
        worker.run(case, "saved", "one", ckpt_path=tmp_path / "runs")


# --- schedulers of fewer groups ---

SCHEDULER = torch.optim.lr_scheduler


class Decay:
    """A callable object, whose attributes LambdaLR saves."""

    def __init__(self):
        self.rate = 0.9

    def __call__(self, step):
        return self.rate**step


SCHEDULERS = {
    "functions": lambda o: SCHEDULER.LambdaLR(o, lambda step: 0.9**step),
    "objects": lambda o: SCHEDULER.LambdaLR(o, [Decay() for _ in o.param_groups]),
    "in a sequence": lambda o: SCHEDULER.SequentialLR(
        o, [SCHEDULER.LinearLR(o, 0.1, total_iters=4), SCHEDULER.LambdaLR(o, [Decay() for _ in o.param_groups])], [6]
    ),
    "factors": lambda o: SCHEDULER.MultiplicativeLR(o, lambda step: 0.9),
    "a list of bounds": lambda o: SCHEDULER.OneCycleLR(o, [0.02] * len(o.param_groups), total_steps=64),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_joined_groups_have_the_rates_of_those_before(tmp_path, case):
    class Scheduled(worker.Regression):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": SCHEDULERS[case](optimizer), "interval": "step"}]

    path = tmp_path / "halves.ckpt"
    fit(Scheduled(torch.optim.AdamW, "halves"), path=path)
    same, other = Scheduled(torch.optim.AdamW, "halves"), Scheduled(torch.optim.AdamW, "joined")
    for module in (same, other):
        fit(module, ckpt_path=path)
    assert [len(each.trainer.lr_scheduler_configs[0].scheduler.get_last_lr()) for each in (same, other)] == [2, 1]
    torch.testing.assert_close([*other.parameters()], [*same.parameters()], rtol=0, atol=0)


# --- other optimizers ---


class Two(worker.Regression):
    """Two optimizers with manual optimization."""

    def __init__(self, order=(0, 1), kinds=(torch.optim.AdamW, torch.optim.AdamW)):
        super().__init__(None, "saved")
        self.automatic_optimization, self.order, self.kinds = False, order, kinds

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers() if isinstance(self.optimizers(), list) else [self.optimizers()]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        params = list(self.parameters())
        halves = [kind(half, lr=0.01) for kind, half in zip(self.kinds, (params[:3], params[3:]), strict=True)]
        return [halves[place] for place in self.order]


def fit(module, ckpt_path=None, path=None):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(
        callbacks=[ok.ExactResume()],
        accelerator="cpu",
        max_epochs=1 if path else 2,
        use_distributed_sampler=False,
        **quiet,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    if path is not None:
        trainer.save_checkpoint(path)


class Mine(torch.optim.AdamW):
    """A class of a user's own."""


ADAM, SGD, ADAMW, ADAMAX = torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW, torch.optim.Adamax
OTHERS = {
    "swapped": (Two((1, 0)), r"AdamW: net.3.weight is a parameter of optimizer 0 here and of optimizer 1 in the ch"),
    "one of two": (Two((0,)), r"Two.configure_optimizers: the checkpoint has 2 optimizers and this run has 1; resume"),
    "another class": (Two(kinds=(ADAMW, SGD)), r"SGD: the optimizer state of the checkpoint is of AdamW; resume with"),
    "the class it derives from, another rule": (
        Two(kinds=(ADAM, ADAMW)),
        "Adam: the optimizer state of the checkpoint",
    ),
    "a class with the same entries": (Two(kinds=(ADAMAX, ADAMW)), r"Adamax: the optimizer state of the checkpoint is"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_optimizers_are_refused(tmp_path, case):
    path = tmp_path / "two.ckpt"
    fit(Two(), path=path)
    module, said = OTHERS[case]
    with pytest.raises(ValueError, match=said):
        fit(module, ckpt_path=path)


def test_a_class_derived_from_it_is_none_other(tmp_path):
    path = tmp_path / "two.ckpt"
    fit(Two(), path=path)
    fit(Two(kinds=(Mine, ADAMW)), ckpt_path=path)


def test_another_class_without_names_is_refused_by_its_entries(tmp_path):
    path = tmp_path / "two.ckpt"
    fit(Two(), path=path)
    content = torch.load(path, weights_only=True)
    for state in content["optimizer_states"]:
        del state["parameter_names"], state["optimizer_classes"]
    torch.save(content, path)
    with pytest.raises(
        ValueError, match=r"SGD: the optimizer state of the checkpoint has no 'dampening' in its groups"
    ):
        fit(Two(kinds=(ADAMW, SGD)), ckpt_path=path)


def test_a_run_without_an_optimizer_has_no_state_for_one(tmp_path):
    class Without(Two):
        def training_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return None

    path = tmp_path / "none.ckpt"
    fit(Without(), path=path)
    fit(Without(), ckpt_path=path)
    for module in (Two(), Two((0,))):
        with pytest.raises(ValueError, match=r"^AdamW: the checkpoint is of a run without an optimizer; begin a run f"):
            fit(module, ckpt_path=path)


@pytest.mark.parametrize("kinds", [(ADAMW, ADAM), (ADAM, ADAMW)], ids=["AdamW to Adam", "Adam to AdamW"])
def test_the_decay_tells_the_class_where_none_was_saved(tmp_path, kinds):
    path = tmp_path / "two.ckpt"
    fit(Two(kinds=(kinds[0], ADAMW)), path=path)
    content = torch.load(path, weights_only=True)
    for state in content["optimizer_states"]:
        del state["optimizer_classes"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="has another 'decoupled_weight_decay' in its groups, so it is of another opt"):
        fit(Two(kinds=(kinds[1], ADAMW)), ckpt_path=path)
    fit(Two(kinds=(kinds[0], ADAMW)), ckpt_path=path)


# --- several processes ---


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    launch(WORKER, folder, timeout=280)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("pair", worker.PAIRS, ids=" to ".join)
def test_the_same_in_several_processes(processes, pair):
    same = processes[(*pair, "saved")]
    assert not isinstance(same, str), same
    torch.testing.assert_close(processes[(*pair, "divided")], same, rtol=0, atol=1e-6)
    assert "are in one group here, and in groups of the checkpoint with" in processes[(*pair, "moved")]


@pytest.mark.parametrize("saver", worker.KINDS)
@pytest.mark.parametrize("case", worker.AVERAGES)
def test_an_average_goes_on_or_is_left_out_alike(processes, saver, case):
    for loader in {"one", saver}:
        expected = processes["never averaged"] if case == "without" else processes["averaged", "one", case, "one"]
        torch.testing.assert_close(processes["averaged", saver, case, loader], expected, rtol=0, atol=1e-6)


SHARDED = [("fsdp full", "fsdp full"), ("fsdp sharded", "fsdp sharded"), ("fsdp sharded", "one")]


@pytest.mark.parametrize("pair", SHARDED, ids=" to ".join)
def test_joined_groups_of_shards_have_the_rates_of_those_before(processes, pair):
    same, other = (processes[("joined", *pair, division)] for division in ("halves", "joined"))
    assert not isinstance(same, str), same
    torch.testing.assert_close(other, same, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pair", SHARDED, ids=" to ".join)
def test_another_class_is_refused_in_shards(processes, pair):
    assert "Adam: the optimizer state of the checkpoint is of AdamW; resume with" in processes[("another class", *pair)]


@pytest.mark.parametrize("case", ["an average added", "an average and Fuse added"])
def test_state_added_under_shards_begins_as_in_a_fresh_run(processes, case):
    expected = processes[case, "fsdp full", "fsdp full"]
    assert not isinstance(expected, str), expected
    for pair in SHARDED[1:]:
        torch.testing.assert_close(processes[(case, *pair)], expected, rtol=0, atol=1e-6)


def test_codes_of_8_bits_are_not_taken_for_numbers(tmp_path):
    def run(optimizer_class, *callbacks, ckpt_path=None, epochs=1, **kwargs):
        class Module(BoringModel):
            def configure_optimizers(self):
                return optimizer_class(self.parameters(), lr=0.01, **kwargs)

        pl.seed_everything(1)
        module = Module()
        options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer = pl.Trainer(max_epochs=epochs, limit_val_batches=0, callbacks=[*callbacks], **options)
        trainer.fit(module, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module.layer.weight.detach()

    run(ok.AdamW, ok.ExactResume(), state_dtype="int8")
    said = r"^AdamW: the state 'exp_avg' of the checkpoint is in 8 bits, which only those of lightning_optkit"
    with pytest.raises(ValueError, match=said):
        run(torch.optim.AdamW, ok.ExactResume(), ckpt_path=tmp_path / "1.ckpt", epochs=2)
    again = run(ok.AdamW, ok.ExactResume(), ckpt_path=tmp_path / "1.ckpt", epochs=2, state_dtype="int8")
    fused = ok.Fuse(state_dtype="int8", norms=False, verbose=False)
    taken = run(torch.optim.AdamW, ok.ExactResume(), fused, ckpt_path=tmp_path / "1.ckpt", epochs=2)
    torch.testing.assert_close(taken, again, rtol=0, atol=1e-3)
