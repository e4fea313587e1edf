# SPDX-License-Identifier: Apache-2.0
"""A value that a class refuses: its sentence with the key of the file, and the status of a wrong file."""

import sys

import pytest
import yaml
from jsonargparse import Namespace

from lightning_optkit.cli import main
from lightning_optkit.cli.refused_values import _Built, _built, _key_of, about_settings

pytestmark = pytest.mark.filterwarnings("ignore")

BORING = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
QUIET = dict(logger=False, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, max_epochs=1)
CALLBACK, CLIPPING = "trainer.callbacks: ", "trainer.callbacks: lightning_optkit.GradientClipping: clip: "
SCHEDULE = "trainer.callbacks: lightning_optkit.LRSchedule: schedule: "


def of(name, **init_args):
    return {"class_path": name, "init_args": init_args}


def callbacks(*given):
    return {"trainer": {**QUIET, "callbacks": [of("Fuse"), *given]}}


@pytest.fixture
def end(tmp_path, monkeypatch, capsys):
    """The status of `optkit COMMAND` with a file, and its last line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def of_file(command, content):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": BORING, "trainer": QUIET} | content))
        with pytest.raises(SystemExit) as exit_info:
            main([command, "--config", "run.yaml"])
        code = exit_info.value.code
        return (1, code) if isinstance(code, str) else (code, capsys.readouterr().err.splitlines()[-1])

    return of_file


def clip(name, **init_args):
    return callbacks(of("GradientClipping", clip=of(name, **init_args)))


OURS = [
    (clip("AutoClip", percentile=1000), f"{CLIPPING}AutoClip(percentile=1000.0): percentile must be in [0, 100]."),
    (  # not the first class of its place
        clip("ClipNorm", max_norm=-1.0),
        f"{CLIPPING}ClipNorm(max_norm=-1.0): max_norm must be in (0, inf).",
    ),
    (
        callbacks(of("LRSchedule", schedule=of("lightning_optkit.schedules.cosine", min_factor=2.0))),
        f"{SCHEDULE}cosine(min_factor=2.0): min_factor must be in [0, 1].",
    ),
    (
        callbacks(
            of(
                "LRSchedule",
                schedule=of(
                    "lightning_optkit.schedules.warmup",
                    steps=2,
                    schedule=of("lightning_optkit.schedules.cosine", min_factor=2.0),
                ),
            )
        ),
        f"{SCHEDULE}lightning_optkit.schedules.warmup: schedule: cosine(min_factor=2.0): min_factor must",
    ),
    (
        callbacks(of("MaxNorm", max_norm=1.0), of("MaxNorm", max_norm=0.0)),
        f"{CALLBACK}MaxNorm(max_norm=0.0): max_norm must be in (0, inf).",
    ),
    (
        callbacks(of("Augment", augmentations=[of("GaussianNoise", sigma=-0.1)])),
        f"{CALLBACK}lightning_optkit.Augment: augmentations: GaussianNoise(sigma=-0.1): sigma must be in [0, inf).",
    ),
    (  # built when the fit starts
        {"optimizer": of("lightning_optkit.AdamW", lr=0.1, betas=[0.9, 2.0])},
        "optimizer: AdamW(betas[1]=2.0): betas[1] must be in [0, 1).",
    ),
]
LIGHTNINGS = [
    (callbacks(of("ModelCheckpoint", save_top_k=-7)), f"{CALLBACK}Invalid value for save_top_k=-7."),
    ({"trainer": QUIET | {"gradient_clip_algorithm": "nrm"}}, "trainer: `gradient_clip_algorithm` nrm is invalid."),
    ({"trainer": QUIET | {"accelerator": "cpuu"}}, "trainer: You selected an invalid accelerator name"),  # ValueError
]


@pytest.mark.parametrize(("content", "sentence"), [*OURS, *LIGHTNINGS])
@pytest.mark.parametrize("command", ["fit", "explain"])
def test_it_is_said_with_the_key_and_the_status_of_a_wrong_file(end, command, content, sentence):
    status, said = end(command, content)
    assert status == 2 and said.startswith(f"optkit {command}: {sentence}")


TWICE = "given twice, with nothing that tells their states apart; keep one."


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (of("GradientHealth"), f"GradientHealth(...): {TWICE}"),
        (of("EarlyStopping", monitor="loss"), f"EarlyStopping(...): {TWICE}"),
        (of("MaxNorm", max_norm=1.0), "MaxNorm(...): given twice; a run takes one."),  # found when the fit starts
    ],
)
@pytest.mark.parametrize("command", ["fit", "explain", "find-lr"])
def test_two_that_are_equal_are_said_with_their_key(end, command, given, sentence):
    assert end(command, callbacks(given, given)) == (2, f"optkit {command}: {CALLBACK}{sentence}")


@pytest.mark.parametrize("command", ["validate", "find-lr", "doctor"])
def test_every_command_says_it(end, command):
    content, sentence = OURS[1]
    assert end(command, content) == (2, f"optkit {command}: {sentence}")


def test_what_the_users_module_gives_a_class_is_no_value_of_the_file(users_net, capsys):
    users_net(
        "from lightning.pytorch.demos.boring_classes import BoringModel\nimport lightning_optkit as ok\n"
        "class Net(BoringModel):\n    def __init__(self):\n        super().__init__(); ok.ClipNorm(-1.0)\n"
    )
    with open("run.yaml", "w") as file:
        yaml.safe_dump({"model": of("users_net.Net"), "trainer": QUIET}, file)
    sentence = r"^optkit fit: ClipNorm\(max_norm=-1.0\): max_norm must be in \(0, inf\) \(users_net.py, line 5\)\.$"
    with pytest.raises(SystemExit, match=sentence):
        main(["fit", "--config", "run.yaml"])


def test_of_two_of_a_class_it_is_the_one_with_the_value():
    two = {"a": [of("x.Clip", norm=1.0), of("x.Clip", norm=2)], "b": of("y.Clip", norm=3.0), "c": 1}
    built = [*_built(Namespace(**two), "")]
    assert built[2] == _Built("b", "Clip", {"norm": 3.0})
    assert _key_of("Clip(norm=2.0): too much.", built, None) == "a"
    assert _key_of("Clip(norm=3.0): too much.", built, None) == "b"
    assert _key_of("Clip(norm=4.0): too much.", built, None) is None
    assert _key_of("Clip(size=3.0): too much.", built, None) is None
    assert _key_of("Clop(norm=3.0): too much.", built, "Clip") == "a"


HANDLED = """
import lightning_optkit as ok
from lightning.pytorch.demos.boring_classes import BoringModel

class Net(BoringModel):
    def PLACE:
        LEAD
        try:
            ok.ClipNorm(max_norm=-1.0)
        except ValueError as error:
            self.clip = BUG
"""
LEADS = {"__init__(self)": "super().__init__()", "configure_optimizers(self)": "pass", "on_fit_start(self)": "pass"}


@pytest.mark.parametrize("place", LEADS)
def test_a_refusal_that_the_users_code_has_caught_hides_no_error_of_its_own(users_net, place):
    users_net(HANDLED.replace("PLACE", place).replace("LEAD", LEADS[place]).replace("BUG", "undefined_thing"))
    with open("run.yaml", "w") as file:
        yaml.safe_dump({"model": of("users_net.Net"), "trainer": QUIET}, file)
    with pytest.raises(NameError, match=r"^name 'undefined_thing' is not defined$"):
        main(["fit", "--config", "run.yaml"])


def test_one_that_it_raises_another_error_from_is_said(users_net):
    source = HANDLED.replace("PLACE", "__init__(self)").replace("LEAD", "super().__init__()")
    users_net(source.replace("self.clip = BUG", "raise RuntimeError('no clip') from error"))
    with open("run.yaml", "w") as file:
        yaml.safe_dump({"model": of("users_net.Net"), "trainer": QUIET}, file)
    with pytest.raises(SystemExit, match=r"^optkit fit: ClipNorm\(max_norm=-1.0\): .* \(users_net.py, line 9\)\.$"):
        main(["fit", "--config", "run.yaml"])


def test_an_error_that_follows_one_which_was_never_raised_is_the_users():
    try:
        raise KeyError("of the user") from ValueError("of nobody")
    except KeyError as error:
        assert about_settings(error) is None
