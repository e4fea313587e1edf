# SPDX-License-Identifier: Apache-2.0
"""A small sample of the campaigns of `make fuzz` about the step: its model against torch, and its entries."""

import pytest

from tests.fuzz import fuzz_step_entries, model_of_step


@pytest.mark.filterwarnings("ignore")
def test_a_run_in_which_everything_moves_follows_torch():
    model_of_step.run(sequences=12, operations=20)


@pytest.mark.filterwarnings("ignore")
def test_edited_state_dicts_and_calls_of_the_plan_are_done_right_or_refused():
    counts = fuzz_step_entries.fuzz(calls=2000, seconds=60, seed=0)
    assert not any(counts.get(name) for name in fuzz_step_entries.FAILURES)
    assert counts["accepted"] > 200
    assert counts["refused"] > 200


@pytest.mark.filterwarnings("ignore")
def test_the_model_notices_a_step_that_goes_wrong(monkeypatch):
    monkeypatch.setattr(model_of_step, "LAYOUTS", {"as it is": lambda g: g, "of another value": lambda g: g + 0.1})
    with pytest.raises(AssertionError, match="not close"):
        model_of_step.run(sequences=20, operations=20)
