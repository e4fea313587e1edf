# SPDX-License-Identifier: Apache-2.0
"""`optkit validate`, `test`, `predict`, a resumed `fit`: whose weights, which sentence, where predictions are."""

import pytest
import torch
import yaml

from lightning_optkit.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")

USER = """
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self, width: int = 4):
        super().__init__()
        self.net = nn.Linear(width, 2)

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.net(batch[0]).pow(2).mean())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net.weight.detach().clone()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(32, self.net.in_features)), batch_size=8)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader

class Writer(BasePredictionWriter):
    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        torch.save(len(predictions), "written.pt")
"""
AVERAGE = {"class_path": "lightning_optkit.WeightAveraging"} | {
    "init_args": {"average": {"class_path": "EMA", "init_args": {"decay": 0.5}}}
}
SAVES = {"class_path": "ModelCheckpoint", "init_args": {"save_last": True}}
SAFE = {"class_path": "lightning_optkit.SafeCheckpointIO"}
EVALUATIONS = ["validate", "test", "predict"]
LAST = "lightning_logs/version_0/checkpoints/last.ckpt"


@pytest.fixture
def optkit(tmp_path, users_net):
    """A command with the configuration of a user, in the user's folder."""
    users_net(USER)

    def command(name, *words, **trainer):
        quiet = dict(accelerator="cpu", max_epochs=2, enable_progress_bar=False, enable_model_summary=False)
        content = {"seed_everything": 1, "model": {"class_path": "users_net.Net"}}
        content |= {"trainer": {**quiet, "callbacks": [AVERAGE, SAVES], **trainer}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        main([name, "--config", "run.yaml", *words])

    return command


@pytest.mark.parametrize("command", EVALUATIONS)
def test_weights_that_no_checkpoint_gives_are_said_to_be_untrained(optkit, command, recwarn):
    def said():
        shown = [str(each.message) for each in recwarn.list if "No --ckpt_path is given" in str(each.message)]
        recwarn.clear()
        return shown

    optkit(command, logger=False)
    assert said() == ["No --ckpt_path is given: the weights are those that Net is built with."]
    optkit("fit")
    assert said() == []
    optkit(command)
    assert said()[0].count(LAST) == 1
    optkit(command, f"--ckpt_path={LAST}")
    assert said() == []


@pytest.mark.parametrize("command", EVALUATIONS)
def test_last_of_a_numbered_folder_is_refused_with_the_newest(optkit, command):
    optkit("fit")
    with pytest.raises(SystemExit) as ended:
        optkit(command, "--ckpt_path=last")
    where = "lightning_logs/version_1/checkpoints, where this run saves; give a path, or ModelCheckpoint a dirpath"
    assert ended.value.code.startswith(f"optkit {command}: --ckpt_path last: there is none in {where}")
    assert LAST in ended.value.code


def test_a_fit_from_last_says_that_it_begins_anew_where_another_run_has_saved(optkit, recwarn):
    optkit("fit", "--ckpt_path=last")  # the first run
    assert not [each for each in recwarn.list if "begins anew" in str(each.message)]
    optkit("fit", "--ckpt_path=last")
    (said,) = [str(each.message) for each in recwarn.list if "begins anew" in str(each.message)]
    assert "there is none in lightning_logs/version_1/checkpoints" in said and LAST in said


def test_last_of_a_folder_that_runs_share_is_found(optkit, caplog):
    shared = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": "saved", "save_last": True}}
    optkit("fit", callbacks=[AVERAGE, shared])
    optkit("test", "--ckpt_path=last", callbacks=[AVERAGE, shared])
    assert "Loaded model weights from the checkpoint at" in caplog.text


@pytest.mark.parametrize("command", ["fit", *EVALUATIONS])
@pytest.mark.parametrize("plugins", [[], [SAFE]], ids=["plain", "safe"])
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("best", "--ckpt_path best: only the process of a fit knows it; give a path."),
        ("nowhere.ckpt", "Checkpoint file not found: nowhere.ckpt"),
        (".", "--ckpt_path .: it is a folder, and none of a sharded checkpoint"),
        ("users_net.py", "users_net.py"),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_one_sentence(optkit, command, plugins, given, sentence):
    with pytest.raises(SystemExit) as ended:
        optkit(command, f"--ckpt_path={given}", plugins=plugins)
    said = ended.value.code
    assert said.startswith(f"optkit {command}: ") and sentence in said and said.count("\n") == 0
    assert given != "users_net.py" or "it is not a file that torch saved" in said


def test_a_damaged_checkpoint_is_replaced_as_safe_checkpoint_io_promises(optkit, tmp_path, recwarn):
    optkit("fit", plugins=[SAFE])
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:3000])
    for command in ("test", "fit"):
        optkit(command, f"--ckpt_path={LAST}", "--trainer.max_epochs=3", plugins=[SAFE])
        said = [str(each.message) for each in recwarn.list if "is loaded instead" in str(each.message)]
        assert len(said) == 1 and "epoch=1-step=8.ckpt" in said[0]
        recwarn.clear()
    saved = yaml.safe_load((tmp_path / "lightning_logs/version_2/optkit_config.yaml").read_text())
    assert saved["ckpt_path"] == LAST


def test_weights_of_other_shapes_are_said_without_a_traceback(optkit):
    optkit("fit")
    with pytest.raises(SystemExit) as ended:
        optkit("test", f"--ckpt_path={LAST}", "--model.width=3")
    *faults, sentence = ended.value.code.splitlines()
    assert "size mismatch for net.weight" in faults[1]
    assert sentence.startswith(
        "the model: its parameters have other shapes than those of the checkpoint; build it with"
    )


def test_an_evaluation_without_a_log_leaves_the_settings_of_the_fit(optkit, tmp_path):
    optkit("fit", logger=False)
    fitted = (tmp_path / "optkit_config.yaml").read_text()
    optkit("test", "--model.width=3", logger=False)
    assert (tmp_path / "optkit_config.yaml").read_text() == fitted
    assert yaml.safe_load((tmp_path / "optkit_test.yaml").read_text())["model"]["init_args"] == {"width": 3}


@pytest.mark.parametrize("command", ["fit", "test"])
@pytest.mark.parametrize(
    "saved",
    [{"net.weight": torch.ones(2, 4)}, [torch.ones(2, 4)], torch.ones(2), {"hyper_parameters": [1]}],
    ids=["weights", "a list", "a tensor", "something of that name"],
)
def test_a_file_of_something_else_is_no_checkpoint(optkit, tmp_path, command, saved):
    torch.save(saved, tmp_path / "weights.pt")
    with pytest.raises(SystemExit, match=rf"^optkit {command}: .* no checkpoint of Lightning; [^\n]*$"):
        optkit(command, "--ckpt_path=weights.pt")


def test_predictions_are_those_of_the_average_and_kept_beside_the_log(optkit, tmp_path, capsys, caplog):
    optkit("fit")
    optkit("predict", f"--ckpt_path={LAST}")
    kept = tmp_path / "lightning_logs/version_1/predictions.pt"
    assert "Predictions: lightning_logs/version_1/predictions.pt, a list of what" in capsys.readouterr().out
    predictions, saved = torch.load(kept), torch.load(tmp_path / LAST, weights_only=True)
    assert len(predictions) == 4 and torch.equal(predictions[0], saved["state_dict"]["net.weight"])
    assert not torch.equal(predictions[0], saved["current_model_state"]["net.weight"])
    assert [each.message for each in caplog.records].count(
        "WeightAveraging: these weights are the average; the trained ones are the current_model_state."
    ) == 1


def test_predictions_that_a_callback_writes_or_nobody_wants_are_not_kept_twice(optkit, tmp_path, recwarn):
    writer = {"class_path": "users_net.Writer", "init_args": {"write_interval": "epoch"}}
    optkit("predict", callbacks=[writer])
    assert torch.load(tmp_path / "written.pt") == 4
    assert not [each for each in recwarn.list if "are not kept" in str(each.message)]
    optkit("predict", "--return_predictions=false", logger=False)
    assert len([each for each in recwarn.list if "are not kept" in str(each.message)]) == 1
    assert not list(tmp_path.glob("**/predictions*"))
    optkit("predict", logger=False)
    assert len(torch.load(tmp_path / "predictions.pt")) == 4


SAVES_ITS_ARGUMENTS = USER.replace(
    "super().__init__()\n", "super().__init__()\n        self.save_hyperparameters()\n", 1
)


def test_a_checkpoint_of_a_fit_in_python_has_the_arguments_of_the_class_of_the_file(
    optkit, users_net, tmp_path, recwarn
):
    users_net(SAVES_ITS_ARGUMENTS)
    optkit("fit")
    saved = torch.load(tmp_path / LAST, weights_only=True)
    assert saved["hyper_parameters"].pop("_class_path") == "users_net.Net"
    saved["hyper_parameters"].pop("_instantiator")
    torch.save(saved, tmp_path / "python.ckpt")  # as Trainer.fit leaves it
    for command in ("fit", *EVALUATIONS):
        recwarn.clear()
        optkit(command, "--ckpt_path=python.ckpt", "--model.width=7", "--trainer.max_epochs=3")
        said = [str(each.message) for each in recwarn.list if "is replaced" in str(each.message)]
        assert said == ["model.width: 7 of the command line is replaced by 4 of the checkpoint."]
    recwarn.clear()
    optkit("test", "--ckpt_path=python.ckpt", "--model.width=4")
    assert not [each for each in recwarn.list if "is replaced" in str(each.message)]


@pytest.mark.parametrize("named", [{}, {"_class_path": "users_net.Net"}], ids=["python", "named"])
def test_arguments_of_a_checkpoint_that_do_not_fit_are_one_sentence(optkit, users_net, tmp_path, named, capsys):
    users_net(SAVES_ITS_ARGUMENTS)
    optkit("fit")
    saved = torch.load(tmp_path / LAST, weights_only=True)
    saved["hyper_parameters"] = {**named, "width": 4, "depth": 2}
    torch.save(saved, tmp_path / "other.ckpt")
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^2$"):
        optkit("test", "--ckpt_path=other.ckpt")
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "ckpt" in line]
    of_class = "which it names" if named else "the class of the configuration"
    assert said.startswith(
        "optkit test: --ckpt_path other.ckpt: its hyperparameters (width=4, depth=2) do not fit users_net.Net, "
        f"{of_class}: users_net.Net has no argument depth."
    )


def test_a_default_that_nobody_has_given_is_not_said_to_be_replaced(optkit, users_net, recwarn):
    users_net(SAVES_ITS_ARGUMENTS)
    optkit("fit", "--model.width=3")
    optkit("test", f"--ckpt_path={LAST}")
    assert not [each for each in recwarn.list if "is replaced" in str(each.message)]


@pytest.mark.parametrize("limit", ["max_epochs=2", "max_steps=8"])
def test_a_fit_that_its_checkpoint_has_ended_says_that_it_trained_nothing(optkit, tmp_path, recwarn, limit):
    report = {"class_path": "Report", "init_args": {"path": "report.html"}}
    optkit("fit", callbacks=[report, SAVES])
    (tmp_path / "report.html").unlink()
    more = ["--trainer.max_epochs=9"] * limit.startswith("max_steps")
    optkit("fit", f"--ckpt_path={LAST}", *more, f"--trainer.{limit}", callbacks=[report, SAVES])
    (said,) = [str(each.message) for each in recwarn.list if "Nothing was trained" in str(each.message)]
    assert f"the checkpoint has reached {limit} already" in said and "No report is written." in said
    assert not (tmp_path / "report.html").exists()
    recwarn.clear()
    optkit("fit", f"--ckpt_path={LAST}", "--trainer.max_epochs=3", callbacks=[report, SAVES])
    assert not [each for each in recwarn.list if "Nothing was trained" in str(each.message)]
    assert (tmp_path / "report.html").exists()
