# SPDX-License-Identifier: Apache-2.0
"""Silent errors: each named with its exact cause within the steps that its rule needs, and cured by the remedy."""

import pytest

from tests.diagnostics.benchmark.silent_errors import ERRORS, Healthy, Regression, run

# Steps from where an error begins to where it is said; 3 for the others.
STEPS = {
    "no_gradient": 20,  # a branch may be left out by chance
    "symmetric_init": 5,
    "schedule_fault": 8,
    "not_optimized": 4,
}
BEGINS = {"unfrozen, not optimized": 32, "mask of everything": 20, "step forgotten": 29}  # the last needs an epoch


@pytest.fixture(scope="module")
def healthy():
    return {kind: run(kind(), "", check_every=1) for kind in (Healthy, Regression)}


def test_the_healthy_programs_have_no_verdict(healthy):
    assert all(not result.verdicts and result.score > 0.9 for result in healthy.values())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.name)
def test_an_error_is_named_and_its_remedy_cures_it(error, healthy):
    broken = run(error.module(), error.symptom, **error.trainer)
    first = broken.verdicts[0]
    assert first.symptom == error.symptom and error.cause in first.cause
    assert broken.said <= BEGINS.get(error.name, 0) + STEPS.get(error.symptom, 3)
    mended = run(error.cured(), error.symptom, **(error.cured_trainer or error.trainer))
    assert mended.mends(healthy[Regression if issubclass(error.module, Regression) else Healthy])
