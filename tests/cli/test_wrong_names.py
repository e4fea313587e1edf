# SPDX-License-Identifier: Apache-2.0
"""A wrong name in a file: one line with the names near it; other messages of the parser as they are."""

import sys
from pathlib import Path

import pytest
import yaml

from lightning_optkit.cli import main
from lightning_optkit.cli.wrong_names import about_key, in_short

pytestmark = pytest.mark.filterwarnings("ignore")

BORING = "lightning.pytorch.demos.boring_classes.BoringModel"
CLIPPING = "trainer.callbacks: lightning_optkit.GradientClipping: clip: "

SCHEDULE = "trainer.callbacks: lightning_optkit.LRSchedule: schedule: "
NO_SCHEDULES, COSINE = "there is no module schedules. Near it: ", "lightning_optkit.schedules.cosine"


def of(name, **init_args):
    return {"class_path": name, "init_args": init_args} if init_args else {"class_path": name}


def callback(name, **init_args):
    return {"trainer": {"callbacks": [of("Fuse"), of(name, **init_args)]}}


def clip(name, **init_args):
    return callback("GradientClipping", clip=of(name, **init_args))


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """What `optkit COMMAND` prints of a file, less the two lines that lead to the help."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def of_file(command="explain", **content):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": of(BORING)} | content))
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--config", "run.yaml"])
        assert exit_info.value.code == 2
        usage, tip, *rest = capsys.readouterr().err.splitlines()
        assert usage.startswith("usage: ") and tip.startswith("tip: ")
        return "\n".join(rest).removeprefix("error: ")

    return of_file


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (callback("Fuze"), "trainer.callbacks: there is no class Fuze. Near it: Fuse."),
        (callback("lightning_optkit.Fuze"), "trainer.callbacks: there is no Fuze in lightning_optkit. Near it: Fuse."),
        (callback("ClipNorm", max_norm=1.0), "trainer.callbacks: ClipNorm is no class for this place."),
        (
            callback("LRSchedule", schedule=of("lightning_optkit.schedules.cosin")),
            "trainer.callbacks: lightning_optkit.LRSchedule: schedule: there is no cosin in "
            "lightning_optkit.schedules. Near it: cosine.",
        ),
        (
            callback("Fuse", roundng="split32"),
            "trainer.callbacks: lightning_optkit.Fuse has no argument roundng. Near it: rounding.",
        ),
        (clip("ClipNrm", max_norm=1.0), f"{CLIPPING}there is no class ClipNrm. Near it: ClipNorm, Clip."),
        (
            clip("ClipNorm", maxnorm=1.0),
            f"{CLIPPING}lightning_optkit.ClipNorm has no argument maxnorm. Near it: max_norm.",
        ),
        (
            clip("ClipNorm", max_norm="much"),
            f"{CLIPPING}lightning_optkit.ClipNorm: max_norm: much is no float.",
        ),
        (
            callback("GradientClipping", clip=1.0),
            "trainer.callbacks: lightning_optkit.GradientClipping: clip: 1.0 is none of AutoClip, ClipNorm, "
            "ClipPerTensor, ClipUnitwise, ClipValue, ZClip; name a class, as in {class_path: AutoClip}.",
        ),
        (callback("LRSchedule", schedule="cosine"), f"{SCHEDULE}cosine is no class; say {COSINE}."),
        (callback("LRSchedule", schedule=of("cosine")), f"{SCHEDULE}cosine is no class; say {COSINE}."),
        (callback("LRSchedule", schedule="schedules.cosine"), f"{SCHEDULE}{NO_SCHEDULES}{COSINE}."),
        (callback("LRSchedule", schedule=of("schedules.cosine")), f"{SCHEDULE}{NO_SCHEDULES}{COSINE}."),
        (
            callback("LRSchedule", schedule=of("schedules.cosin")),
            f"{SCHEDULE}{NO_SCHEDULES}lightning_optkit.schedules.",
        ),
        (callback("LRSchedule", schedule="cosin"), f"{SCHEDULE}there is no class cosin. Near it: {COSINE}."),
        (
            {"optimizer": of("torch.optim.AdamW", rate=1.0)},
            "optimizer: torch.optim.AdamW has no argument rate. It has params, lr, betas, ",
        ),
        (
            callback("WeightAveraging", average=of("EMA", decay=0.9)),
            "trainer.callbacks: lightning.pytorch.callbacks.WeightAveraging has no argument average; "
            "lightning_optkit.WeightAveraging has it.",
        ),
        (
            {"optimizer": of("AdamW", lr=0.1, decouple_lr=True)},
            "optimizer: torch.optim.AdamW has no argument decouple_lr; lightning_optkit.AdamW has it.",
        ),
        (
            {"optimizer": of("AdamW", klip=of("ClipNorm", max_norm=1.0))},
            "optimizer: torch.optim.AdamW has no argument klip. It has params, lr, betas, ",
        ),
        ({"optimizer": of("AdamX")}, "optimizer: there is no class AdamX. Near it: Adamax, Adam, RAdam."),
        ({"lr_scheduler": of("StepRL", step_size=3)}, "lr_scheduler: there is no class StepRL. Near it: StepLR."),
        (
            {"model": of(BORING.replace("Boring", "Borin"))},
            "model: there is no BorinModel in lightning.pytorch.demos.boring_classes. Near it: BoringModel.",
        ),
        ({"model": of("lightning.Trianer")}, "model: there is no Trianer in lightning. Near it: Trainer."),
        ({"model": of("torch.nn.GUR")}, "model: there is no GUR in torch.nn. Near it: GRU"),
        ({"model": of(BORING.replace("demos", "demo"))}, "model: there is no module demo in lightning.pytorch. Near"),
        ({"model": of("quite_elsewhere.Net")}, "model: there is no module quite_elsewhere."),
    ],
)
def test_a_wrong_name_is_said_with_those_near_it(said, content, sentence, monkeypatch):
    monkeypatch.setattr(sys, "path", [each for each in sys.path if not Path(each, "schedules").is_dir()])  # of tests
    line = said(**content)
    assert line.startswith(sentence) and "\n" not in line


def test_fit_says_it_too_and_looks_in_the_current_folder(said, tmp_path):
    (tmp_path / "my_net.py").write_text("import a_package_that_is_not_there")
    line = said("fit", model=of("mynet.Net"))
    assert line.startswith(f"model: there is no module mynet. Near it: my_net. Looked into {tmp_path}, ")
    assert said("fit", model=of("my_net.Net")) == (
        "model: my_net cannot be imported: ModuleNotFoundError: No module named 'a_package_that_is_not_there' "
        "(my_net.py, line 1)."
    )


def test_what_has_another_form_is_left_as_it_is(said):
    assert about_key("Subcommand 'fit' does not accept option 'model.width'") is None
    assert about_key("unrecognized arguments: --confg run.yaml") is None
    assert in_short('Parser key "trainer.max_epochs":\n  Something else. Got value: two') is None


@pytest.mark.parametrize(
    ("command", "content", "sentence"),
    [
        (
            "explain",
            {"trainer": {"max_epoch": 3}},
            "trainer has no argument max_epoch. Near it: max_epochs, min_epochs.",
        ),
        ("fit", {"trainer": {"max_epoch": 3}}, "trainer has no argument max_epoch. Near it: max_epochs, min_epochs."),
        ("fit", {"trainer": {"max_epochs": "two"}}, "trainer.max_epochs: two is none of int, null."),
        ("explain", {"trainr": {"max_epochs": 3}}, "a configuration has no trainr. Near it: trainer."),
    ],
)
def test_a_key_that_nothing_has_is_said_with_those_near_it(said, command, content, sentence):
    assert said(command, **content) == sentence


NAMED = "{class_path: my_file.MyNet, init_args: {width: ...}}"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"model": {"width": 32}},
            f"model: it has arguments and names no class of yours; name it, as in model: {NAMED}.",
        ),
        (
            {"model": {"init_args": {"width": 32}}},
            f"model: it has arguments and names no class of yours; name it, as in model: {NAMED}.",
        ),
        (
            {"data": {"width": 32}},
            "data: it has arguments and names no class of yours; name it, as in data: "
            f"{NAMED.replace('MyNet', 'MyData')}.",
        ),
        ({"model": 3}, "model: 3 is no class; name one, as in model: {class_path: my_file.MyNet}."),
        ({"data": [1, 2]}, "data: [1, 2] is no class; name one, as in data: {class_path: my_file.MyData}."),
        ({"model": "BoringModl"}, "model: there is no class BoringModl."),
        ({"model": of(BORING, width=3)}, f"model: {BORING} has no argument width. It has none."),
    ],
)
@pytest.mark.parametrize("command", ["fit", "explain"])
def test_the_file_of_a_program_is_told_to_name_its_class(said, command, content, sentence):
    """Where the program names the class, as `LightningCLI(MyNet)`, the file has its arguments alone."""
    assert said(command, **content) == sentence


def test_a_file_without_a_model_is_told_how_it_names_one(tmp_path, capsys):
    (tmp_path / "no_model.yaml").write_text("trainer: {max_epochs: 1}")
    for command in ("fit", "explain"):
        with pytest.raises(SystemExit, match=r"^2$"):
            main([command, f"--config={tmp_path / 'no_model.yaml'}"])
        assert "error: a configuration of optkit names its model, as in model: {class_path: " in capsys.readouterr().err


def test_a_file_without_the_option_is_told_how_it_is_given():
    assert about_key("unrecognized arguments: a.yaml") == (
        "unrecognized arguments: a.yaml. A configuration is given as --config a.yaml."
    )


def test_a_key_with_a_dash_is_said_as_others():  # as of what a file has for its anchors alone
    of_anchors = "Subcommand 'fit' does not accept option 'x-common.max_epochs'"
    assert about_key(of_anchors) == "a configuration has no x-common."


@pytest.mark.parametrize("command", ["fit", "doctor", "test"])
def test_a_class_of_the_other_lightning_is_said_to_be_one(said, tmp_path, command):
    pytest.importorskip("pytorch_lightning")
    source = "import pytorch_lightning as pl\nclass M(pl.LightningModule):\n    def __init__(self, n: int = 4): ..."
    (tmp_path / "other_net.py").write_text(source)
    rest = " of pytorch_lightning; the commands take those of lightning.pytorch: "
    use = ", or use pytorch_lightning.Trainer in Python."
    for more in ({}, {"n": 3}):
        sentence = said(command, model=of("other_net.M", **more))
        assert sentence == f"model: other_net.M is a module{rest}change the import{use}"
    stopping = "callbacks.EarlyStopping"
    sentence = said(command, **callback(f"pytorch_lightning.{stopping}", monitor="loss"))
    assert (
        sentence
        == f"trainer.callbacks: pytorch_lightning.{stopping} is a callback{rest}say lightning.pytorch.{stopping}{use}"
    )
    sys.modules.pop("other_net", None)
