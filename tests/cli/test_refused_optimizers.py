# SPDX-License-Identifier: Apache-2.0
"""What torch refuses of an optimizer or a scheduler is a sentence with its key; the user's errors keep their lines."""

import pytest
import torch
import yaml

from lightning_optkit.cli import main
from lightning_optkit.cli.refused_optimizers import about_optimizer

pytestmark = pytest.mark.filterwarnings("ignore")

QUIET = dict(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, max_epochs=2)
BORING = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
SHORT = {**QUIET, "limit_train_batches": 2, "limit_val_batches": 1}
COMMANDS = ["fit", "validate", "explain", "doctor", "find-lr"]
NET = """
import torch
import lightning_optkit as ok
from lightning.pytorch.demos.boring_classes import BoringModel

def built(params):
    return {built}

class Net(BoringModel):
    def configure_optimizers(self):
        optimizer = built(self.parameters())
        return {returned}

    def training_step(self, batch, index):
        {step}
        return super().training_step(batch, index)
"""


def of(name, **init_args):
    return {"class_path": name, "init_args": init_args}


def scheduler(name, **init_args):
    schedulers = "torch.optim.lr_scheduler"
    return {"optimizer": of("torch.optim.SGD", lr=0.1), "lr_scheduler": of(f"{schedulers}.{name}", **init_args)}


@pytest.fixture
def end(users_net, tmp_path, capsys):
    """The status of `optkit COMMAND` with a file, and its last line."""

    def of_file(command, content):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": BORING, "trainer": SHORT} | content))
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--config", "run.yaml"])
        return exit_info.value.code, capsys.readouterr().err.splitlines()[-1]

    return of_file


@pytest.fixture
def net(users_net):
    """Writes the user's module; its configuration."""

    def write(built="torch.optim.SGD(params, lr=0.1)", returned="optimizer", step="pass"):
        users_net(NET.format(built=built, returned=returned, step=step))
        return {"model": {"class_path": "users_net.Net"}}

    return write


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"optimizer": of("torch.optim.SGD", lr=-1)}, "optimizer: SGD: Invalid learning rate: -1.0."),
        (
            {"optimizer": of("torch.optim.AdamW", lr=0.1, betas=[0.9, 2.0])},
            "optimizer: AdamW: Invalid beta parameter at index 1: 2.0.",
        ),
        (scheduler("ReduceLROnPlateau", factor=2.0), "lr_scheduler: ReduceLROnPlateau: Factor should be < 1.0."),
        (
            {"optimizer": of("SGD", lr=0.1)}
            | {"lr_scheduler": of("lightning.pytorch.cli.ReduceLROnPlateau", monitor="x", factor=2.0)},
            "lr_scheduler: ReduceLROnPlateau: Factor should be < 1.0.",
        ),
    ],
)
@pytest.mark.parametrize("command", [each for each in COMMANDS if each != "validate"])  # which builds no optimizer
def test_a_value_of_the_file_is_said_with_its_key(end, command, content, sentence):
    assert end(command, content) == (2, f"optkit {command}: {sentence}")


@pytest.mark.parametrize(
    ("name", "init_args", "call"),
    [
        ("StepLR", {"step_size": 0}, "StepLR(step_size=0)"),
        ("CosineAnnealingLR", {"T_max": 0}, "CosineAnnealingLR(T_max=0)"),
    ],
)
def test_a_scheduler_that_cannot_compute_names_what_it_was_given(end, name, init_args, call):
    said = f"{call}: torch cannot compute with these arguments (integer modulo by zero)."
    assert end("fit", scheduler(name, **init_args)) == (2, f"optkit fit: lr_scheduler: {said}")


def test_a_scheduler_that_ends_before_the_run_says_so(end):
    content = scheduler("OneCycleLR", max_lr=0.1, total_steps=1)
    status, said = end("fit", content)
    assert status == 2 and said.startswith("optkit fit: lr_scheduler: OneCycleLR: Tried to step 2 times. ")


@pytest.mark.parametrize(
    ("built", "sentence"),
    [
        ("torch.optim.SGD(params, lr=-1)", "SGD: Invalid learning rate: -1"),
        ("torch.optim.Adam([], lr=1)", "Adam: optimizer got an empty parameter list"),
        ("ok.AdamW(params, lr=-1.0)", "AdamW(lr=-1.0): lr must be in [0, inf)"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "explain", "find-lr", "doctor"])
def test_what_configure_optimizers_gives_is_said_with_its_line(end, net, command, built, sentence):
    status, said = end(command, net(built))
    place = "(users_net.py, line 7)."
    assert (status, said) == (2, f"optkit {command}: model: users_net.Net: configure_optimizers: {sentence} {place}")


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (
            "[optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 0)]",
            "StepLR(step_size=0): torch cannot compute with these arguments (integer modulo by zero).",
        ),
        (
            "{'optimizer': optimizer, 'lr_scheduler': torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)}",
            "`configure_optimizers` must include a monitor",
        ),
    ],
)
def test_what_shows_later_is_said_with_the_model(end, net, returned, sentence):
    status, said = end("fit", net(returned=returned))
    assert status == 2 and said.startswith(f"optkit fit: model: users_net.Net: {sentence}")


@pytest.mark.parametrize(
    ("error", "given"),
    [
        (ZeroDivisionError, {"step": "1 / 0"}),
        (ValueError, {"step": "raise ValueError('mine')"}),
        (ValueError, {"step": "torch.optim.SGD(self.parameters(), lr=-1)"}),  # of torch, but asked for in training
        (ZeroDivisionError, {"returned": "torch.optim.SGD(self.parameters(), lr=1 / 0)"}),
        (
            ZeroDivisionError,
            {"returned": "[optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / epoch)]"},
        ),
    ],
)
def test_an_error_of_the_users_code_stays_one(net, tmp_path, error, given):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"trainer": SHORT} | net(**given)))
    with pytest.raises(error):
        main(["fit", "--config", "run.yaml"])


def test_it_names_no_line_of_another_users_function():
    try:
        torch.optim.SGD([torch.zeros(1)], lr=-1)
    except ValueError as error:
        assert about_optimizer(error, {}) is None


def test_compare_names_the_setting_with_the_status_of_a_wrong_file(users_net, tmp_path, capsys):
    users_net("")
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({"model": BORING, "trainer": SHORT}))
    (tmp_path / "tried.yaml").write_text(yaml.safe_dump({"optimizer": of("torch.optim.SGD", lr=-1)}))
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["compare", "--task", "task.yaml", "--tried", "tried.yaml", "--seeds", "1"])
    said = capsys.readouterr().err
    assert said == "optkit compare: --tried tried.yaml: optimizer: SGD: Invalid learning rate: -1.0.\n"


@pytest.mark.parametrize("command", ["fit", "explain", "find-lr"])
@pytest.mark.parametrize("is_given", [True, False])
def test_an_optimizer_of_the_file_is_said_to_take_the_place_of_the_modules(net, tmp_path, command, is_given, recwarn):
    """Lightning's warning names a class of this package."""
    content = net() | {"trainer": SHORT} | ({"optimizer": of("torch.optim.SGD", lr=0.1)} if is_given else {})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    main([command, "--config", "run.yaml"])
    said = [str(each.message) for each in recwarn.list if "configure_optimizers" in str(each.message)]
    assert said == ["optimizer: that of the configuration takes the place of Net.configure_optimizers."] * is_given
