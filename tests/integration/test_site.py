# SPDX-License-Identifier: Apache-2.0
"""The site: every page is in it, a Chinese page has all that the English one has, every public name has an entry."""

import ast
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import yaml

import lightning_optkit as ok

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
NAV = [page for section in CONFIG["nav"] for pages in section.values() for page in pages]
PAGES = [path for entry in NAV for path in entry.values()]
ASIDE = {"averaging": {"read_average"}}  # of a file that its folder does not export, but docs/strategies.md has
TRANSLATED = [page for page in PAGES if not page.startswith("api/")]


def chinese(page):
    return DOCS / page.replace(".md", ".zh.md")


def code(text):
    """(language, content) of each block; comments may be in another language."""
    for kind, block in re.findall(r"```(\w*)\n(.*?)```", text, flags=re.DOTALL):
        if kind == "python":
            yield kind, ast.dump(ast.parse(block))
        elif kind == "yaml":
            yield kind, yaml.safe_load(block)
        else:
            yield kind, [re.sub(r"(^| )# .*", "", line).rstrip() for line in block.splitlines()]


def outline(text):
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [len(marks) for marks in re.findall(r"^(#+) ", text, flags=re.M)], [
        len(table.splitlines()) for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M)
    ]


def numbers(text):
    """Those of each row of a table, and last those of all else; not in names such as bf16, nor in links."""
    text = re.sub(r"^```.*?^```|\]\([^)]*\)", "", text, flags=re.M | re.S)
    parts = [*re.findall(r"^\|.*", text, flags=re.M), re.sub(r"^\|.*", "", text, flags=re.M)]
    return [sorted(re.findall(r"(?<![A-Za-z\u2113\d^_.])\d+(?:[.,]\d+)*", part)) for part in parts]


def targets(text):
    return re.findall(r"\]\(([^)#\s]+)", text)


def test_every_page_is_in_the_navigation():
    there = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if not path.name.endswith(".zh.md")}
    assert there == {*PAGES} and len(PAGES) == len({*PAGES})
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.zh.md")} == {
        str(chinese(page).relative_to(DOCS)) for page in TRANSLATED
    }


def test_the_navigation_is_translated():
    titles = {title for section in CONFIG["nav"] for title in section} | {title for entry in NAV for title in entry}
    (languages,) = (each["i18n"]["languages"] for each in CONFIG["plugins"] if "i18n" in each)
    translated = next(each for each in languages if each["locale"] == "zh")["nav_translations"]
    assert titles - {*ok.__all__} == {*translated}


@pytest.mark.parametrize("page", TRANSLATED)
def test_a_chinese_page_has_the_headings_tables_links_and_code_of_the_english_one(page):
    ours, theirs = (DOCS / page).read_text(), chinese(page).read_text()
    assert outline(theirs) == outline(ours)
    assert [*code(theirs)] == [*code(ours)]
    assert sorted(target.replace(".zh.md", ".md") for target in targets(theirs)) == sorted(targets(ours))
    assert {target for target in targets(theirs) if target in TRANSLATED} == set(), "has a Chinese page"
    assert len(re.findall(r"[\u4e00-\u9fff]", theirs)) > 0.1 * len(ours.split())


@pytest.mark.parametrize("page", TRANSLATED)
def test_a_chinese_page_has_the_numbers_of_the_english_one(page):
    assert numbers(chinese(page).read_text()) == numbers((DOCS / page).read_text())


@pytest.mark.parametrize(("index", "readme"), [("index.md", "README.md"), ("index.zh.md", "README.zh-CN.md")])
def test_the_first_page_is_the_readme(index, readme):
    text = (ROOT / readme).read_text().replace("(docs/", "(")
    text = re.sub(r" ?\[(中文|English)\]\(README[^)]*\)", "", text)
    text = re.sub(r"(, |、)\[(contributing|贡献)\]\(CONTRIBUTING.md\)", "", text)
    assert re.sub(r".( how to add a strategy|如何添加策略)", "", text) == (DOCS / index).read_text()


def test_the_summary_has_the_numbers_of_its_page():
    pairs = r"\d+\.\d+ / \d+\.\d+"
    ours = re.findall(pairs, (DOCS / "summary.md").read_text())
    assert len(ours) == 9 and {*ours} <= {*re.findall(pairs, (DOCS / "performance.md").read_text())}
    assert re.findall(pairs, chinese("summary.md").read_text()) == ours


def test_every_public_name_has_an_entry_in_the_reference():
    for folder in (name for name in ok.__all__ if inspect.ismodule(getattr(ok, name))):
        found = vars(getattr(ok, folder))
        public = {name for name in found["__all__"] if inspect.isclass(found[name]) or inspect.isfunction(found[name])}
        entries = re.findall(r"^::: ([\w.]+)$", (DOCS / "api" / f"{folder}.md").read_text(), flags=re.M)
        assert sorted(entry.split(".")[-1] for entry in entries) == sorted(public | ASIDE.get(folder, set())), folder


def test_a_strategy_is_linked_to_its_entry():
    spec = importlib.util.spec_from_file_location("pages", DOCS / "site" / "pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    rows = re.findall(r"`(\w+/\w+)`", (DOCS / "strategies.md").read_text())
    linked = [re.sub(r"`(\w+)/(\w+)`", pages._link, f"`{row}`") for row in rows]
    assert len(rows) > 150 and [link for link in linked if not link.startswith("[`")] == []
    assert "[`optimizers/sgd`][lightning_optkit.optimizers.sgd.SGD]" in linked

    class Page:
        class file:
            src_uri = "index.zh.md"

    assert pages.on_page_markdown("中文\n字 a\nb\n```\n中\n文\n```\n", Page) == "中文字 a\nb\n```\n中\n文\n```\n"
