# SPDX-License-Identifier: Apache-2.0
"""`optkit list` knows every strategy, finds by words, and shows one in full."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

import lightning_optkit as ok
from lightning_optkit.cli import main
from lightning_optkit.cli.docstring_text import in_words, signature_text, wrapped
from lightning_optkit.cli.list_command import entries


def shown(capsys, *words):
    main(["list", *words])
    return capsys.readouterr().out


def test_every_strategy_is_there_with_a_sentence():
    found = entries()
    rows = re.findall(
        r"`((?:callbacks|optimizers|schedules|init|data|layers|clipping|averaging|regularization)/\w+)`",
        (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(),
    )
    assert len(found) > len(rows) - 30 > 100
    assert {entry.folder for entry in found} == {row.partition("/")[0] for row in rows}
    for entry in found:
        assert re.match(r"[A-Z`|0-9]", entry.summary), entry
    names = {entry.name for entry in found}
    assert {f"ok.{name}" for name in ok.callbacks.__all__} <= names
    assert {"ok.schedules.cosine", "ok.init.he", "ok.AdamW", "ok.regularization.sam"} <= names


@pytest.mark.parametrize("name", ["averages_of", "update_average_", "from_torch_", "full_precision_state_dict"])
def test_functions_beside_the_strategies_are_found(capsys, name):
    assert re.match(rf"ok\.(averaging|optimizers)\.{name}\(", shown(capsys, name))


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("average", lambda name: name in ("EMA", "SWA", "LAWA", "PowerEMA", "WeightAveraging")),
        ("sharpness", lambda name: re.search(r"(?<![A-Za-z])[a-zL]*(?:sam|SAM)(?![a-z])", name)),
        ("restarts", lambda name: name in ("schedules.sgdr", "SnapshotEnsemble")),
        ("weight decay", lambda name: name == "ParameterGroups"),
        ("early stopping", lambda name: name == "EarlyStoppingCriterion"),
    ],
)
def test_a_word_of_the_field_finds_all_of_its_kind(capsys, word, kind):
    wanted = {entry.name for entry in entries() if kind(entry.name.removeprefix("ok."))}
    found = shown(capsys, *word.split())
    assert wanted and {name for name in wanted if not re.search(rf"{re.escape(name)}\b", found)} == set()


def test_words_find_what_has_all_of_them(capsys):
    found = shown(capsys, "percentile", "NORM")
    assert "ok.AutoClip" in found and "ok.ZClip" not in found
    only = shown(capsys, "rises", "--of", "schedules")
    assert "ok.schedules.warmup_cosine" in only and "ok.schedules.constant" not in only and "Callbacks" not in only
    assert only.splitlines()[-1].endswith("One in full: optkit list NAME.")


def test_first_sentences_are_searched_first_and_whole_descriptions_on_demand(capsys):
    found, everything = shown(capsys, "clip"), shown(capsys, "clip", "--anywhere")
    assert "ok.ClipNorm" in found and "ok.GradientClipping" in found and "ok.RMSprop" not in found
    assert "ok.ClipNorm" in everything and "ok.RMSprop" in everything and "--anywhere" not in everything
    few, more = re.search(r"(\d+) found, (\d+) more with --anywhere\.", found).groups()
    assert f"{int(few) + int(more)} found." in everything
    assert "ok.AutoClip" in shown(capsys, "Non-finite norms do not enter")  # no first sentence has it


def test_one_name_is_shown_in_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = shown(capsys, "Fuse")
    assert found.startswith("ok.Fuse(\n    rounding: Literal[") and "rounding:" in found and "Raises:" in found
    assert "\n    statistics: bool = False,\n" in found and "state_dtype: " in found
    assert shown(capsys, "cosine").startswith("ok.schedules.cosine(\n    min_factor: float = 0.0,")


def test_paragraphs_are_as_wide_as_the_terminal_and_formulas_are_words(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, "GradientNoise").splitlines()
    assert "Adds noise of variance eta / (1 + t)^gamma to the gradients of optimizer step" in lines
    assert "    ValueError: for an argument out of range; when the fit starts, for a" in lines
    assert "        strategy other than a single device, DDP and FSDP2." in lines
    example = ">>> trainer = pl.Trainer(callbacks=[GradientNoise(eta=0.3)], logger=False, enable_checkpointing=False)"
    assert f"    {example}" in lines  # whole, to be copied
    assert "Adds lambda times an exponential average" in shown(capsys, "Grokfast")


@pytest.mark.parametrize("width", [40, 80, 118])
def test_wrapped_docstrings_have_the_same_words_and_no_stumps(width):
    for entry in entries():
        text, shown_text = in_words(entry.text), wrapped(entry.text, width)
        plain = text.partition("Example:")[0]
        if ".. math::" not in text:
            assert shown_text.split() == text.split(), entry.name
        assert ":math:" not in shown_text and ".. math::" not in shown_text, entry.name
        assert not re.search(r"\\[a-z]{3}", shown_text.partition("Example:")[0]), entry.name
        examples = [line for line in text.splitlines() if line.lstrip().startswith((">>>", "..."))]
        assert [line for line in shown_text.splitlines() if line in examples] == examples, entry.name
        too_long = [line for line in shown_text.partition("Example:")[0].splitlines() if len(line) > width]
        assert all(line in plain.splitlines() or len(line.split()) == 1 for line in too_long), too_long
        tables = [line for line in plain.splitlines() if line.lstrip().startswith(("|", "==="))]
        assert set(tables) <= set(shown_text.splitlines()), entry.name
        for first, second in pairwise(shown_text.partition("Example:")[0].splitlines()):
            is_paragraph = first[:1].isalpha() and second[:1].isalpha() and "   " not in first + second
            assert not is_paragraph or len(f"{first} {second.split()[0]}") > width, (entry.name, first)


@pytest.mark.parametrize(
    ("latex", "words"),
    [
        (r"\frac{1}{2} \alpha_0 (1 + \cos(t \pi / T))", "1 / 2 alpha_0 (1 + cos(t pi / T))"),
        (r"\frac{1 - 2\gamma}{1 - \gamma}\, g", "(1 - 2 gamma) / (1 - gamma) g"),
        (r"\mathrm{Var}(w) = 2 g^2 / (fan_{in} + fan_{out})", "Var(w) = 2 g^2 / (fan_in + fan_out)"),
        (r"w + \hat\epsilon", "w + hat_epsilon"),
        (r"L^{-1/(2m-2)}", "L^(-1/(2m-2))"),
        (r"1/\sqrt{2 \cdot num\_layers}", "1/sqrt(2 * num_layers)"),
        (r"l = 1, \dots, L", "l = 1, ..., L"),
    ],
)
def test_formulas_in_words(latex, words):
    assert in_words(f"a :math:`{latex}` b") == f"a {words} b"


def test_lists_and_entries_begin_lines_and_formulas_that_stand_alone_have_their_own():
    formula = ".. math:: a \\leftarrow b,\n    c"
    text = f"Two:\n\n- one\n  more\n- two\n\n{formula}\n\nArgs:\n    a: One\n        more.\n    b: Two."
    expected = "Two:\n\n- one more\n- two\n\n    a <- b, c\n\nArgs:\n    a: One more.\n    b: Two."
    assert wrapped(text, 80) == expected


def test_a_signature_fits_the_terminal():
    def short(a, *, b: int = 1) -> "float":
        """Nothing."""

    assert signature_text("short", short, 80) == "short(a, *, b: int = 1) -> float"
    assert signature_text("short", short, 30) == "short(\n    a,\n    *,\n    b: int = 1,\n) -> float"


@pytest.mark.parametrize(("word", "near"), [("xyzzy", ""), ("warmup_cosinus", " Near it: warmup_cosine.")])
def test_what_is_not_there_is_said_in_a_sentence(word, near):
    with pytest.raises(SystemExit) as exit_info:
        main(["list", word])
    sentence = f"optkit list {word}: nothing has these words; `optkit list` shows everything."
    assert exit_info.value.code == sentence + near


def test_a_table_of_long_names_has_its_descriptions_below_them(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    lines = shown(capsys, "--of", "regularization").splitlines()
    place = next(number for number, line in enumerate(lines) if line.strip() == "ok.regularization.wsam")
    assert lines[place + 1].startswith("    The gradient of the loss plus weighted sharpness, the rise")
    assert "   Converts torch optimizers" in shown(capsys, "--of", "callbacks")  # beside the name


def test_a_narrow_terminal_has_the_description_below_the_name(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    main(["list", "--of", "layers"])
    lines = capsys.readouterr().out.splitlines()
    place = lines.index(next(line for line in lines if line.strip() == "ok.WeightStandardizedConv2d"))
    assert lines[place + 1].startswith("    `torch.nn.Conv2d` whose") and max(map(len, lines)) <= 40
