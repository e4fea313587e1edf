# SPDX-License-Identifier: Apache-2.0
"""Every code block of README and docs/ is run by some test, and every command that a page names is there."""

import re
import shlex

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_optkit as ok
from lightning_optkit.cli.main import COMMANDS, TRAINER_COMMANDS
from tests.integration.test_docs import PAGES, ROOT, examples

DOCS = ROOT / "docs"
# Pages with Python -> the test that runs it. Those of this file are short enough to need none of their own.
RUN_BY = {
    "README.md": "integration/test_docs.py",
    "README.zh-CN.md": "integration/test_docs.py",
    "configuration.md": "integration/test_configuration_page.py",
    "diagnosis.md": "integration/test_code_blocks.py",
    "distributed.md": "integration/test_distributed_page.py",
    "finders.md": "integration/test_finders_page.py",
    "getting_started.md": "integration/test_docs.py",
    "narrow_state.md": "integration/test_code_blocks.py",
    "other_optimizers.md": "integration/test_docs.py",
    "scaling.md": "integration/test_code_blocks.py",
    "strategies.md": "integration/test_code_blocks.py",
    "textbook.md": "integration/test_textbook.py",
}
TARGETS = re.findall(r"^([\w-]+)(?: [\w-]+)*:", (ROOT / "Makefile").read_text(), flags=re.M)
SHELL = {page: re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), flags=re.DOTALL) for page in PAGES}


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self):
        inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        inputs[::5, 0] = torch.nan
        return DataLoader(TensorDataset(inputs, torch.arange(32) % 3), batch_size=8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet(**arguments):
    silent = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return pl.Trainer(**arguments, **silent, max_steps=8, accelerator="cpu")


def run(page, **names):
    for example in examples(DOCS / page):
        exec(compile(example, page, "exec"), names)
    return names


def test_every_page_with_python_has_a_test_that_runs_it():
    compared = {"index.md", *(page.name for page in PAGES if page.name.endswith(".zh.md"))}  # by test_site.py
    assert {page.name for page in PAGES if examples(page)} - compared == set(RUN_BY)
    for page, test in RUN_BY.items():
        assert page.removesuffix(".md") in (ROOT / "tests" / test).read_text(), f"{test} does not name {page}"


@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_strategies_and_diagnosis_train(capsys):
    class L:
        Trainer = staticmethod(quiet)

    trainer = run("strategies.md", L=L, ok=ok)["trainer"]
    module = Classifier()
    trainer.fit(module)
    preprocess = trainer.callbacks[0]
    assert trainer.global_step == 8 and type(preprocess) is ok.Preprocess
    assert preprocess.transform(torch.full((1, 4), torch.nan)).isfinite().all()

    clean = TensorDataset(torch.randn(32, 4), torch.arange(32) % 3)
    module.train_dataloader = lambda: DataLoader(clean, batch_size=8)
    health = run("diagnosis.md", L=L, ok=ok, module=module)["health"]
    assert capsys.readouterr().out.strip() == "\n".join(map(str, health.verdicts))
    assert health.to_json().startswith(("[", "{"))


def test_the_block_of_narrow_state_restores_the_weights_exactly():
    names = run("narrow_state.md")
    again = ok.optimizers.convert.full_precision_state_dict(names["optimizer"], names["model"])
    assert again.keys() == names["weights"].keys()
    assert all(
        torch.equal(again[key], value) and value.dtype == torch.float32 for key, value in names["weights"].items()
    )


def test_the_block_of_scaling_names_a_trainer_that_resumes():
    """It wants 32 devices: what it is given, and what it calls, is checked instead."""
    given, fitted = {}, {}

    class pl:
        class Trainer:
            def __init__(self, **arguments):
                given.update(arguments)

            def fit(self, module, ckpt_path):
                fitted["ckpt_path"] = ckpt_path

    known = {"ModelParallelStrategy": ModelParallelStrategy, "ModelCheckpoint": ModelCheckpoint}
    run("scaling.md", pl=pl, ExactResume=ok.ExactResume, module=Classifier(), **known)
    resume, saves = given["callbacks"]
    assert type(given["strategy"]) is ModelParallelStrategy and type(resume) is ok.ExactResume
    assert saves.save_last and fitted["ckpt_path"] == "last"


def test_what_the_pages_use_is_in_the_folder_that_optkit_list_knows():
    """Nothing is used by the path of a file but `doctor`, which needs Lightning and so stands beside its command."""
    used = {
        (page.name, found)
        for page in PAGES
        for example in examples(page)
        for found in re.findall(r"lightning_optkit\.(\w+\.\w+)|\bok\.(\w+\.\w+)\.", example)
    }
    assert {next(filter(None, paths)) for _, paths in used} == {"cli.doctor"}


# --- commands ---


def commands():
    """(page, words) of each line of the shell blocks and of each `command` in the text."""
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        inline = re.findall(r"`((?:make|python|optkit) [^`]*)`", text)
        blocks = "\n".join(SHELL[page]).replace("\\\n", " ").splitlines()
        for line in [*inline, *blocks]:
            for part in re.split(r"&&|; (?=do)| do ", line.partition(" #")[0]):
                if part.strip().startswith(("make ", "python ", "optkit ")):
                    yield page.name, tuple(shlex.split(part))


COMMANDS_NAMED = sorted(set(commands()))


def test_the_commands_of_the_pages_are_found():
    assert len(COMMANDS_NAMED) > 40
    assert ("README.md", ("make", "demo")) in COMMANDS_NAMED
    assert ("performance.md", ("make", "gpu-check")) in COMMANDS_NAMED


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS_NAMED, ids=lambda part: part if isinstance(part, str) else " ".join(part)
)
def test_a_command_that_a_page_names_is_there(page, words):
    program, *rest = words
    options = [word for word in rest if word.startswith("--")]
    if program == "make":
        assert {word for word in rest if "=" not in word} <= {*TARGETS}
        variables = {word.partition("=")[0] for word in rest if "=" in word}
        assert all(re.search(rf"^{name} \?= ", (ROOT / "Makefile").read_text(), flags=re.M) for name in variables)
    elif program == "optkit":
        assert rest[0] in {*COMMANDS, *TRAINER_COMMANDS, "--help", "--version"}
    elif rest[0] not in ("-m", "train.py"):  # the page's own program, which its test runs
        source = (ROOT / rest[0]).read_text()
        assert all(f'"{option}"' in source for option in options), f"{rest[0]} has no {options}"
