# SPDX-License-Identifier: Apache-2.0
"""Whether two states are the same, whatever they hold."""

import pytest
import torch

from lightning_optkit.callbacks._same_state import is_same_state

MANY = torch.arange(3)


@pytest.mark.parametrize("other", [None, 1, [0, 1, 2], {"a": 1}, MANY.float() + 1, torch.arange(4)], ids=repr)
def test_a_tensor_is_the_same_as_an_equal_one_alone(other):
    assert not is_same_state(MANY, other) and not is_same_state(other, MANY)
    assert not is_same_state({"a": MANY}, {"a": other})
    assert is_same_state({"a": [MANY]}, {"a": [MANY.clone()]})
