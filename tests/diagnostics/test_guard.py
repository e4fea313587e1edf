# SPDX-License-Identifier: Apache-2.0
"""Errors of what only watches are said once, in one sentence that says what failed, where, and what to do."""

import warnings

import pytest

from lightning_optkit.diagnostics import _guard
from lightning_optkit.diagnostics._guard import Guard, unguarded
from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules import diagnose

ADVICE = "leave Watch out of the callbacks"


@pytest.fixture(autouse=True)
def as_for_a_user(errors_are_warnings):
    pass


def fails(run):
    raise LookupError("of ours")


def failing(guard, part="the rule of three", error=ZeroDivisionError):
    with guard(part):
        raise error


def test_an_error_is_said_once_with_its_place_and_the_next_step():
    guard = Guard("Watch", ADVICE)
    with pytest.warns(UserWarning) as caught:
        with guard("the rule of three"):
            _guard.shown(*[])  # an error within the package
        failing(guard)
        failing(guard, "the rule of four", LookupError)
    first, second = (str(each.message) for each in caught)
    assert first.startswith("Watch: the rule of three failed and is left out, the rest goes on (TypeError: ")
    assert first.endswith(f"please report this error of lightning_optkit, or {ADVICE}.")
    assert second.startswith("Watch: the rule of four failed and is left out, the rest goes on (LookupError); ")


def test_the_place_is_the_innermost_of_the_package():
    guard = Guard("Watch", ADVICE)
    with pytest.warns(UserWarning, match=r"TypeError: .*, diagnostics/rules/outcome\.py:\d+\)"), guard("all"):
        diagnose(None)
    assert list(guard.failed) == ["all"]


def test_what_ends_a_program_is_let_through():
    for error in (KeyboardInterrupt, SystemExit):
        with pytest.raises(error):
            failing(Guard("Watch", ADVICE), error=error)


def test_where_warnings_are_errors_it_ends_the_run():
    with pytest.raises(UserWarning, match="rule of three") as raised:
        failing(Guard("Watch", ADVICE))
    assert isinstance(raised.value.__context__, ZeroDivisionError)


def test_a_silent_one_tells_later_and_a_muted_one_never():
    guard = Guard("Watch", ADVICE, is_silent=True)
    failing(guard)
    guard.mute()
    failing(guard, "another")
    with pytest.warns(UserWarning) as caught:
        guard.tell()
    assert len(caught) == 1 and "rule of three" in str(caught[0].message)
    guard.begin()
    assert guard.failed == {} and not guard.is_muted


def test_without_a_guard_errors_stay():
    with pytest.raises(ZeroDivisionError):
        failing(unguarded)


@pytest.mark.parametrize("group", ["EXACT", "OF_LEARNING", "COURSE", "LAST_RESORTS"])
def test_a_rule_that_fails_does_not_keep_others_from_speaking(monkeypatch, group):
    from tests.diagnostics.rules.learning_cases import PROBE, seen

    rules = "lightning_optkit.diagnostics.rules"
    run = seen(probe=PROBE)
    named = diagnose(run)
    assert [verdict.symptom for verdict in named] == ["input_ignored"]
    monkeypatch.setattr(f"{rules}.{group}", (fails, *getattr(__import__(rules, fromlist=[group]), group)))
    with pytest.raises(LookupError):
        diagnose(run)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        guard = Guard("Watch", ADVICE)
        assert diagnose(run, guard) == diagnose(run, guard) == named
    assert [str(each.message)[:31] for each in caught] == ["Watch: the rule fails failed an"]


def test_without_an_outcome_exact_rules_speak(monkeypatch):
    monkeypatch.setattr("lightning_optkit.diagnostics.rules.judged", fails)
    with pytest.warns(UserWarning, match="the judgement of how much was learned failed"):
        verdicts = diagnose(RunSeen(not_zeroed={"SGD": 3}), Guard("Watch", ADVICE))
    assert [verdict.symptom for verdict in verdicts] == ["gradient_not_zeroed"]
