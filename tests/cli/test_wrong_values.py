# SPDX-License-Identifier: Apache-2.0
"""A value of another type or choice: the key, the value, and what it takes."""

import sys

import pytest
import yaml

from lightning_optkit.cli import main
from lightning_optkit.cli.wrong_values import about_value

pytestmark = pytest.mark.filterwarnings("ignore")

BORING = {"class_path": "lightning.pytorch.demos.boring_classes.BoringModel"}
PRECISIONS = (
    "64, 32, 16, transformer-engine, transformer-engine-float16, 16-true, 16-mixed, bf16-true, bf16-mixed, 32-true, "
    "64-true, bf16, null."
)


def of(name, **init_args):
    return {"class_path": name, "init_args": init_args}


def trainer(**arguments):
    return {"trainer": arguments}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (trainer(precision=17), f"trainer.precision: 17 is none of {PRECISIONS}"),
        (
            trainer(precision="bf16-mixd"),
            f"trainer.precision: bf16-mixd is none of {PRECISIONS} Near it: bf16-mixed, 16-mixed.",
        ),
        (
            trainer(deterministic="wran"),
            "trainer.deterministic: wran is none of true, false, warn, null. Near it: warn.",
        ),
        (trainer(inference_mode="maybe"), "trainer.inference_mode: maybe is none of true, false."),
        (trainer(log_every_n_steps=[1]), "trainer.log_every_n_steps: [1] is none of int, null."),
        (trainer(max_time=3.3), "trainer.max_time: 3.3 is none of str, timedelta, dict[str, int], null."),
        (trainer(strategy=3), "trainer.strategy: 3 is none of str, Strategy."),
        (trainer(logger=3), "trainer.logger: 3 is none of Logger, Iterable[Logger], true, false, null."),
        (trainer(logger="TensorBordLogger"), "trainer.logger: there is no class TensorBordLogger. Near it: Tensor"),
        (
            trainer(callbacks=[of("Fuse"), 3]),
            "trainer.callbacks: 3 is no Callback; name a class, as in {class_path: my_file.MyCallback}.",
        ),
        (
            trainer(callbacks=[of("Fuse", rounding="split3")]),
            "trainer.callbacks: lightning_optkit.Fuse: rounding: split3 is none of nearest, stochastic, kahan, "
            "split24, split32. Near it: split32, split24.",
        ),
        (
            trainer(callbacks=[of("Fuse"), of("LearningRateMonitor", logging_interval="stp")]),
            "trainer.callbacks: lightning.pytorch.callbacks.LearningRateMonitor: logging_interval: stp is none of "
            "step, epoch, null. Near it: step.",
        ),
        ({"optimizer": of("torch.optim.SGD", lr="x")}, "optimizer: torch.optim.SGD: lr: x is none of float, Tensor."),
        ({"seed_everything": "x"}, "seed_everything: x is none of true, false, int."),
    ],
)
@pytest.mark.parametrize("command", ["fit", "explain"])
def test_it_is_one_sentence(tmp_path, monkeypatch, capsys, command, content, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": BORING} | content))
    with pytest.raises(SystemExit, match=r"^2$"):
        main([command, "--config", "run.yaml"])
    usage, _tip, said = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and said.startswith(f"error: {sentence}")


def test_a_class_is_left_to_others():
    within = "Subtypes: [list[a.Callback]]\nErrors:\n- {}\nGiven value: [{{'class_path': 'a.B'}}]"
    assert about_value(within.format("Problem with given class_path 'a.B':")) is None
    assert about_value(within.format("Expected a dot import path string: B")) is None
    assert about_value("Subtypes: [<class 'a.Schedule'>]\nErrors:\nGiven value: cosin") is None
    assert about_value("Subtypes: [<class 'a.Schedule'>]\nErrors:\nGiven value: 3") == (
        "3 is no Schedule; name a class, as in {class_path: my_file.MySchedule}."
    )
    assert about_value("Subtypes: [typing.Literal['O1', 'O2']]\nErrors:\nGiven value: O3") == ("O3 is none of O1, O2.")
    assert about_value("Something else") is None and about_value("") is None
