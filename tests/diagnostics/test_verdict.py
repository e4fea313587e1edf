# SPDX-License-Identifier: Apache-2.0
"""A verdict is checked, reads as a sentence, and comes back from JSON."""

import json

import pytest

from lightning_optkit.diagnostics import Verdict
from lightning_optkit.diagnostics.rules import COURSE, EXACT, LAST_RESORTS, OF_LEARNING
from lightning_optkit.diagnostics.verdict import SYMPTOMS

GIVEN = dict(
    symptom="nonfinite", layer="net.2", cause="it divides by 0", evidence="3% are NaN", remedy="x.clamp_min(1e-6)",
    onset_step=7, confidence=1.0,
)  # fmt: skip


def test_it_reads_as_a_sentence():
    text = str(Verdict(**GIVEN))
    assert text == "nonfinite in net.2 since step 7: it divides by 0. Seen: 3% are NaN. Try: x.clamp_min(1e-6)"
    assert str(Verdict(**{**GIVEN, "layer": None})).startswith("nonfinite since step 7:")


def test_it_comes_back_from_json():
    verdict = Verdict(**GIVEN)
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("symptom", "flu", ValueError),
        ("layer", "", ValueError),
        ("cause", "", ValueError),
        ("evidence", 3, TypeError),
        ("remedy", None, TypeError),
        ("onset_step", -1, ValueError),
        ("confidence", 0.0, ValueError),
        ("confidence", 1.5, ValueError),
    ],
)
def test_what_is_no_verdict_is_refused(name, value, error):
    with pytest.raises(error, match=rf"^Verdict\({name}="):
        Verdict(**{**GIVEN, name: value})


def test_what_is_saved_is_checked():
    saved = Verdict(**GIVEN).to_dict()
    with pytest.raises(TypeError, match="onset_step"):
        Verdict.from_dict({**saved, "onset_step": "7"})
    del saved["cause"]
    with pytest.raises(ValueError, match="cause"):
        Verdict.from_dict(saved)


def test_every_symptom_has_a_rule_of_its_name():
    rules = {rule.__name__ for rule in (*EXACT, *OF_LEARNING, *COURSE, *LAST_RESORTS)}
    assert rules - {"shuffled_or_weak"} == {*SYMPTOMS}  # that one says `label_shuffle`, with less confidence
