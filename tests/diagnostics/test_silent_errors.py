# SPDX-License-Identifier: Apache-2.0
"""Silent errors: each named with its exact cause within the steps that its rule needs, and cured by the remedy."""

import pytest

from tests.diagnostics.benchmark.silent_errors import ERRORS, Healthy, Regression, run

# Batches from the one in which an error begins to that after which it is said; 2 for the others, so within one step.
BATCHES = {
    "detached": 20,  # a branch may be left out by chance
    "step forgotten": 33,  # gradients may be added over an epoch
    "optimizer_step without a step": 4,  # a step or two may be skipped on purpose
    "cleared before the step": 4,
    "scheduler stepped twice": 4,  # two counts make a ratio
    "weights put back": 3,  # once is a rollback
    "equal units": 5,  # behind a head of zeros, gradients arrive from the second step on
}
BEGINS = {"unfrozen, not optimized": 32, "mask of everything": 20}


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
    assert broken.said <= BEGINS.get(error.name, 0) + BATCHES.get(error.name, 2)
    mended = run(error.cured(), error.symptom, **(error.cured_trainer or error.trainer))
    assert mended.mends(healthy[Regression if issubclass(error.module, Regression) else Healthy])
