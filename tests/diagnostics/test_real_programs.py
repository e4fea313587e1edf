# SPDX-License-Identifier: Apache-2.0
"""Five of the programs after DeepFD's list, and their repaired twins; the others: `benchmark/real_programs.py`."""

import pytest

from tests.diagnostics.benchmark.real_programs import NAMES, PROGRAMS, verdicts_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("number", [4, 5, 14, 41, 42])
def test_a_program_is_diagnosed_and_its_twin_is_not(number):
    (program,) = [each for each in PROGRAMS if each.number == number]
    assert verdicts_of(program, program.settings)[0].symptom in program.accepted
    assert verdicts_of(program, {**program.settings, **program.repair}) == []


def test_the_list_is_the_52_without_the_doubtful_ones():
    assert {each.number for each in PROGRAMS} == {*range(1, 53)} - {7, 18, 19, 23, 24, 30, 35, 36}
    assert all(label in NAMES for each in PROGRAMS for label in each.labels.split())
