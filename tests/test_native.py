# SPDX-License-Identifier: Apache-2.0
"""The compiled half: every instruction set gives torch's numbers, and without it plain PyTorch gives the same."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from lightning_optkit._native import extension, missing_reason
from lightning_optkit.optimizers import SGD, Adafactor, Adam
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
    torch_class = getattr(torch.optim, optimizer_class.__name__)
    optimizers = [optimizer_class([p], lr=0.1, average=EMA(0.5), clip=ClipNorm(1e3), statistics=True, **kwargs),
                  torch_class([oracle], lr=0.1, **kwargs)]
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


def test_importing_the_package_warns_of_nothing_and_needs_no_extension():
    done = run(ABSENT + "import lightning_optkit.optimizers, lightning_optkit.clipping, lightning_optkit.averaging")
    assert (done.returncode, done.stderr) == (0, "")


@needs_extension
def test_a_row_of_group_numbers_has_the_fields_of_the_compiled_row():
    assert list(GroupNumbers._fields) == extension.GROUP_FIELDS


@needs_extension
@pytest.mark.parametrize(
    ("optimizer_class", "kwargs", "hypers"),
    [
        (SGD, dict(momentum=0.9), ["momentum", "dampening", "nesterov"]),
        (Adam, dict(), ["beta1", "beta2", "eps"]),
        (Adam, dict(amsgrad=True), ["beta1", "beta2", "eps"]),
        (Adafactor, dict(eps=(1e-4, 1e-3)), ["beta2_decay", "eps1", "eps2", "d"]),
    ],
    ids=["sgd", "adam", "amsgrad", "adafactor"],
)
def test_a_compiled_rule_has_the_states_and_hyperparameters_of_its_python_rule(optimizer_class, kwargs, hypers):
    optimizer = optimizer_class([torch.ones(1, requires_grad=True)], **kwargs)
    group = optimizer.param_groups[0]
    if "betas" in group:
        group |= dict(beta1=group["betas"][0], beta2=group["betas"][1])
    if isinstance(group.get("eps"), tuple):
        group |= dict(eps1=group["eps"][0], eps2=group["eps"][1])
    rule = optimizer._rule(group)
    states, scalars, names = extension.rules()[rule.name]
    assert tuple(states) == rule.states
    assert scalars == [scalar.name for scalar in rule.scalars]
    assert names == hypers
    assert rule.hypers(group) == tuple(float(group[name]) for name in names)


@needs_extension
def test_every_compiled_rule_belongs_to_an_optimizer():
    assert set(extension.rules()) >= {"sgd", "adam", "adam_amsgrad"}
    with pytest.raises(ValueError, match=r"Plan\(rule='lion9'\): no such rule is compiled\."):
        extension.Plan("lion9", False, -1)


@needs_extension
def test_roundings_are_numbered_as_in_the_compiled_tables():
    assert ROUNDINGS == ("nearest", "stochastic", "kahan")


@needs_extension
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_the_binary_asks_torch_for_nothing_outside_its_stable_abi():
    done = subprocess.run(
        ["nm", "-DC", "--undefined-only", extension.__file__], capture_output=True, text=True, check=True
    )
    undefined = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in undefined)  # so nm did see what is asked of torch
    assert [name for name in undefined if "at::" in name or "c10::" in name or "torch::" in name] == []
