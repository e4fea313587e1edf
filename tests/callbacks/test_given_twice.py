# SPDX-License-Identifier: Apache-2.0
"""The same callback object twice in the list is refused, in the words for two objects where those are refused."""

import re

import pytest
import torch
from test_after_a_fit import EACH, OPTIMIZERS, ROWS, SMALL, Classifier, loader

pytestmark = pytest.mark.filterwarnings("ignore")
SEVERAL = {"Augment", "Augment of several", "ActivationRegularization", "StochasticDepth", "Report", "Preprocess"}


def message_of(make_trainer, name, callbacks):
    """What a fit with these callbacks says, or None."""
    module = Classifier(OPTIMIZERS.get(name, torch.optim.SGD))
    try:  # Lightning itself refuses two that would save their state under one key
        make_trainer(*callbacks, **SMALL).fit(module, loader(), loader())
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


@EACH
def test_the_same_object_twice_is_refused(make_trainer, name):
    make = ROWS[name]
    callback = make()
    same = message_of(make_trainer, name, [callback, callback])
    assert same is not None
    assert re.search(r"twice|more than one stateful|both|would|use one of the two|two schedules", same), same
    assert type(callback).__name__ in same


@pytest.mark.parametrize("name", sorted(SEVERAL))
def test_two_objects_may_stand_together(make_trainer, name):
    make = ROWS[name]
    message = message_of(make_trainer, name, [make(), make()])
    assert message is None or "more than one stateful" in message, message


@pytest.mark.parametrize(
    "name", ["SAM", "RDrop", "LabelSmoothing", "Fuse", "MaxNorm", "ElasticNet", "Initialize", "ParameterGroups"]
)
def test_in_the_same_words_as_two_objects(make_trainer, name):
    make = ROWS[name]
    callback = make()
    same = message_of(make_trainer, name, [callback, callback])
    assert same == message_of(make_trainer, name, [make(), make()]) and "given twice" in same
