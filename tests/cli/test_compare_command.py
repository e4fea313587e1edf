# SPDX-License-Identifier: Apache-2.0
"""`optkit compare` runs one task under several settings and seeds."""

import re
import signal
import sys

import pytest

from lightning_optkit.cli import main

TASK = """
model: {class_path: lightning.pytorch.demos.boring_classes.DemoModel, init_args: {learning_rate: 0.02}}
data: {class_path: lightning.pytorch.demos.boring_classes.BoringDataModule}
trainer:
  max_epochs: 1
  limit_train_batches: 4
  limit_val_batches: 1
  accelerator: cpu
"""
FUSED = "trainer: {callbacks: [{class_path: Fuse, init_args: {verbose: false}}]}"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(TASK)
    (tmp_path / "fused.yaml").write_text(FUSED)
    return tmp_path


def test_each_setting_runs_with_each_seed_and_leaves_the_page_alone(folder, capsys):
    main(["compare", "--task", "task.yaml", "--tried", "fused.yaml", "--seeds", "3", "4"])
    shown = capsys.readouterr().out
    assert re.findall(r"^(.*), seed (\d): 4 steps", shown, re.MULTILINE) == [
        ("as it is", "3"), ("as it is", "4"), ("fused.yaml", "3"), ("fused.yaml", "4"),
    ]  # fmt: skip
    (loss,) = [line for line in shown.splitlines() if "training loss" in line]
    plain, fused = re.findall(r"[\d.e-]+ \+- [\d.e-]+", loss)
    assert plain == fused and not plain.endswith("+- 0")  # the same numbers, and the seeds differ
    assert sorted(path.name for path in folder.iterdir()) == ["compared.html", "fused.yaml", "task.yaml"]
    page = (folder / "compared.html").read_text()
    assert "What differs" in page and page.index('<th scope="row">Fuse') < page.index("Results")


def test_a_task_may_name_what_saves_checkpoints_and_none_is_saved(folder, capsys):
    callbacks = "  callbacks: [{class_path: ModelCheckpoint, init_args: {dirpath: saved}}]\n"
    (folder / "task.yaml").write_text(TASK + callbacks)
    main(["compare", "--task", "task.yaml", "--tried", "fused.yaml", "--seeds", "3"])
    assert "as it is, seed 3: 4 steps" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["compared.html", "fused.yaml", "task.yaml"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--task", "none.yaml"], "optkit compare: --task none.yaml: there is no such file."),
        (["--task", "tsk.yaml"], "optkit compare: --task tsk.yaml: there is no such file. Near it: task.yaml."),
        (
            ["--task", "task.yaml", "--tried", "transfomer"],
            "optkit compare: --tried transfomer: there is no such file",
        ),
        (["--task", "task.yaml", "--seeds", "1", "1"], "optkit compare: --seeds 1 is given twice."),
        (["--task", "task.yaml", "--tried", "mlp", "--tried", "mlp"], "optkit compare: --tried mlp is given twice."),
        (["--seeds", "1"], "usage: "),
        (["--task", "fused.yaml", "--seeds", "1"], "optkit compare: nothing to compare"),
    ],
)
def test_a_mistake_is_said_in_a_sentence(folder, capsys, words, sentence):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["compare", *words])
    assert capsys.readouterr().err.startswith(sentence)


def test_a_setting_that_cannot_run_is_named(folder, capsys):
    (folder / "bad.yaml").write_text(FUSED.replace("Fuse", "MaxNorm").replace("verbose: false", "max_norm: 0.0"))
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["compare", "--task", "task.yaml", "--tried", "bad.yaml", "--seeds", "1"])
    sentence = "trainer.callbacks: MaxNorm(max_norm=0.0): max_norm must be in (0, inf)."
    assert capsys.readouterr().err == f"optkit compare: --tried bad.yaml: {sentence}\n"
    (folder / "bad.yaml").write_text(FUSED.replace("Fuse", "Fuze"))
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--task", "task.yaml", "--tried", "bad.yaml", "--seeds", "1"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.endswith(
        "Near it: Fuse.\noptkit compare: it ended in the settings of --tried bad.yaml.\n"
    )


def test_a_task_with_a_refused_value_leaves_what_replaces_it(folder, capsys):
    """The optimizer of a file is built when the fit starts."""
    optimizer = "optimizer: {class_path: lightning_optkit.SGD, init_args: {lr: %s}}\n"
    (folder / "task.yaml").write_text(TASK + optimizer % -1.0)
    (folder / "mine.yaml").write_text(optimizer % 0.1)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["compare", "--task", "task.yaml", "--tried", "mine.yaml", "--seeds", "1"])
    out, said = capsys.readouterr()
    assert said.startswith("optkit compare: as it is, seed 1: optimizer: SGD(lr=-1.0): lr must be in [0, inf).\n")
    assert "mine.yaml, seed 1: 4 steps" in out


MODEL = """
import lightning.pytorch as pl
from lightning.pytorch.demos.boring_classes import DemoModel


class Fails(DemoModel):
    def __init__(self, at: int = 2, learning_rate: float = 0.02):
        super().__init__(learning_rate=learning_rate)
        self.at = at
        if at < 0:
            raise ValueError("my own bug")

    def training_step(self, batch, batch_idx):
        if self.global_step == self.at:
            raise ValueError("my own bug")
        return super().training_step(batch, batch_idx)
"""


@pytest.fixture
def failing(folder, monkeypatch):
    (folder / "models_of_compare.py").write_text(MODEL)
    monkeypatch.syspath_prepend(folder)
    for name, at in (("late", 2), ("first", 0), ("init", -1)):
        (folder / f"{name}.yaml").write_text(f"model: {{class_path: models_of_compare.Fails, init_args: {{at: {at}}}}}")
    return folder


def test_a_run_that_fails_is_counted_and_the_others_go_on(failing, capsys):
    main(["compare", "--task", "task.yaml", "--tried", "late.yaml", "--tried", "fused.yaml", "--seeds", "1"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "late.yaml, seed 1: 2 steps" in shown and "by ValueError: my own bug" in shown
    assert "ended early 0 1 0" in shown and "fused.yaml, seed 1: 4 steps" in shown
    assert "Ended before its time" in (failing / "compared.html").read_text()


def test_ctrl_c_says_in_which_run(failing, capsys):
    interrupted = MODEL.replace('raise ValueError("my own bug")', "raise KeyboardInterrupt")
    (failing / "models_of_compare.py").write_text(interrupted)
    sys.modules.pop("models_of_compare", None)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit, match=r"^130$"):
            main(["compare", "--task", "task.yaml", "--tried", "late.yaml", "--seeds", "6"])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further ones
        sys.modules.pop("models_of_compare", None)
    out, said = capsys.readouterr()
    assert "optkit compare: it ended in the run: late.yaml, seed 6.\n" in said
    assert "Of the runs so far: " in out and (failing / "compared.html").exists()


@pytest.mark.parametrize("name", ["first", "init"])
def test_a_setting_that_cannot_begin_shows_the_users_line_and_keeps_the_runs_so_far(failing, capsys, name):
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--task", "task.yaml", "--tried", f"{name}.yaml", "--seeds", "1"])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("Not run")]
    assert exit_info.value.code == 1 and lines[-1] == "ValueError: my own bug"
    assert "models_of_compare.py" in captured.err and "jsonargparse" not in lines[-3]
    of = {"first": "first.yaml, seed 1", "init": "--tried init.yaml"}[name]
    assert f"optkit compare: {of}: it ended by this error." in lines
    assert (failing / "compared.html").exists() == (
        name == "first"
    )  # one that cannot be built is found before all runs


@pytest.mark.parametrize("fault", ["user", "settings"])
def test_the_others_go_on_after_a_setting_that_cannot_begin(failing, capsys, fault):
    twice = "trainer: {callbacks: [{class_path: Fuse}, {class_path: Fuse}]}"  # found when the fit starts
    (failing / "twice.yaml").write_text(twice)
    name = {"user": "first.yaml", "settings": "twice.yaml"}[fault]
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--task", "task.yaml", "--tried", name, "--tried", "fused.yaml", "--seeds", "1", "2"])
    captured = capsys.readouterr()
    assert exit_info.value.code == {"user": 1, "settings": 2}[fault]
    assert re.findall(r"^(.*), seed (\d): 4 steps", captured.out, re.MULTILINE) == [
        ("as it is", "1"), ("as it is", "2"), ("fused.yaml", "1"), ("fused.yaml", "2"),
    ]  # fmt: skip
    said = {"user": "it ended by this error.", "settings": "trainer.callbacks: Fuse(): given twice; "}[fault]
    assert captured.err.startswith(f"optkit compare: {name}, seed 1: {said}") and "seed 2" not in captured.err
    assert captured.err.splitlines()[-1] == f"Not run, as said above: {name}."
    assert "compared.html" in captured.out.splitlines()[-1] and "fused.yaml" in (failing / "compared.html").read_text()


def test_nothing_to_compare_is_said(folder, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", "--task", "task.yaml"])
    captured = capsys.readouterr()
    assert exit_info.value.code == 2 and captured.out == "" and not (folder / "compared.html").exists()
    assert captured.err.startswith("optkit compare: nothing to compare with the task: give --tried at least once")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--output", "task.yaml"], "it is one of the files of this comparison, and would be overwritten."),
        (["--output", "task.yaml/page.html"], "task.yaml is a file, not a folder."),
        (["--seeds", "-1"], r"--seeds -1: a seed must be in [0, 2**32)."),
    ],
)
def test_what_would_fail_after_the_runs_is_said_before(folder, capsys, words, sentence):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["compare", "--task", "task.yaml", *words])
    out, said = capsys.readouterr()
    assert said.endswith(f"{sentence}\n") and "seed 0" not in out
    assert (folder / "task.yaml").read_text() == TASK


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("{class_path: Fuze}", "error: trainer.callbacks: there is no class Fuze. Near it: Fuse."),
        ("{class_path: MaxNorm, init_args: {max_norm: 0.0}}", "trainer.callbacks: MaxNorm(max_norm=0.0): max_norm"),
    ],
    ids=["parser", "class"],
)
def test_a_fault_of_the_task_is_said_to_be_there(folder, capsys, fault, sentence):
    broken = f"  callbacks: [{fault}]\n"
    (folder / "plain.yaml").write_text("trainer: {max_epochs: 2}")
    (folder / "bad.yaml").write_text(f"trainer:\n{broken}")
    for task, tried in ((TASK + broken, "plain.yaml"), (TASK, "bad.yaml")):
        (folder / "task.yaml").write_text(task)
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["compare", "--task", "task.yaml", "--tried", tried, "--seeds", "1"])
        said = capsys.readouterr().err
        right, wrong = (
            ("--task task.yaml", "--tried") if tried == "plain.yaml" else ("--tried bad.yaml", "--task task.")
        )
        assert right in said.splitlines()[-1] and wrong not in said.splitlines()[-1] and sentence in said
        if "Fuze" in fault:
            assert said.startswith("usage: optkit compare --task TASK") and len(said.splitlines()) == 4
