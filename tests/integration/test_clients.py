# SPDX-License-Identifier: Apache-2.0
"""Projects of other packages train with the README's stack, and with `Fuse` as without (examples/clients)."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "clients"
PAGE = (ROOT / "docs" / "clients.md").read_text()
OURS = ["around_the_module", "hugging_face", "lightning_demos", "loops"]  # what `make` installs is enough for these
OTHERS = sorted({path.stem for path in FOLDER.glob("[!_]*.py")} - {"run", *OURS})
APART = {  # by more than 1e-8 in double precision
    "peft: LoRA on Llama": 1e-6,  # its adapters, and the norms of Llama and T5, compute in fp32 all the same
    "transformers: Llama": 1e-6,
    "transformers: T5, accumulate_grad_batches": 1e-6,
}
SLOW = {
    "transformers: T5, accumulate_grad_batches",
    "lightning.pytorch.demos: LightningLSTM",
    "lightning.pytorch.demos: Net, MNISTDataModule, Adadelta and StepLR",
}
DIVERGES = {"lightning.pytorch.demos: LightningLSTM"}  # at a rate of 20, so it amplifies rounding without a bound
NOT_IN_DOUBLE = {"PyTorch Geometric: GCN, LightningNodeData"}  # its data stay in fp32, also without this package

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _folder_on_the_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def names_of(stem):
    """The clients of a file, without importing it: collecting tests must not need its package."""
    for node in ast.walk(ast.parse((FOLDER / f"{stem}.py").read_text())):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CLIENTS":
            yield from (ast.literal_eval(key) for key in node.value.keys)
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "CLIENTS":
            yield ast.literal_eval(node.slice)


def marks(name):
    return [pytest.mark.slow] if name in SLOW else []


@pytest.mark.parametrize(
    ("stem", "name"), [pytest.param(stem, name, marks=marks(name)) for stem in OURS for name in names_of(stem)]
)
def test_a_client_trains_with_the_stack_and_with_fuse_as_without(stem, name):
    if stem == "hugging_face":
        pytest.importorskip("transformers")
    _measured(stem, name)


@pytest.mark.parametrize("stem", OTHERS)
def test_the_clients_of_a_package_that_is_installed(stem):
    try:
        clients = importlib.import_module(stem).CLIENTS
    except ImportError as error:
        pytest.skip(str(error))
    for name in clients:
        _measured(stem, name)


def _measured(stem, name):
    client, clients = importlib.import_module("_client"), importlib.import_module(stem).CLIENTS
    if name not in clients:
        pytest.skip(f"what {name} needs is not installed")
    train = clients[name]
    result = client.measure(name, train, steps=10, variants=("plain64", "Fuse64", "README"))
    assert result.stopped.keys() == ({"plain64", "Fuse64"} if name in NOT_IN_DOUBLE else set())
    apart = result.early64 if name in DIVERGES else result.apart64
    assert name in NOT_IN_DOUBLE or apart <= APART.get(name, 1e-8)


def test_a_client_that_stops_is_seen():
    client = importlib.import_module("_client")

    def broken(variant, steps):
        if variant == "README":
            raise ValueError("no")
        return client.Run(losses=[1.0, 2.0 if variant == "plain64" else 2.5])

    result = client.measure("broken", broken, variants=("plain64", "Fuse64", "README"))
    assert result.stopped == {"README": "ValueError: no"} and result.apart64 == 0.25


def test_the_page_has_a_row_for_every_client():
    rows = {line.split("|")[1].strip() for line in PAGE.splitlines() if line.startswith("| ")}
    named = {name for stem in [*OURS, *OTHERS] for name in names_of(stem)}
    assert len(named) >= 24 and named | {"project"} == rows
    assert {line.split("|")[6].strip() for line in PAGE.splitlines() if line.startswith("| ")} == {"stops", "no"}
