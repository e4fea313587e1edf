# SPDX-License-Identifier: Apache-2.0
"""LockedDropout: one mask for all time steps."""

import pytest
import torch

from lightning_optkit.layers import LockedDropout


@pytest.mark.parametrize("batch_first", [False, True])
def test_all_time_steps_share_a_mask_and_samples_do_not(batch_first):
    torch.manual_seed(0)
    y = LockedDropout(0.3, batch_first)(torch.ones((200, 5, 50) if batch_first else (5, 200, 50)))
    y = y if batch_first else y.transpose(0, 1)
    assert torch.equal(y, y[:, :1].expand_as(y))
    masks = y[:, 0]
    assert not torch.equal(masks[0], masks[1])
    torch.testing.assert_close(masks, (masks > 0) / 0.7)
    assert float((masks > 0).float().mean()) == pytest.approx(0.7, abs=0.015)


def test_one_sequence_of_two_dimensions():
    y = LockedDropout(0.5, batch_first=True)(torch.ones(6, 40))
    assert torch.equal(y, y[:1].expand_as(y)) and 0 < int((y[0] == 0).sum()) < 40


def test_identity_in_eval_and_at_zero_and_nothing_left_at_one():
    x = torch.randn(3, 2, 4)
    assert LockedDropout(0.5).eval()(x) is x and LockedDropout(0.0)(x) is x
    assert not LockedDropout(1.0)(x).any()


def test_seeds_reproduce_and_bf16_rounds_once():
    x = torch.randn(3, 2, 40).bfloat16()
    torch.manual_seed(1)
    y = LockedDropout(0.3)(x)
    torch.manual_seed(1)
    assert torch.equal(LockedDropout(0.3)(x), y) and y.dtype == torch.bfloat16
    assert torch.equal(y, torch.where(y != 0, x.double() / 0.7, 0.0).bfloat16())


def test_gradcheck():
    def seeded(x):
        torch.manual_seed(0)
        return LockedDropout(0.4)(x)

    assert torch.autograd.gradcheck(seeded, torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True))


def test_compiles_without_a_graph_break():
    y = torch.compile(LockedDropout(0.5), fullgraph=True, backend="aot_eager")(torch.ones(4, 3, 50))
    assert torch.equal(y, y[:1].expand_as(y)) and set(y.unique().tolist()) == {0.0, 2.0}


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"LockedDropout\(p=2\): p must be in \[0, 1\]"):
        LockedDropout(2)
    with pytest.raises(ValueError, match=r"LockedDropout\(x.shape=\(4,\)\): x must be sequences"):
        LockedDropout()(torch.ones(4))
