# SPDX-License-Identifier: Apache-2.0
"""One pull of Lookahead."""

import pytest
import torch

from lightning_optkit.averaging import lookahead_


def test_both_weights_meet_at_the_share():
    weight, slow = torch.tensor([4.0, -1.0]), torch.tensor([0.0, 1.0])
    lookahead_([weight], [slow], 0.25)
    assert weight.tolist() == slow.tolist() == [1.0, 0.5]


def test_slow_weights_are_wider_than_narrow_weights():
    weight, slow = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0])
    for _ in range(100):
        weight += 2**-7  # the least that bf16 holds at 1
        lookahead_([weight], [slow], 0.25)
    assert 1.1 < slow.item() and abs(weight.float() - slow) < 2**-8


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^lookahead_\(alpha=0\.0\): alpha must be in \(0, 1\]\.$"):
        lookahead_([torch.ones(2)], [torch.ones(2)], 0.0)
    with pytest.raises(ValueError, match=r"^lookahead_\(slow=<1>\): there must be one of the shape of each of params"):
        lookahead_([torch.ones(2)], [torch.ones(3)])


def test_a_tensor_that_is_given_twice_is_refused():
    weight = torch.ones(2)
    said = r"^lookahead_\({}=<{}>\): number {} is given before; each tensor must be given once"
    for slow in (weight, weight.view(2)):
        with pytest.raises(ValueError, match=said.format("slow", 1, 0)):
            lookahead_([weight], [slow])
    with pytest.raises(ValueError, match=said.format("params", 2, 1)):
        lookahead_([weight, weight], [weight.clone(), weight.clone()])
    both = torch.tensor([4.0, 0.0])
    lookahead_([both[:1], torch.ones(0), torch.ones(0)], [both[1:], torch.ones(0), torch.ones(0)], 0.25)
    assert both.tolist() == [1.0, 1.0]
