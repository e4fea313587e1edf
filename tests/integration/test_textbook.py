# SPDX-License-Identifier: Apache-2.0
"""docs/textbook.md: its blocks run, its formulas are those of the code, its calls make what they name."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch

import lightning_optkit as ok

PAGE = (Path(__file__).parents[2] / "docs" / "textbook.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
FACTORS = [(row[1].strip("`"), row[2].strip("`")) for row in ROWS if row[-1].startswith("`ok.schedules.")]
CALLS = sorted(
    {code for row in ROWS for code in re.findall(r"`(ok\.[^`]*\))`", " ".join(row))} - {c for _, c in FACTORS}
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    names = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("page"))
        for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
            exec(compile(block, "docs/textbook.md", "exec"), names)
    return names


def test_the_blocks_run_and_the_rules_of_the_chapter_are_ours(names):
    assert names["trainer"].global_step == 58
    assert set(names["differences"]) == {"momentum", "adagrad", "rmsprop", "adadelta", "adam"}
    assert max(names["differences"].values()) < 1e-12
    assert type(names["model"][1]) is torch.nn.GroupNorm


def test_there_is_a_row_for_every_decay_of_the_chapter():
    assert len(FACTORS) == 9 and len(CALLS) > 30


@pytest.mark.parametrize(("formula", "call"), FACTORS)
def test_the_factor_is_that_of_the_schedule(formula, call):
    total, beta = 100, 0.03 if "exponential" not in call or "natural" in call else 0.97
    values = {"b": beta, "T": total, "exp": math.exp, "cos": math.cos, "pi": math.pi, "abs": abs}
    schedule = eval(call, {"ok": ok, "b": beta})
    for t in range(total):
        assert schedule(t, total) == pytest.approx(eval(formula, values | {"t": t}), abs=1e-12), t


@pytest.mark.parametrize("code", CALLS)
def test_a_call_makes_what_it_names(code):
    made = eval(compile(ast.parse(code, mode="eval"), code, "eval"), {"ok": ok})
    assert type(made).__module__.startswith("lightning_optkit.")


def test_every_section_of_the_chapter_is_there_and_every_claim_is_linked():
    for section in ("7.1", "7.2", "7.2.2", "7.2.3", "7.3", "7.4", "7.5", "7.6", "7.7"):
        assert re.search(rf"^##+ {re.escape(section)} ", PAGE, flags=re.M), section
    claims = (Path(__file__).parents[2] / "docs" / "claims.md").read_text()
    for title in re.findall(r"^## (.*)", claims, flags=re.M):
        assert "claims.md#" + re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") in PAGE, title
