# SPDX-License-Identifier: Apache-2.0
"""A small sample of the fuzzer, and a check that it covers every public name."""

import pytest

from lightning_optkit import diagnostics, step
from tests.fuzz.cases import FOLDERS, NOT_CALLED, REQUIRED, Case, constructors_and_functions, methods
from tests.fuzz.fuzz_arguments import fuzz, is_answer


def test_everything_public_has_a_case_or_a_reason_for_none(tmp_path):
    public = {f"{folder}.{name}" for folder, module in FOLDERS.items() for name in module.__all__}
    public |= {f"{m.__name__.rpartition('.')[2]}.{name}" for m in (diagnostics, step) for name in m.__all__}
    cases = {case.name for case in constructors_and_functions() + methods(tmp_path)}
    assert public - cases <= NOT_CALLED
    assert public >= NOT_CALLED and set(REQUIRED) <= public


def test_every_valid_call_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stateless = ("clipping.AutoClip.load_state_dict", "clipping.ZClip.load_state_dict")
    for case in constructors_and_functions() + methods(tmp_path):
        if case.name not in stateless:
            case.call(**case.arguments())


@pytest.mark.filterwarnings("ignore")
def test_a_sample_is_answered_by_owner_and_argument():
    result = fuzz(calls=1500, seed=7)
    assert result.others == []
    assert result.refused > 1000


@pytest.mark.parametrize(
    ("message", "is_one"),
    [
        ("Owner(rate=3): rate must be less.", True),
        ("Owner.method(rate=3): rate must be less.", True),
        ("Owner(other=3): other must be less.", False),
        ("Other(rate=3): rate must be less.", False),
        ("rate must be less", False),
        ("Owner(rate=3): rate must be\nless.", False),
        (f"Owner(rate={'3' * 600}): rate must be less.", False),
    ],
)
def test_what_counts_as_an_answer(message, is_one):
    assert is_answer(ValueError(message), ["Owner"], ["rate"]) == is_one
    assert not is_answer(KeyError(message), ["Owner"], ["rate"])


def test_arguments_are_those_of_the_signature():
    case = Case("folder.f", "f", lambda a, b=1, *more, c=2, **rest: None, left=frozenset("b"))
    assert case.names() == ["a", "c"]
