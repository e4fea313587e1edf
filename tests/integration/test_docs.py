# SPDX-License-Identifier: Apache-2.0
"""The examples of README and docs/ run unchanged, and do what the page says."""

import ast
import itertools
import logging
import re
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_utilities.core import rank_zero
from torch import nn

import lightning_optkit as ok
from lightning_optkit.optimizers.convert import why_not_convertible

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "other_optimizers.md"


class AnyModule(BoringModel):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_front_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"any_lightning_module": AnyModule(), "model": nn.Linear(2, 2)}
    for example in examples(ROOT / page):
        exec(compile(example.replace("max_epochs=10", "max_epochs=1"), page, "exec"), names)
    assert [type(callback) for callback in names["trainer"].callbacks[:4]] == [
        ok.Fuse,
        ok.GradientClipping,
        ok.LRSchedule,
        ok.WeightAveraging,
    ]
    assert names["trainer"].global_step == 64
    assert type(names["optimizer"]) is ok.AdamW


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_what_a_page_takes_from_the_package_is_there(page):
    for path in re.findall(r"\bok((?:\.\w+)+)", (ROOT / "docs" / page).read_text()):
        found = ok
        for name in path[1:].split("."):
            found = getattr(found, name)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the code on the page leaves behind."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    in_trainer, in_loop = examples(PAGE)
    names = {"__name__": "page"}
    exec(compile(in_trainer, str(PAGE), "exec"), names)
    names["after_fit"] = {key: value.clone() for key, value in names["net"].state_dict().items()}
    exec(compile(in_loop, str(PAGE), "exec"), names)
    return names


def test_callbacks_work_around_the_optimizer_of_another_package(names, tmp_path):
    trainer, net = names["trainer"], names["net"]
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is names["Adafactor"]
    assert why_not_convertible(optimizer) == "no one-pass rule for transformers.optimization.Adafactor"
    for param in net.parameters():
        average = optimizer.state[param]["ema"]
        assert average.shape == param.shape and not torch.equal(average, param)
    assert trainer.callback_metrics["loss"] < 1.3  # 1.39 by chance: four classes
    logged = next(tmp_path.rglob("metrics.csv")).read_text()
    assert "grad_norm" in logged and "clip_fraction" in logged
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "grad" in page


def test_clip_and_average_work_in_a_loop_of_ones_own(names):
    assert names["norm"] > 0
    assert set(names["averaged"]) == set(names["net"].parameters())
    for param, average in names["averaged"].items():
        assert 0 < (average - param).abs().max() < 1
    assert any(not torch.equal(value, names["after_fit"][key]) for key, value in names["net"].state_dict().items())


# --- getting started ---


START = ROOT / "docs" / "getting_started.md"


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """What each block of "Getting started" prints, and what all of them leave behind."""
    names, printed = {"__name__": "page"}, []
    log = rank_zero.log  # that of the package imported last: "lightning", or "pytorch_lightning" once a test has
    level = log.level
    log.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: printed[-1].append(record.getMessage())
    log.addHandler(handler)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.chdir(tmp_path_factory.mktemp("started"))
        for example in examples(START):
            printed.append([])
            exec(compile(example, str(START), "exec"), names)
        names["saved"] = torch.load("averaged.pt")
    log.removeHandler(handler)
    log.setLevel(level)
    return names, ["\n".join(lines) for lines in printed]


def test_the_stack_says_what_the_page_shows(started):
    names, printed = started
    (shown,) = re.findall(r"```\n(LRSchedule: .*?)```", START.read_text(), flags=re.DOTALL)
    lines = [line for line in shown.splitlines() if "compiled" not in line]  # which differs between processors
    assert len(lines) == 15 and set(lines) <= {*printed[1].splitlines()}
    assert not torch.equal(names["model"].net[0].weight, names["plain"].net[0].weight)
    assert names["trainer"].max_epochs == 1 and type(names["model"].net[1]) is nn.LayerNorm


def test_what_you_have_already_stays_or_is_given_back(started):
    names, printed = started
    assert "LRSchedule: in place of StepLR, which configure_optimizers returns, until the fit ends." in printed[2]
    assert names["kept"].last_epoch == 0 and names["kept"].base_lrs == [1e-3]
    assert names["trainer"].global_step == 11 and "ClipNorm(max_norm=1.0)" in printed[3]
    assert "Fuse, optimizer 1 of 2, net.3: lightning_optkit.SGD" in printed[4]
    assert names["manual"].global_step == 88  # Lightning counts the steps of both optimizers


def test_a_short_run_with_the_stack_of_the_front_page_wants_a_higher_rate(started):
    names, _ = started
    short = {name: round(loss, 2) for name, loss in names["short"].items()}
    (printed,) = re.findall(r"^# (\{'plain': .*\})$", START.read_text(), flags=re.M)
    assert short == pytest.approx(ast.literal_eval(printed), abs=0.03)
    assert short["stack"] > short["plain"] > short["stack, lr times 2"] > short["stack, lr times 4"]
    front, page = names["front_page"](), examples(ROOT / "README.md")[0]
    assert all(f"ok.{type(each).__name__}(" in page for each in front) and len(front) == page.count("        ok.")


def test_losses_part_by_rounding_alone(started):
    names, _ = started
    single, double = names["apart"]["32-true"], names["apart"]["64-true"]
    assert 0 < single < 1e-4 and double < 1e-7 * single


def test_the_average_is_read_in_a_loop(started):
    names, _ = started
    assert set(names["averaged"]) == {name for name, _ in names["net"].named_parameters()}
    assert names["logits"].shape == (1797, 10)
    reloaded = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    reloaded.load_state_dict(names["saved"])
    torch.testing.assert_close(reloaded(names["images"].float() / 16), names["logits"])


@pytest.mark.filterwarnings("ignore")
def test_the_order_of_the_callbacks_does_not_matter(started, tmp_path):
    names, _ = started
    make = {
        "fuse": lambda: ok.Fuse(verbose=False),
        "clip": lambda: ok.GradientClipping(ok.AutoClip(10)),
        "rate": lambda: ok.LRSchedule(ok.schedules.warmup_cosine(0.05), verbose=False),
        "average": lambda: ok.WeightAveraging(ok.EMA(0.9)),
    }

    def weights(order):
        pl.seed_everything(1, verbose=False)
        module = names["Digits"]()
        callbacks = [make[each]() for each in order]
        trainer = pl.Trainer(max_steps=9, callbacks=callbacks, logger=False, default_root_dir=tmp_path)
        trainer.fit(module, names["train"])
        return module.state_dict()

    first, *others = (weights(order) for order in itertools.permutations(make))
    assert len(others) == 23
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_with_and_without_this_package_are_exchanged(started, tmp_path):
    names, _ = started

    def fit(epochs, callbacks, ckpt_path=None):
        trainer = pl.Trainer(max_epochs=epochs, callbacks=callbacks, logger=False, default_root_dir=tmp_path)
        trainer.fit(names["Digits"](), names["train"], ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        moments = [state["exp_avg"].norm() for state in trainer.optimizers[0].state.values()]
        return trainer.global_step, torch.stack(moments)

    rate = ok.LRSchedule(ok.schedules.cosine(), verbose=False)
    stack = [ok.Fuse(verbose=False), ok.GradientClipping(ok.AutoClip(10)), rate, ok.WeightAveraging(ok.EMA(0.9))]
    assert fit(1, [])[0] == 44
    assert fit(2, stack, tmp_path / "1.ckpt")[0] == 88
    steps, moments = fit(3, [], tmp_path / "2.ckpt")
    assert steps == 132 and (moments > 0).all()


def test_every_row_of_the_comparison_has_thirteen_peers_and_a_reason_where_we_lack_it():
    tables = [
        table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", (ROOT / "docs" / "compared.md").read_text(), re.M)
    ]
    assert len(tables) == 7
    for header, _, *rows in tables:
        assert [cell.strip() for cell in header.split("|")[2:4]] == ["lightning_optkit", "torch"]
        for row in rows:
            feature, ours, *peers, note = (cell.strip() for cell in row.strip("|").split("|"))
            assert feature and ours and len(peers) == 13 and set(peers) <= {"", "x", "(x)"}, row
            assert ours != "**no**" or (note and any(peers)), row
            assert "(x)" not in peers or note, row


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        if target.startswith("http"):
            continue
        there = page if not target else page.parent / target
        assert there.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)", there.read_text(), flags=re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_file_that_a_page_names_is_there(page):
    folders = "benchmarks|csrc|docs|examples|lightning_optkit|tests"
    for path in re.findall(rf"`((?:{folders})/[\w/.-]+\.\w+)", page.read_text()):
        assert (ROOT / path).exists() or path.startswith("benchmarks/results/"), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_rows_of_a_table_have_the_cells_of_its_head(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table.splitlines()[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_a_paragraph_begins_as_a_quotation_a_list_or_a_heading(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    assert not re.findall(r"^[^\s>#|+*-].*\n(?:>|\+ |#+ ).*", text, flags=re.M)
