# SPDX-License-Identifier: Apache-2.0
"""A configuration may lie in any folder: its module is found in the current one, or beside it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import lightning_optkit as ok
from lightning_optkit.cli import main
from lightning_optkit.cli.users_folders import add_users_folders, is_of_user, users_folders

pytestmark = pytest.mark.filterwarnings("ignore")

NET = """
from lightning.pytorch.demos.boring_classes import BoringModel


class Net(BoringModel):
    def on_fit_start(self):
        print({place!r})
"""
TRAINER = {"accelerator": "cpu", "logger": False, "max_epochs": 1, "limit_train_batches": 40, "limit_val_batches": 1}
QUIET = {"enable_checkpointing": False, "enable_progress_bar": False}
RUN = {"model": {"class_path": "users_net.Net"}, "trainer": TRAINER | QUIET}


@pytest.fixture
def project(users_net, tmp_path):
    """The current folder, with the module, and a configuration in another one."""
    users_net(NET.format(place="of the project"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "run.yaml").write_text(yaml.safe_dump(RUN))
    return tmp_path


@pytest.mark.parametrize("command", ["fit", "validate", "explain"])
@pytest.mark.parametrize("is_absolute", [False, True])
def test_the_module_of_the_current_folder_is_found(project, capsys, command, is_absolute):
    main([command, "-c", str(project / "configs" / "run.yaml") if is_absolute else "configs/run.yaml"])
    assert Path(sys.modules["users_net"].__file__) == project / "users_net.py"
    assert ("of the project" in capsys.readouterr().out) == (command != "validate")


@pytest.mark.parametrize("command", ["explain", "compare"])
def test_a_process_started_by_the_script_finds_it(project, command):
    """`python -m` has the current folder on its path, the script `optkit` has not."""
    (project / "tried.yaml").write_text("trainer: {callbacks: [{class_path: Fuse}]}")
    words = ["-c", "configs/run.yaml"]
    if command == "compare":
        words = ["--task", "configs/run.yaml", "--tried", "tried.yaml", "--seeds", "1"]
    script = "import sys; sys.path.remove(''); from lightning_optkit.cli import main; main(sys.argv[1:])"
    path = os.pathsep.join([str(Path(ok.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    ended = subprocess.run(
        [sys.executable, "-c", script, command, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert ended.returncode == 0, ended.stderr
    assert "of the project" in ended.stdout


def test_the_file_that_a_run_wrote_is_found_again(project):
    main(["fit", "-c", "configs/run.yaml", "--trainer.logger", "true"])
    (written,) = project.glob("lightning_logs/*/optkit_config.yaml")
    del sys.modules["users_net"]
    main(["explain", "--config=" + str(written.relative_to(project))])
    assert "users_net" in sys.modules


def test_the_module_beside_the_file_is_found_after_that_of_the_current_folder(project, monkeypatch, capsys):
    (project / "configs" / "users_net.py").write_text(NET.format(place="beside the file"))
    main(["explain", "-c", "configs/run.yaml"])
    assert "of the project" in capsys.readouterr().out
    del sys.modules["users_net"]
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    sys.path[:] = [each for each in sys.path if not Path(each).is_relative_to(project)]
    main(["explain", "-c", "../configs/run.yaml"])
    assert "beside the file" in capsys.readouterr().out


@pytest.mark.parametrize("beside", ["configs", "links"])
def test_of_a_link_both_folders_are_looked_into(project, monkeypatch, capsys, beside):
    (project / "links").mkdir()
    (project / "links" / "run.yaml").symlink_to(project / "configs" / "run.yaml")
    shutil.move(project / "users_net.py", project / beside / "users_net.py")
    main(["explain", "-c", "links/run.yaml"])
    assert Path(sys.modules["users_net"].__file__) == project / beside / "users_net.py"


def test_one_that_is_nowhere_is_said_with_the_folders(project, capsys):
    (project / "configs" / "users_nest.py").touch()
    shutil.move(project / "users_net.py", project / "a_users_net.py")
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["explain", "-c", "configs/run.yaml"])
    said = capsys.readouterr().err.splitlines()[-1]
    before, _, folders = said.partition(" Looked into ")
    assert before.startswith("error: model: there is no module users_net. Near it: ")
    assert "users_nest" in before and "a_users_net" in before
    looked = folders.removesuffix(", and the installed packages.").split(", ")
    assert looked[0] == str(project) and str(project / "configs") in looked


def test_folders_are_absolute_and_each_stands_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "a").mkdir()
    for _ in range(2):
        add_users_folders(["a/one.yaml", "a/two.yaml", "three.yaml", "missing/four.yaml"])
    assert sys.path[0] == str(tmp_path) and sys.path[-1] == str(tmp_path / "a")
    assert [sys.path.count(str(each)) for each in (tmp_path, tmp_path / "a", tmp_path / "missing")] == [1, 1, 0]
    own = users_folders()
    assert own[0] == str(tmp_path) and str(Path(os.__file__).parent) not in own
    assert not any(each.endswith("site-packages") for each in own)
    assert is_of_user(str(tmp_path / "a" / "net.py")) and not is_of_user(os.__file__) and not is_of_user(yaml.__file__)
