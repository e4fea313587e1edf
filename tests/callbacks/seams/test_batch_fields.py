# SPDX-License-Identifier: Apache-2.0
"""Fields of batches: read and replaced, without changing the batch."""

import dataclasses
from collections import UserDict
from typing import NamedTuple

import pytest

from lightning_optkit.callbacks.seams.batch_fields import check_field, field_of, with_field


class Pair(NamedTuple):
    x: object
    y: object


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: object
    y: object


BATCHES = [
    ((1, 2), 0), ([1, 2], 0), ([1, 2], -2), ({"x": 1, "y": 2}, "x"), (UserDict(x=1, y=2), "x"), (Pair(1, 2), "x"),
    (Pair(1, 2), 0), (Frozen(1, 2), "x"), ({"in": [2, Pair(1, 2)]}, ["in", 1, "x"]),
]  # fmt: skip


@pytest.mark.parametrize(("batch", "field"), BATCHES, ids=repr)
def test_a_field_is_replaced_in_a_copy_of_the_same_kind(batch, field):
    path, before = check_field("Owner", "field", field), repr(batch)
    changed = with_field(batch, path, 7)
    assert field_of("Owner", "field", batch, path) == 1 and field_of("Owner", "field", changed, path) == 7
    assert type(changed) is type(batch) and repr(batch) == before and repr(changed) == before.replace("1", "7", 1)


def test_what_is_not_there():
    assert field_of("Owner", "field", {"a": None}, ("a", 0)) is None
    for batch, step in ((3, 0), ("text", 0), ({"a": 1}, "b"), (Pair(1, 2), "z"), ([1], 1)):
        with pytest.raises(ValueError, match=rf"Owner\(field={step!r}\): the batch must have this field; it is a "):
            field_of("Owner", "field", batch, (step,))
