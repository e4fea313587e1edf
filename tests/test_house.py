# SPDX-License-Identifier: Apache-2.0
"""The house rules, as tests: who may import whom, and one strategy = one file + a test + one row."""

import ast
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from lightning_optkit import optimizers

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_optkit"
CSRC = ROOT / "csrc"

# From bottom to top. A folder imports only from lower floors, or from its own floor without cycles.
FLOORS = [
    {"_checks", "_names_elsewhere", "_native", "_near_names", "_terminal", "_torch_private"},
    {"step", "layers", "_norms"},
    {"optimizers", "clipping", "schedules", "init", "data", "regularization", "averaging", "diagnostics"},
    {"callbacks"},
    {"recipes"},
    {"cli", "__main__"},
]
FLOOR_OF = {folder: height for height, folders in enumerate(FLOORS) for folder in folders}
SEE_LIGHTNING = {"callbacks", "recipes", "cli"}
STRATEGY_FOLDERS = sorted(FLOORS[2] | {"layers", "callbacks"})
MAX_LINES = 400

# csrc folder -> the csrc folders it may include.
MAY_INCLUDE = {
    "core": {"core"},
    "rules": {"core", "rules"},
    "norms": {"core", "norms"},
    "cpu": {"core", "rules", "norms", "cpu"},
    "cuda": {"core", "rules", "norms", "cuda"},
    "bindings": {"core", "rules", "norms", "cpu", "cuda", "bindings"},
}
TORCH_HEADERS = re.compile(r"^(torch|ATen|c10|pybind11)/")

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
CSRC_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh", ".cpp", ".cu"})
STRATEGY_FILES = [
    path
    for path in PYTHON_FILES
    if path.parent.parent == PACKAGE and path.parent.name in STRATEGY_FOLDERS and not path.name.startswith("_")
]


def name(path):
    return str(path.relative_to(ROOT))


def folder_of(path):
    """The first name below the package: "step", "_native", or "" for its `__init__.py`."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(path):
    package = [*path.relative_to(ROOT).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            # `from lightning_optkit import step` imports a folder by the imported name.
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"lightning_optkit(\.\w+)+", str(node.value)):
            yield node.value  # importlib.import_module("lightning_optkit._C")


def imported_folders(path):
    for module in imported_modules(path):
        head, *rest = module.split(".")
        if head == "lightning_optkit" and rest:
            yield rest[0]


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), flags=re.MULTILINE)


def test_the_test_sees_the_files_it_judges():
    assert PACKAGE / "step" / "optimizer.py" in PYTHON_FILES
    assert PACKAGE / "optimizers" / "adamw.py" in STRATEGY_FILES
    assert CSRC / "core" / "pipeline.h" in CSRC_FILES
    assert "step" in imported_folders(PACKAGE / "optimizers" / "adamw.py")
    assert public_names(PACKAGE / "optimizers" / "adamw.py") == {"AdamW"}
    assert {"SGD", "parameter_groups"} <= names_in_tests("optimizers")
    assert "scale_norm" not in names_in_tests("optimizers")
    assert "_C" in imported_folders(PACKAGE / "_native.py")
    assert "core/math.h" in includes(CSRC / "rules" / "adam.h")


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name)
def test_only_callbacks_and_what_is_above_them_import_lightning(path):
    libraries = {module.split(".")[0] for module in imported_modules(path)}
    seen = libraries & {"lightning", "pytorch_lightning", "lightning_fabric"}
    assert not seen or folder_of(path) in SEE_LIGHTNING, f"{name(path)} imports {seen}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name)
def test_imports_point_downwards(path):
    folder = folder_of(path)
    for imported in imported_folders(path):
        if imported in ("_C", "_node"):
            assert folder == "_native", f"{name(path)} imports {imported}; only _native.py knows whether it exists"
        elif (folder, imported) == ("", "_near_names"):
            pass  # within __getattr__, once a name is wrong
        elif imported != folder:
            assert folder, f"lightning_optkit/__init__.py imports {imported}; it imports nothing"
            assert FLOOR_OF[imported] <= FLOOR_OF[folder], f"{name(path)} imports {imported}, which stands above it"


# In callbacks/: hooks into Lightning, then shared parts of the scheduling callbacks, then the strategies.
CALLBACK_FLOORS = {"seams": 0, "scheduling": 1}


def callback_floor(module):
    """The height of a module below `lightning_optkit.callbacks`."""
    return CALLBACK_FLOORS.get(module.removeprefix("lightning_optkit.callbacks.").split(".")[0], 2)


@pytest.mark.parametrize("path", sorted((PACKAGE / "callbacks").rglob("*.py")), ids=name)
def test_imports_among_the_callbacks_point_downwards(path):
    here = callback_floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imported_modules(path):
        if module.startswith("lightning_optkit.callbacks."):
            assert callback_floor(module) <= here, f"{name(path)} imports {module}, which stands above it"


def test_no_two_folders_import_each_other():
    graph = {}
    for path in PYTHON_FILES:
        graph.setdefault(folder_of(path), set()).update(set(imported_folders(path)) - {folder_of(path)})
    TopologicalSorter(graph).prepare()  # raises CycleError, naming the circle


def exported(path):
    """The names in a file's `__all__`."""
    (names,) = re.findall(r"^__all__ = (\[[^]]*\])", path.read_text(), flags=re.MULTILINE)
    return set(ast.literal_eval(names))


def public_names(path):
    """The functions and classes of a strategy's file that its folder exports."""
    defined = {
        node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    return defined & exported(path) & exported(path.parent / "__init__.py")


@functools.cache
def names_in_tests(folder):
    """What `tests/<folder>/test_*.py` import, look up in a module, or hold as a string: a table may be one of names."""
    found = set()
    for path in (ROOT / "tests" / folder).glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.alias):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found.add(node.attr)
            elif isinstance(node, ast.Constant):
                found.add(node.value)
    return found


@pytest.mark.parametrize("path", STRATEGY_FILES, ids=name)
def test_a_strategy_is_named_in_a_test(path):
    named = names_in_tests(path.parent.name)
    assert public_names(path) <= named, f"no test in tests/{path.parent.name} names {public_names(path) - named}"
    assert exported(path) & named, f"no test in tests/{path.parent.name} names anything of {name(path)}"


@pytest.mark.parametrize("path", STRATEGY_FILES, ids=name)
def test_a_strategy_has_a_row(path):
    row = re.compile(rf"^\|.*\b{path.parent.name}/{path.stem}\b", flags=re.MULTILINE)
    assert row.search((ROOT / "docs" / "strategies.md").read_text())


RULE_TABLES = ["tests/integration/matrix.py", "benchmarks/bench_rules.py", "docs/compared.md", "docs/migration.md"]


@pytest.mark.parametrize("path", RULE_TABLES)
def test_every_optimizer_is_in_the_tables(path):
    of_a_rule = {name for name, one in vars(optimizers).items() if isinstance(one, type) and hasattr(one, "_rule")}
    assert len(of_a_rule) > 25
    assert not of_a_rule - {*re.findall(r"\w+", (ROOT / path).read_text())}


def test_every_row_belongs_to_a_strategy():
    cells = re.findall(r"^\|.*", (ROOT / "docs" / "strategies.md").read_text(), flags=re.MULTILINE)
    rows = {row for cell in cells for row in re.findall(rf"\b(?:{'|'.join(STRATEGY_FOLDERS)})/\w+", cell)}
    assert rows <= {f"{path.parent.name}/{path.stem}" for path in STRATEGY_FILES}


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", [*PYTHON_FILES, *CSRC_FILES, ROOT / "setup.py"], ids=name)
def test_the_first_line_is_the_licence(path):
    comment = "//" if path in CSRC_FILES else "#"
    assert path.read_text().splitlines()[0] == f"{comment} SPDX-License-Identifier: Apache-2.0"


@pytest.mark.parametrize("path", CSRC_FILES, ids=name)
def test_csrc_includes_point_downwards_and_only_bindings_see_torch(path):
    folder = path.relative_to(CSRC).parts[0]
    for header in includes(path):
        if TORCH_HEADERS.match(header):
            assert folder == "bindings", f"{name(path)} includes {header}"
        head = header.split("/")[0]
        if head in MAY_INCLUDE and "/" in header:
            assert head in MAY_INCLUDE[folder], f"{name(path)} includes {header}"


def test_every_folder_has_its_rules():
    assert {path.relative_to(CSRC).parts[0] for path in CSRC_FILES} <= set(MAY_INCLUDE)
    assert {folder_of(path) for path in PYTHON_FILES} <= {*FLOOR_OF, ""}
