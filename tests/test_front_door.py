# SPDX-License-Identifier: Apache-2.0
"""`import lightning_optkit as ok` shows every public class, loads nothing, and is seen by type checkers."""

import ast
import importlib
import inspect
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import get_origin

import pytest
import torch

import lightning_optkit as ok
from lightning_optkit._names_elsewhere import NAMES_ELSEWHERE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_optkit"
NO_NAMES = {"cli", "_checks"}  # the command, and what is not public
FOLDERS = sorted({path.parent.name for path in PACKAGE.glob("*/__init__.py")} - NO_NAMES)
PUBLIC = {folder: importlib.import_module(f"lightning_optkit.{folder}") for folder in FOLDERS}
CLASSES = [
    (folder, name)
    for folder, module in PUBLIC.items()
    for name in module.__all__
    if inspect.isclass(vars(module)[name]) and get_origin(vars(module)[name]) is None  # as of an alias
]

FUNCTIONS = [("recipes", "recipe")]  # at the top beside the classes: its module holds files, and is rarely imported

USER = """
import lightning_optkit as ok
import torch

net = torch.nn.Linear(2, 2)
optimizer = ok.AdamW(net.parameters(), lr=1e-3, clip=ok.ClipNorm(1.0), average=ok.EMA(0.999))
schedule: ok.Schedule = ok.schedules.cosine()
callbacks = [ok.Fuse(), ok.GradientClipping(ok.AutoClip()), ok.LRSchedule(schedule), ok.WeightAveraging(ok.SWA())]
"""


def stub():
    """(folder or "", name) of every import in the stub."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 1 for node in imports)
    names = [(node.module or "", alias.name) for node in imports for alias in node.names]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)  # else mypy does not export it
    return names


def python(*words, cwd, **variables):
    environment = {**os.environ, "OPTKIT_EXTENSION": "0", **variables}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_stub_names_every_public_module_and_class_and_nothing_else():
    assert sorted(stub()) == sorted([*(("", folder) for folder in FOLDERS), *CLASSES, *FUNCTIONS])


def test_no_two_folders_have_a_public_name_in_common():
    """As long as none do, a name at the top needs no rule of precedence, and `from ... import *` hides nothing."""
    names = [name for module in PUBLIC.values() for name in module.__all__]
    assert sorted(names) == sorted({*names}) and not {*names} & {*FOLDERS}


@pytest.mark.parametrize(("folder", "name"), CLASSES, ids=str)
def test_a_class_at_the_top_is_that_of_its_folder(folder, name):
    found = getattr(ok, name)
    assert found is getattr(PUBLIC[folder], name)
    assert found.__module__.startswith(f"lightning_optkit.{folder}.")  # and so it is pickled by the path of its file
    assert pickle.loads(pickle.dumps(found)) is found


def test_the_top_lists_what_it_has():
    assert sorted(dir(ok)) == sorted(ok.__all__) == sorted([*FOLDERS, *(name for _, name in [*CLASSES, *FUNCTIONS])])
    assert all(getattr(ok, folder) is module for folder, module in PUBLIC.items())
    assert ok.schedules.cosine()(0, 10) == 1.0
    names = {}
    exec("from lightning_optkit import *", names)
    assert names["AdamW"] is ok.optimizers.AdamW


def test_a_name_it_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Fuze"):
        ok.Fuze  # noqa: B018
    with pytest.raises(ImportError, match="Fuze"):
        from lightning_optkit import Fuze  # noqa: F401


def test_the_import_alone_loads_neither_torch_nor_lightning():
    code = "import sys, lightning_optkit, lightning_optkit as ok; dir(ok); print(*sys.modules)"
    loaded = {name.split(".")[0] for name in python("-c", code, cwd=ROOT).stdout.split()}
    assert "lightning_optkit" in loaded
    assert not loaded & {"torch", "lightning", "lightning_fabric", "numpy", "torchmetrics", "jsonargparse", "rich"}


def test_the_import_takes_a_tenth_of_a_second_at_most():
    """3 to 8 ms where it was written; torch alone takes a second."""
    runs = [python("-X", "importtime", "-c", "import lightning_optkit", cwd=ROOT).stderr for _ in range(3)]
    (microseconds,) = zip(
        *(re.findall(r"\|\s*(\d+) \| lightning_optkit$", run, re.MULTILINE) for run in runs), strict=True
    )
    assert min(map(int, microseconds)) < 100_000


def test_first_use_imports_what_is_used_and_no_more():
    code = "import sys, lightning_optkit as ok; ok.schedules.cosine, ok.EMA; print(*sys.modules)"
    loaded = python("-c", code, cwd=ROOT).stdout.split()
    assert "lightning_optkit.averaging" in loaded and "lightning_optkit.schedules" in loaded
    assert "lightning_optkit.callbacks" not in loaded and "lightning" not in loaded


def test_the_text_of_a_recipe_is_there_without_lightning():
    code = "import sys, lightning_optkit as ok; ok.recipes.recipe_text('mlp'); print(*sys.modules)"
    loaded = python("-c", code, cwd=ROOT).stdout.split()
    assert "lightning_optkit.recipes" in loaded and "lightning" not in loaded


def mypy(folder, source):
    pytest.importorskip("mypy")
    (folder / "user.py").write_text(source)
    (folder / "libraries").mkdir()  # the package alone: on mypy's path everything counts as the user's own code
    (folder / "libraries" / "lightning_optkit").symlink_to(PACKAGE)
    words = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(folder / "cache"), "user.py"]
    environment = {**os.environ, "MYPYPATH": str(folder / "libraries")}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=200).stdout


def test_mypy_reads_the_front_door_of_a_users_file(tmp_path):
    shown = mypy(tmp_path, f"{USER}\nok.Fuze\nok.EMA(decay='x')\nreveal_type(ok.schedules.cosine())\n")
    assert 'user.py:10: error: Module has no attribute "Fuze"' in shown
    assert 'user.py:11: error: Argument "decay" to "EMA" has incompatible type "str"' in shown
    assert "lightning_optkit.schedules.schedule.Schedule" in shown
    assert len(re.findall(r"^user\.py:\d+: error: ", shown, flags=re.MULTILINE)) == 2


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel, a source archive, and what `pip install --editable` makes of a checkout."""
    pytest.importorskip("setuptools", "71")
    folder = tmp_path_factory.mktemp("built")
    checkout = folder / "checkout"
    left_out = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("lightning_optkit", "csrc"):
        shutil.copytree(ROOT / name, checkout / name, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, checkout)
    for kind in ("wheel", "sdist", "editable"):
        python("-c", f"import setuptools.build_meta as build; build.build_{kind}({str(folder)!r})", cwd=checkout)
    return folder


def test_wheel_and_source_archive_hold_what_is_not_python(built):
    data = {"lightning_optkit/py.typed", "lightning_optkit/__init__.pyi", "lightning_optkit/diagnostics/report.html.j2"}
    data |= {f"lightning_optkit/recipes/{name}.yaml" for name in ok.recipes.recipe_names()}
    (wheel,) = (path for path in built.glob("*.whl") if "editable" not in path.name)
    assert data <= {*zipfile.ZipFile(wheel).namelist()}
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.split("/", 1)[-1] for name in file.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.[hc]*") if path.is_file()}
    assert len(sources) > 20 and data | sources <= held


def test_an_editable_install_is_a_path_that_type_checkers_follow(built):
    """By default setuptools writes an import hook, which only Python itself understands."""
    (wheel,) = built.glob("*editable*.whl")
    with zipfile.ZipFile(wheel) as file:
        (path,) = (name for name in file.namelist() if name.endswith(".pth"))
        assert Path(file.read(path).decode().strip()).resolve() == (built / "checkout").resolve()
        assert not [name for name in file.namelist() if name.endswith(".py")]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Fuze", ". Near it: Fuse."),
        ("adamw", ". Near it: AdamW, "),
        ("cosine", ". It is ok.schedules.cosine."),
        ("he", ". It is ok.init.he."),
        ("cosin", ". Near it: ok.schedules.cosine."),
        ("schedule", ". Near it: Schedule, schedules, "),
        ("Fues", ". Near it: Fuse."),
        ("ReduceLROnPlateau", ". It is ok.PlateauSchedule."),
        ("quite_another_thing", ". `optkit list WORD` finds names by what they do."),
    ],
)
def test_a_wrong_name_is_said_with_what_was_meant(name, hint):
    with pytest.raises(AttributeError) as error:
        getattr(ok, name)
    assert str(error.value).startswith(f"module 'lightning_optkit' has no attribute '{name}'{hint}")
    with pytest.raises(ImportError) as not_imported:
        exec(f"from lightning_optkit import {name}")
    assert str(not_imported.value).startswith(f"cannot import name '{name}' from 'lightning_optkit'{hint}")


@pytest.mark.parametrize(
    ("folder", "name", "hint"),
    [
        ("schedules", "warmup_cosin", ". Near it: warmup_cosine."),
        ("schedules", "wsd", ". Near it: warmup_stable_decay."),
        ("schedules", "StepLR", ". It is ok.schedules.piecewise_constant."),
        ("init", "heh", ". Near it: he."),
        ("init", "kaiming_normal_", ". It is ok.init.he."),
        ("init", "kaiming_uniform", ". It is ok.init.he."),
        ("init", "normal_", ". It is torch.nn.init.normal_."),
        ("schedules", "xavier_uniform_", ". It is ok.init.xavier."),
        ("averaging", "Fuse", ". It is ok.callbacks.Fuse."),
        ("optimizers", "adamw_", ". Near it: AdamW, "),
        ("step", "quite_another_thing", ". `optkit list WORD` finds names by what they do."),
    ],
)
def test_a_wrong_name_of_a_folder_is_said_with_what_was_meant(folder, name, hint):
    with pytest.raises(AttributeError) as error:
        getattr(PUBLIC[folder], name)
    assert str(error.value).startswith(f"module 'lightning_optkit.{folder}' has no attribute '{name}'{hint}")
    with pytest.raises(ImportError) as not_imported:
        exec(f"from lightning_optkit.{folder} import {name}")
    assert str(not_imported.value).startswith(f"cannot import name '{name}' from 'lightning_optkit.{folder}'{hint}")


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_folder_says_so_and_has_its_files_and_no_private_names(folder):
    with pytest.raises(AttributeError, match=rf"^module 'lightning_optkit\.{folder}' has no attribute 'zzz'\. `optkit"):
        PUBLIC[folder].zzz  # noqa: B018
    with pytest.raises(AttributeError, match=r"has no attribute '_zzz'$"):
        PUBLIC[folder]._zzz  # noqa: B018
    file = min(path.stem for path in (PACKAGE / folder).glob("[a-z]*.py"))
    code = f"from lightning_optkit.{folder} import {file} as found; print(found)"
    assert file in python("-c", code, cwd=ROOT).stdout


def test_names_of_torch_and_lightning_lead_to_what_is_here():
    page = (ROOT / "docs" / "migration.md").read_text()
    for name, place in NAMES_ELSEWHERE.items():
        assert re.search(rf"\b(torch|callbacks)\b[\w.]*\.{name}\b", page), f"{name} is not in docs/migration.md"
        library, *parts = place.split(".")
        found = {"ok": ok, "torch": torch}[library]
        for part in parts:
            found = getattr(found, part)
        with pytest.raises(AttributeError, match=rf"It is {re.escape(place)}\.$"):
            getattr(ok, name)


def test_python_adds_no_hint_of_its_own_and_a_module_that_is_not_loaded_is_imported():
    code = "import lightning_optkit as ok\nfrom lightning_optkit import cli\nok.Fuze"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ended.stderr.endswith("has no attribute 'Fuze'. Near it: Fuse.\n")


@pytest.mark.parametrize("owner", [ok, ok.schedules], ids=["ok", "ok.schedules"])
@pytest.mark.parametrize("name", ["cosine.x", "a.b", ".", "../x", ""])
def test_what_can_be_no_name_is_not_there(owner, name):
    assert not hasattr(owner, name) and getattr(owner, name, 5) == 5


def test_asking_for_a_wrong_name_loads_nothing():
    code = (
        "import sys, lightning_optkit as ok\nassert not hasattr(ok, 'cosine') and not hasattr(ok, '_private')\n"
        "print([name for name in ('torch', 'lightning') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ended.stdout == "[]\n"


def test_every_public_name_of_torchs_initializers_leads_somewhere():
    names = [name for name, value in vars(torch.nn.init).items() if inspect.isfunction(value) and name[0] != "_"]
    assert len(names) > 20
    for name in {*names} - {*ok.init.__all__}:
        with pytest.raises(AttributeError, match=r"\. It is (ok|torch\.nn)\.\w+\.\w+\.$"):
            getattr(ok.init, name)
