# SPDX-License-Identifier: Apache-2.0
"""max_logits and qk_clip_ against the equations of the report, head by head."""

import math

import pytest
import torch

from lightning_optkit.regularization import max_logits, qk_clip_


def by_hand(q, k, num_heads, num_key_heads, scale):
    """S_max of every head, by loops."""
    width, best = q.shape[-1] // num_heads, []
    for head in range(num_heads):
        shared = head * num_key_heads // num_heads
        own = q[..., head * width : (head + 1) * width].reshape(-1, q.shape[-2], width)
        keys = k[..., shared * width : (shared + 1) * width].reshape(-1, k.shape[-2], width)
        best.append(max(float((a @ b.T).max()) for a, b in zip(own, keys, strict=True)) * scale)
    return torch.tensor(best, dtype=torch.float64)


@pytest.mark.parametrize("at_once", [2**22, 1])
@pytest.mark.parametrize(("num_heads", "num_key_heads"), [(4, 4), (4, 2), (4, 1), (1, 1)])
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)], ids=str)
def test_largest_logit_of_every_head(batch, num_heads, num_key_heads, at_once, monkeypatch):
    monkeypatch.setattr("lightning_optkit.regularization.qk_clip._AT_ONCE", at_once)
    torch.manual_seed(0)
    q = torch.randn(*batch, 6, 3 * num_heads, dtype=torch.float64)
    k = torch.randn(*batch, 7, 3 * num_key_heads, dtype=torch.float64)
    for scale in (None, 0.3):
        expected = by_hand(q, k, num_heads, num_key_heads, 1 / math.sqrt(3) if scale is None else scale)
        torch.testing.assert_close(max_logits(q, k, num_heads, scale), expected, rtol=1e-14, atol=0)


def test_narrow_queries_are_multiplied_in_fp32_and_an_empty_batch_has_no_logit():
    q = torch.full((2, 8), 3.0, dtype=torch.bfloat16)
    assert max_logits(q, q, 2).dtype == torch.float32 and max_logits(q, q, 2).tolist() == [18.0, 18.0]
    assert max_logits(q[:0], q, 2).tolist() == [-math.inf] * 2
    assert max_logits(q.expand(2, 2, 8)[:0], q.expand(2, 2, 8)[:0], 2).tolist() == [-math.inf] * 2


def test_only_the_heads_above_the_threshold_shrink_to_it():
    torch.manual_seed(0)
    x = torch.randn(5, 6, 8, dtype=torch.float64)
    q, k = (torch.randn(12, 8, dtype=torch.float64) for _ in range(2))
    q_bias, k_bias = (torch.randn(12, dtype=torch.float64) for _ in range(2))
    q[:4] *= 10
    before = max_logits(x @ q.T + q_bias, x @ k.T + k_bias, 3)
    threshold = float(before.sort().values[1]) * 1.01
    kept = q.clone(), k.clone()
    qk_clip_([q, q_bias], [k, k_bias], before, threshold)
    after = max_logits(x @ q.T + q_bias, x @ k.T + k_bias, 3)
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-12, atol=0)
    [head] = (before > threshold).nonzero().flatten().tolist()
    rows = torch.arange(12) // 4 == head
    assert torch.equal(q[~rows], kept[0][~rows]) and torch.equal(k[~rows], kept[1][~rows])
    gamma = threshold / float(before[head])
    torch.testing.assert_close(k[rows], kept[1][rows] * gamma**0.5)


def test_logits_that_overflowed_do_not_erase_the_weights():
    q, k = torch.ones(4, 2), torch.ones(4, 2)
    qk_clip_([q], [k], torch.tensor([torch.inf, torch.nan]), threshold=100.0)
    assert torch.equal(q, torch.ones(4, 2)) and torch.equal(k, torch.ones(4, 2))


def test_shared_keys_stay_and_their_queries_take_the_whole_factor():
    q, k = torch.ones(8, 2), torch.ones(4, 2)
    qk_clip_([q], [k], torch.tensor([50.0, 400.0, 100.0, 200.0]), threshold=100.0)
    assert torch.equal(k, torch.ones(4, 2))
    assert q[::2, 0].tolist() == [1.0, 0.25, 1.0, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: max_logits(torch.ones(3, 4), torch.ones(3, 4), 3),
            r"max_logits\(num_heads=3\): the number of heads must divide the 4",
        ),
        (
            lambda: max_logits(torch.ones(3, 8), torch.ones(3, 6), 4),
            r"max_logits\(num_heads=4\): .* fit the 6 of a key",
        ),
        (
            lambda: max_logits(torch.ones(2, 3, 4), torch.ones(3, 4), 2),
            r"max_logits\(k.shape=\(3, 4\)\): k must have the b",
        ),
        (lambda: max_logits(torch.ones(3, 4), torch.ones(3, 4), 2, 0.0), r"max_logits\(scale=0.0\): scale must be in"),
        (lambda: qk_clip_([torch.ones(4, 4)], [torch.ones(4, 4)], torch.ones(2), 0.0), r"qk_clip_\(threshold=0.0\)"),
        (
            lambda: qk_clip_([torch.ones(4, 4)], [torch.ones(3, 4)], torch.ones(2)),
            r"qk_clip_\(logits.shape=\(2,\)\): the number of heads must",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
