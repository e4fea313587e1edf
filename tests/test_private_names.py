# SPDX-License-Identifier: Apache-2.0
"""Private names of torch, Lightning and torchmetrics are used in one file each, and exist in installed versions."""

import ast
import functools
import importlib
import pkgutil
import re
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

import lightning_optkit

PACKAGE = Path(lightning_optkit.__file__).parent
FILES = {
    "torch": PACKAGE / "_torch_private.py",
    "lightning": PACKAGE / "callbacks" / "seams" / "lightning_private.py",
    "torchmetrics": PACKAGE / "callbacks" / "seams" / "torchmetrics_private.py",
}
FOREIGN = {"torch", "functorch", "lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"} | {*FILES}
# Names of Lightning's loops and connectors that have no underscore, and stand in no documentation.
UNDOCUMENTED = {
    "is_resuming", "restarting", "restarted_mid_epoch", "restarted_on_epoch_end", "reset_restart_stage", "RestartStage",
    "increment_progress_to_evaluation_end", "should_update_logs", "epoch_progress", "batch_progress", "max_batches",
    "setup_data", "on_run_start", "combined_loader", "fetched",
}  # fmt: skip
# Names that a library looks up on foreign objects, and the module that does.
LOOKED_UP = {
    "_step_supports_amp_scaling": "torch.amp.grad_scaler",
    "_wrapped_by_lr_sched": "torch.optim.lr_scheduler",
    "_opt_called": "torch.optim.lr_scheduler",
    "_dynamo_marked_constant": "torch._dynamo.decorators",
    "_fsdp_wrapped_module": "torch.distributed.fsdp._common_utils",
    "_checkpoint_wrapped_module": "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "_forward_cache": "lightning.pytorch.trainer.connectors.logger_connector.result",
    "_orig_mod": "torch._dynamo.eval_frame",
    "_schema": "torch.utils._python_dispatch",
    "_is_mkldnn_bf16_supported": "torch.testing._internal.common_device_type",
    "_class_path": "lightning.pytorch.cli",
    "_instantiator": "lightning.pytorch.cli",
    "__pl_saved_kwargs": "lightning.fabric.utilities.data",
    "__pl_saved_args": "lightning.fabric.utilities.data",
    "__pl_saved_arg_names": "lightning.fabric.utilities.data",
}
# Attributes that this package sets on foreign objects.
HUNG_ON = {"_before_conversion", "_grouped_by", "_step_in_backward"}
NAMED_TUPLE = {"_fields", "_replace", "_asdict", "_make"}  # documented by Python

_PRIVATE = re.compile(r"_[A-Za-z]\w*(?<!__)|__[A-Za-z]\w*(?<!__)")  # not __dunder__


def is_private(name):
    return bool(_PRIVATE.fullmatch(name)) or name in UNDOCUMENTED


class Use(NamedTuple):
    name: str
    line: int
    chain: str | None  # from a module of a library on, "torch._C._functorch"; None: of some object, or in a string


class Package(NamedTuple):
    """The private names that this package defines."""

    of_class: dict[str, set[str]]
    bases: dict[str, set[str]]
    of_module: set[str]

    def has(self, cls, name):
        """Whether `cls`, or a class of the package above or below it, defines `name`."""
        above, below = self._walk(cls, self.bases), self._walk(cls, self._children())
        return any(name in self.of_class.get(each, ()) for each in above | below)

    def defines(self, name):
        return name in self.of_module or any(name in names for names in self.of_class.values())

    def _children(self):
        return {base: {cls for cls, bases in self.bases.items() if base in bases} for base in self.of_class}

    @staticmethod
    def _walk(cls, edges):
        seen, ahead = set(), {cls}
        while ahead:
            seen |= ahead
            ahead = {other for each in ahead for other in edges.get(each, ())} - seen
        return seen


def package_of(trees):
    of_class, bases, of_module = {}, {}, set()
    for tree in trees:
        of_module |= {name for statement in tree.body for name in bound_by(statement)}
        for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            names = of_class.setdefault(cls.name, set())
            names |= {name for statement in cls.body for name in bound_by(statement)}
            for node in ast.walk(cls):
                is_set = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
                if is_set and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    names.add(node.attr)
            bases.setdefault(cls.name, set()).update(ast.unparse(b).split("[")[0].split(".")[-1] for b in cls.bases)
    return Package(of_class, bases, of_module)


def bound_by(statement):
    """The names that a statement of a module's or a class's body binds."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}
    if isinstance(statement, ast.If | ast.Try):
        return {name for child in [*statement.body, *statement.orelse] for name in bound_by(child)}
    return set()


class Scanner(ast.NodeVisitor):
    """Finds the private names in a file that are not of the package.

    Of `self`, a name is the package's if its class, or one above or below it, defines it; of any other object, if some
    class or file defines it and no object of a library has it. A chain from an imported module of a library never is.
    """

    def __init__(self, package, theirs):
        self.package, self.theirs, self.uses = package, theirs, []
        self.classes, self.modules, self.ours = [], {}, set()

    def scan(self, tree):
        for node in ast.walk(tree):
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                self._note(node, alias)
        self.visit(tree)
        return self.uses

    def _note(self, node, alias):
        path = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
        if path.split(".")[0] == "lightning_optkit":
            self.ours.add(alias.asname or alias.name)
        if path.split(".")[0] not in FOREIGN:
            return
        bound = alias.asname or (alias.name if isinstance(node, ast.ImportFrom) else path.split(".")[0])
        self.modules[bound] = path if alias.asname or isinstance(node, ast.ImportFrom) else bound
        for part in path.split("."):
            if is_private(part) and (part == alias.name or part not in UNDOCUMENTED):
                self.uses.append(Use(part, node.lineno, path))

    def visit_ClassDef(self, node):
        self.classes.append(node.name)
        self.generic_visit(node)
        self.classes.pop()

    def visit_Attribute(self, node):
        self.generic_visit(node)
        chain = self._chain(node)
        if chain is None and is_private(node.attr) and not self._is_ours(node):
            self.uses.append(Use(node.attr, node.lineno, None))
        elif chain is not None and any(map(is_private, chain.split("."))):  # what a private module has is private too
            self.uses.append(Use(node.attr, node.lineno, chain))

    def _chain(self, node):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        known = isinstance(node, ast.Name) and node.id in self.modules
        return ".".join([self.modules[node.id], *parts]) if known else None

    def _is_ours(self, node):
        receiver = ast.unparse(node.value)
        if receiver in ("self", "cls", "super()", "type(self)") and self.classes:
            return self.package.has(self.classes[-1], node.attr)
        if receiver in self.package.of_class or (isinstance(node.value, ast.Name) and node.value.id in self.ours):
            return self.package.defines(node.attr)
        made_here = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in self.ours
        return node.attr in NAMED_TUPLE or self._is_known(node.attr) or (made_here and self.package.defines(node.attr))

    def _is_known(self, name):
        return name in HUNG_ON or (self.package.defines(name) and name not in self.theirs and name not in LOOKED_UP)

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):  # else a docstring
            self.generic_visit(node)

    def visit_JoinedStr(self, node):
        start = node.values[0]
        if isinstance(start, ast.Constant) and re.fullmatch(r"_[A-Za-z_]*", start.value):
            self.uses.append(Use(start.value, node.lineno, None))
        for value in node.values:
            if isinstance(value, ast.FormattedValue):  # other fragments of text are no names
                self.visit(value)

    def visit_Call(self, node):
        if isinstance(node.func, ast.Attribute) and node.func.attr in ("startswith", "endswith", "removeprefix"):
            self.visit(node.func)
        else:
            self.generic_visit(node)

    def visit_Constant(self, node):
        if not isinstance(node.value, str) or " " in node.value or node.value.startswith("lightning_optkit."):
            return
        chain = node.value if node.value.split(".")[0] in FOREIGN else None
        for name in re.findall(r"(?<!\w)\w+", node.value):
            known = name in NAMED_TUPLE or self._is_known(name) or name in UNDOCUMENTED - self.theirs
            if is_private(name) and not known:
                self.uses.append(Use(name, node.lineno, chain))


@functools.cache
def objects(library):
    """Objects of a library that this package touches; what `__init__` sets shows on no class."""
    if library == "torchmetrics":
        return [torchmetrics.MeanMetric()]
    loader = DataLoader([0])
    if library == "lightning":
        trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)
        loop = trainer.fit_loop
        return [
            trainer, loop, loop.epoch_loop, loop.epoch_loop.val_loop, trainer._logger_connector, loop._data_source,
            pl.LightningModule(), pl.Callback(), CombinedLoader(loader), ModelParallelStrategy(), _DataFetcher(),
            trainer._checkpoint_connector, trainer._signal_connector, pl.callbacks.ModelCheckpoint(),
        ]  # fmt: skip
    optimizer = torch.optim.SGD([torch.ones(1)])
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    modules = [nn.LSTM(1, 1), nn.MultiheadAttention(1, 1), nn.BatchNorm1d(1), nn.Conv2d(1, 1, 1)]
    schedulers = [scheduler, torch.optim.lr_scheduler.ChainedScheduler([scheduler], optimizer)]
    return [torch.ones(1), optimizer, optimizer.step, *modules, *schedulers, loader, iter(loader), DTensor]


@functools.cache
def names_of(library):
    return {name for each in objects(library) for name in dir(each) if is_private(name)}


@functools.cache
def all_their_names():
    return set.union(*(names_of(library) for library in FILES))


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


@functools.cache
def own_package():
    return package_of([parsed(path) for path in sorted(PACKAGE.rglob("*.py")) if path not in FILES.values()])


def foreign_in(tree, package):
    return Scanner(package, all_their_names()).scan(tree)


def test_every_private_name_of_a_library_stands_in_its_file():
    found = [
        f"{path.relative_to(PACKAGE)}:{use.line}: {use.chain or use.name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in FILES.values()
        for use in foreign_in(parsed(path), own_package())
    ]
    assert not found, "private names outside of " + ", ".join(p.name for p in FILES.values()) + ":\n" + "\n".join(found)


PLANTED = {
    "torch._C._functorch.peek_interpreter_stack()": {"_C", "_functorch", "peek_interpreter_stack"},
    "torch._foreach_mul_(grads, 2)": {"_foreach_mul_"},
    "from torch.nn.modules.batchnorm import _BatchNorm": {"_BatchNorm"},
    "from torch._dynamo import reset": {"_dynamo"},
    "import torch._inductor.config as config": {"_inductor"},
    "nn.modules.conv._ConvNd": {"_ConvNd"},
    "module._parameters.get('weight')": {"_parameters"},
    "x = optimizer.param_groups[0]._backward_hooks": {"_backward_hooks"},
    "Module._buffers": {"_buffers"},
    "trainer.fit_loop._data_source": {"_data_source"},
    "trainer.fit_loop.is_resuming": {"is_resuming"},
    "loop.restarting = False": {"restarting"},
    "getattr(scheduler, '_schedulers', ())": {"_schedulers"},
    "hasattr(step, '_wrapped_by_lr_sched')": {"_wrapped_by_lr_sched"},
    "optimizer._opt_called = True": {"_opt_called"},
    "vars(loader)['__pl_saved_args']": {"__pl_saved_args"},
    "sys.modules.get('torch._subclasses.fake_tensor')": {"_subclasses"},
    "override(loop, 'on_run_start', f)": {"on_run_start"},
    "f'{metric._defaults}'": {"_defaults"},
    "getattr(loader, f'__pl_saved_{kind}')": {"__pl_saved_"},
    "class A(Module):\n    def f(self):\n        return self._modules": {"_modules"},
    "class A(Own):\n    def f(self):\n        return self._held, self._unheard_of": {"_unheard_of"},
    # What the package has by itself:
    "class A:\n    def __init__(self):\n        self._buffers = []\n\n    def f(self): self._buffers": set(),
    "class A(Own):\n    def f(self, other):\n        return self._held + other._held + Own._held": set(),
    "Run(trainer).is_resuming": set(),
    "own._of_module": set(),
    "pair._replace(a=1)._fields": set(),
    "name.endswith('_bias')": set(),
    "'''module._parameters'''": set(),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_name_is_found(planted):
    prelude = "import sys\nimport torch\nfrom torch import nn\nfrom torch.nn import Module\n"
    prelude += "from lightning_optkit.callbacks.seams.run import Run\n_of_module = 1\n"
    prelude += "class Own:\n    _held = 1\n    _buffers = 2\n    def is_resuming(self): ...\n"
    tree = ast.parse(prelude + planted)
    assert {use.name for use in foreign_in(tree, package_of([tree]))} == PLANTED[planted]


def package_classes():
    for module in pkgutil.walk_packages(lightning_optkit.__path__, "lightning_optkit."):
        if not module.name.rsplit(".", 1)[-1].startswith(("_C", "_node", "__main__", "lib")):
            for cls in vars(importlib.import_module(module.name)).values():
                if isinstance(cls, type) and cls.__module__ == module.name:
                    yield cls


def test_what_a_class_overrides_is_listed():
    """A method, or what `self` sets: the library takes it for its own."""
    listed = importlib.import_module("lightning_optkit._torch_private").OVERRIDDEN
    found = set()
    for cls in package_classes():
        bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] in FOREIGN]
        alike = [each for library in FILES for each in objects(library) if isinstance(each, tuple(bases))]
        theirs = {name for each in [*bases, *alike] for name in vars(each) if is_private(name)}
        found |= own_package().of_class.get(cls.__name__, set()) & theirs
    assert found == set(listed)


def exists(use, library):
    if use.chain is None:
        return use.name in names_of(library) or is_looked_up(use.name)
    parts = use.chain.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return is_looked_up(use.name)
            found = getattr(found, part)
        return True
    return False


def is_looked_up(name):
    """Whether the text of the module that looks it up names it."""
    module = importlib.util.find_spec(LOOKED_UP[name]) if name in LOOKED_UP else None
    return module is not None and re.search(rf"\b{name}\b", Path(module.origin).read_text()) is not None


def private_names_in(library):
    """Of the file, which may not be importable if the library lacks one: so it is read."""
    tree = parsed(FILES[library])
    return foreign_in(tree, package_of([tree]))


@pytest.mark.parametrize("library", FILES)
def test_the_installed_version_has_them(library):
    version = importlib.import_module(library).__version__
    missing = sorted({use.chain or use.name for use in private_names_in(library) if not exists(use, library)})
    assert not missing, f"{library} {version} has no {', '.join(missing)}"


def test_the_files_are_read():
    assert {"_C", "_functorch", "_parameters", "_local_tensor", "_opt_called"} <= {
        use.name for use in private_names_in("torch")
    }
    assert {"_data_source", "__pl_saved_args", "is_resuming"} <= {use.name for use in private_names_in("lightning")}
    assert {use.name for use in private_names_in("torchmetrics")} == {"_defaults", "_update_count", "_computed"}
