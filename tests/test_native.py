# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: every instruction set gives torch's results, and so does plain PyTorch without it."""

import inspect
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import lightning_optkit.optimizers
from lightning_optkit._native import extension, missing_reason
from lightning_optkit.step import OnePassOptimizer
from lightning_optkit.step.average import AverageKind
from lightning_optkit.step.numbers import ROUNDINGS, GroupNumbers

needs_extension = pytest.mark.skipif(extension is None, reason=f"no compiled extension: {missing_reason}")

# Trains one parameter of each dtype by every rule, and prints the largest distance to torch in fp64 per dtype.
TRAIN = """
import json, warnings
import torch
from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import SGD, Adam, AdamW

def train(optimizer_class, dtype, **kwargs):
    torch.manual_seed(0)
    p = torch.randn(16411).to(dtype)
    oracle = p.double().clone().requires_grad_()
    p.requires_grad_()
    _torch_class = getattr(torch.optim, optimizer_class.__name__)
    optimizers = [optimizer_class([p], lr=0.1, average=EMA(0.5), clip=ClipNorm(1e3), statistics=True, **kwargs),
                  _torch_class([oracle], lr=0.1, **kwargs)]
    average = None
    for step in range(3):
        p.grad = torch.randn(16411).to(dtype)
        oracle.grad = p.grad.double().clone()
        for optimizer in optimizers:
            optimizer.step()
        oracle.data.copy_(oracle.detach().to(dtype))
        average = p.detach().double().clone() if step == 0 else 0.5 * average + 0.5 * p.detach().double()
    grad_norm = float(p.grad.double().norm())
    return [float((p.detach().double() - oracle.detach()).abs().max()),
            float((optimizers[0].state[p]["ema"] - average).abs().max()),
            abs(optimizers[0].grad_norm / grad_norm - 1)]

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    distances = {
        str(dtype): [max(column) for column in zip(*(
            train(optimizer_class, dtype, **kwargs)
            for optimizer_class, kwargs in [(SGD, dict(momentum=0.9, nesterov=True)), (Adam, dict(amsgrad=True)),
                                            (AdamW, dict(weight_decay=0.1))]))]
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    }
print(json.dumps(dict(isa=extension and extension.cpu_isa(), distances=distances,
                      warnings=[str(w.message) for w in caught])))
"""
ABSENT = """
import sys
sys.modules["lightning_optkit._C"] = None  # what importlib takes for "there is no such module"
"""
BROKEN = """
import importlib.abc, importlib.machinery, sys

class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "lightning_optkit._C" else None
    def create_module(self, spec):
        raise ImportError("undefined symbol: torch_was_here")
    def exec_module(self, module): ...

sys.meta_path.insert(0, Broken())
"""
# Largest distance of parameter and average after 3 steps on numbers below 5, and of the norm (relative).
TOLERANCE = {
    "torch.float64": (1e-13, 1e-13, 1e-12),
    "torch.float32": (2e-6, 1e-6, 1e-6),
    "torch.bfloat16": (2**-5, 1e-6, 1e-6),  # a tie that falls to the other side: one unit in the last place below 8
    "torch.float16": (2**-8, 1e-6, 1e-6),
}


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OMP_NUM_THREADS": "2", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def check_against_torch(distances):
    for dtype, found in distances.items():
        for distance, tolerance in zip(found, TOLERANCE[dtype], strict=True):
            assert distance <= tolerance, dtype


@needs_extension
@pytest.mark.parametrize("isa", extension.cpu_isas() if extension else [])
def test_every_instruction_set_gives_the_numbers_of_torch(isa):
    done = run(TRAIN, OPTKIT_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["isa"] == isa
    assert result["warnings"] == []
    check_against_torch(result["distances"])


@needs_extension
def test_the_baseline_is_always_there_and_the_best_is_chosen():
    assert extension.cpu_isas()[-1] == "baseline"
    assert os.environ.get("OPTKIT_CPU_ISA") or extension.cpu_isa() == extension.cpu_isas()[0]


@needs_extension
def test_an_unknown_instruction_set_is_refused_in_one_sentence():
    done = run("import lightning_optkit.optimizers", OPTKIT_CPU_ISA="sse9")
    assert done.returncode != 0
    choices = ", ".join(map(repr, extension.cpu_isas()))
    assert done.stderr.strip().splitlines()[-1] == (
        f"ValueError: environment(OPTKIT_CPU_ISA='sse9'): OPTKIT_CPU_ISA must be one of {choices}."
    )


@pytest.mark.parametrize(
    ("hook", "reason"),
    [(ABSENT, "it was not built"), (BROKEN, "it does not load: undefined symbol: torch_was_here")],
    ids=["absent", "broken"],
)
def test_without_the_extension_numbers_are_the_same_and_one_warning_says_so(hook, reason):
    done = run(hook + TRAIN)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["isa"] is None
    check_against_torch(result["distances"])
    (warning,) = result["warnings"]
    assert warning.startswith(f"lightning_optkit runs without its compiled extension: {reason}")
    assert "a step takes several times as long as torch's own: leave out Fuse." in warning


def test_importing_the_package_warns_of_nothing_and_needs_no_extension():
    done = run(ABSENT + "import lightning_optkit.optimizers, lightning_optkit.clipping, lightning_optkit.averaging")
    assert (done.returncode, done.stderr) == (0, "")


@needs_extension
def test_a_row_of_group_numbers_has_the_fields_of_the_compiled_row():
    assert list(GroupNumbers._fields) == extension.GROUP_FIELDS


def rules_of_the_optimizers():
    """(rule, a group of it) of every optimizer and variant, by the name of the rule."""
    found = {}
    for cls in vars(lightning_optkit.optimizers).values():
        if not (isinstance(cls, type) and issubclass(cls, OnePassOptimizer)):
            continue
        for variant in ({}, {"amsgrad": True}) if "amsgrad" in inspect.signature(cls).parameters else ({},):
            optimizer = cls([torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)], **variant)
            for group in optimizer.param_groups:
                rule = optimizer._rule(group)
                found.setdefault(rule.name, (rule, group))
    return found


RULES = rules_of_the_optimizers()
IN_PYTHON = {"came", "dadapt_adam", "muon", "soap"}  # factors, matrix products


@needs_extension
def test_every_compiled_rule_belongs_to_an_optimizer_and_every_rule_is_compiled_that_can_be():
    assert set(extension.rules()) == set(RULES) - IN_PYTHON
    with pytest.raises(ValueError, match=r"Plan\(rule='lion9'\): no such rule is compiled\."):
        extension.Plan("lion9", False, -1)


@needs_extension
@pytest.mark.parametrize("name", sorted(set(RULES) - IN_PYTHON))
def test_a_compiled_rule_has_the_states_scalars_and_hyperparameters_of_its_python_rule(name):
    rule, group = RULES[name]
    states, scalars, hyperparameters = extension.rules()[name]
    assert tuple(states) == rule.state_names
    assert scalars == [scalar.name for scalar in rule.scalars]
    assert hyperparameters == list(rule.hyperparameters(group))
    assert all(type(value) is float for value in rule.hyperparameters(group).values())


@needs_extension
@pytest.mark.parametrize(
    ("name", "entries", "read"),
    [
        ("sgd", {"momentum": 0.5, "dampening": 0.25}, {"momentum": 0.5, "dampening": 0.25, "nesterov": 0.0}),
        ("adam", {"betas": (0.5, 0.75), "eps": 2.0}, {"beta1": 0.5, "beta2": 0.75, "eps": 2.0}),
        ("adafactor", {"eps": (None, 0.5)}, {"beta2_decay": -0.8, "eps1": -1.0, "eps2": 0.5, "d": 1.0}),
    ],
)
def test_hyperparameters_are_those_of_the_group(name, entries, read):
    rule, group = RULES[name]
    assert rule.hyperparameters({**group, **entries}) == read


@needs_extension
def test_roundings_and_kinds_of_average_are_numbered_as_in_the_compiled_tables():
    assert extension.ROUNDINGS == list(ROUNDINGS)
    assert extension.AVERAGE_KINDS == [kind.name.lower() for kind in AverageKind]
    assert [*AverageKind] == [0, 1, 2]


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_binary_asks_torch_for_nothing_outside_its_stable_abi():
    done = subprocess.run(
        ["nm", "-DC", "--undefined-only", extension.__file__], capture_output=True, text=True, check=True
    )
    undefined = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in undefined)  # so nm did see what is asked of torch
    assert [name for name in undefined if "at::" in name or "c10::" in name or "torch::" in name] == []
