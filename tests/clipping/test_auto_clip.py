# SPDX-License-Identifier: Apache-2.0
"""AutoClip in the step, and called, against the paper's Algorithm 1 in numpy."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch

from lightning_optkit.clipping import AutoClip
from lightning_optkit.optimizers import SGD

SIZES = (1.0, 5.0, 0.1, 3.0, 100.0, 0.5, 2.0)


def test_the_bound_is_the_percentile_of_the_history():
    clip, history = AutoClip(percentile=30), []
    for norm in SIZES:
        history.append(norm)
        assert float(clip.norm_bound(torch.tensor(norm, dtype=torch.float64))) == pytest.approx(
            np.percentile(history, 30), rel=1e-12
        )


def test_only_the_latest_norms_count():
    clip = AutoClip(percentile=100, window=3)
    bounds = [float(clip.norm_bound(torch.tensor(float(norm)))) for norm in (9, 1, 2, 3, 1, 1, 1)]
    assert bounds == [9, 9, 9, 3, 3, 3, 1]


def test_folded_it_is_the_function_and_torchs_step(folded_and_called):
    ours, optimizer, theirs, _ = folded_and_called(AutoClip(percentile=50), SIZES)
    torch.testing.assert_close([p.double() for p in ours], theirs, rtol=1e-12, atol=1e-12)
    assert optimizer.num_clipped >= 3


def test_a_skipped_step_leaves_the_history(fused):
    p = torch.ones(2, requires_grad=True)
    optimizer = SGD([p], lr=1.0, clip=AutoClip(50), fused=fused)
    for size in (1.0, math.nan, math.inf, 3.0):
        p.grad = torch.tensor([size, 0.0])
        optimizer.step()
    assert optimizer.num_skipped == 2
    assert optimizer.clip.state_dict()["seen"] == 2
    assert optimizer.grad_norm_clipped == pytest.approx(2.0, rel=1e-6)
    before = copy.deepcopy(optimizer.clip.state_dict())
    optimizer.clip.norm_bound(torch.tensor(math.nan))
    assert str(optimizer.clip.state_dict()) == str(before)


def test_a_resumed_run_clips_as_the_one_that_went_on(fused):
    def fresh():
        p = torch.zeros(3, requires_grad=True)
        return p, SGD([p], lr=0.1, momentum=0.9, clip=AutoClip(25, window=4), fused=fused)

    def steps(p, optimizer, sizes):
        for size in sizes:
            p.grad = size * torch.ones(3)
            optimizer.step()

    p, optimizer = fresh()
    steps(p, optimizer, SIZES[:4])
    saved, value = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    steps(p, optimizer, SIZES[4:])
    q, resumed = fresh()
    q.data.copy_(value)
    resumed.load_state_dict(saved)
    steps(q, resumed, SIZES[4:])
    assert torch.equal(p, q)
    torch.optim.SGD([q], lr=0.1, momentum=0.9).load_state_dict(saved)  # torch's own class takes it too


@pytest.mark.parametrize("before", [1, 3, 5, 9])
@pytest.mark.parametrize("seen", [0, 2, 5, 7])
def test_a_history_of_another_window_goes_on_with_its_latest_norms(before, seen):
    """As if these had been all so far: the bounds that follow are those of the latest norms that both have room for."""
    norms = [float(number * 7 % 11 + 1) for number in range(seen + 8)]
    saved, clip = AutoClip(40, window=before), AutoClip(40, window=5)
    for norm in norms[:seen]:
        saved.norm_bound(torch.tensor(norm))
    clip.load_state_dict(saved.state_dict())
    known = norms[max(0, seen - min(before, 5)) : seen]
    for norm in norms[seen:]:
        known = [*known, norm][-5:]
        expected = torch.quantile(torch.tensor(known, dtype=torch.float64), 0.4)
        assert clip.norm_bound(torch.tensor(norm)) == expected


@pytest.mark.parametrize("percentile", [-1.0, 101.0, math.nan])
def test_refuses_a_percentile_out_of_range(percentile):
    with pytest.raises(ValueError, match=r"^AutoClip\(percentile=.*\): percentile must be in \[0, 100\]\.$"):
        AutoClip(percentile)


@pytest.mark.parametrize(("percentile", "is_warned"), [(0.1, True), (0, False), (1, False), (10, False)])
def test_a_fraction_in_place_of_a_percentile_is_warned_of(percentile, is_warned):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert AutoClip(percentile).percentile == percentile
    assert [str(each.message) for each in said] == is_warned * [
        "AutoClip(percentile=0.1): percentiles go to 100, so the bound is almost the smallest norm of the window; if a "
        "fraction was meant, say percentile=10."
    ]


def test_refuses_an_empty_window():
    with pytest.raises(ValueError, match=r"^AutoClip\(window=0\): window must be "):
        AutoClip(window=0)


GOOD = {"history": torch.tensor([1.0, 2.0, math.nan], dtype=torch.float64), "seen": torch.tensor(2)}


@pytest.mark.parametrize(
    "bad",
    [
        None,
        {},
        {"learned": torch.zeros(3)},
        {"history": GOOD["history"]},
        {**GOOD, "history": None},
        {**GOOD, "history": [1.0, 2.0, math.nan]},
        {**GOOD, "history": GOOD["history"].view(1, 3)},
        {**GOOD, "history": torch.tensor([1.0, math.inf, math.nan])},
        {**GOOD, "history": torch.tensor([1.0, -1.0, math.nan])},
        {**GOOD, "history": torch.tensor([1, 2, 3])},
        {**GOOD, "history": torch.ones(3).to_sparse(), "seen": 3},
        {**GOOD, "seen": 3},
        {**GOOD, "seen": -1},
        {**GOOD, "seen": 2.0},
        {**GOOD, "seen": torch.tensor([2, 2])},
        {**GOOD, "seen": "2"},
    ],
    ids=str,
)
def test_what_is_no_history_is_refused_and_nothing_changes(bad, frozen):
    clip = AutoClip(window=3)
    clip.load_state_dict(GOOD)
    with pytest.raises((TypeError, ValueError), match=r"^AutoClip\.load_state_dict\(state_dict=\.\.\.\): ") as refusal:
        clip.load_state_dict(bad)
    assert "\n" not in str(refusal.value)
    assert frozen(clip.state_dict()) == frozen(GOOD)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-7, 1e-25])
def test_gradients_of_any_scale_are_clipped_alike(scale, sizes_after):
    moved, optimizer = sizes_after(AutoClip(percentile=50), SIZES, scale, rel=1e-12)
    expected = [min(size, np.percentile(SIZES[: t + 1], 50)) for t, size in enumerate(SIZES)]
    assert moved == pytest.approx(expected, rel=1e-12)
    assert optimizer.num_clipped == sum(after < size for after, size in zip(expected, SIZES, strict=True))
