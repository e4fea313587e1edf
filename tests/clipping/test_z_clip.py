# SPDX-License-Identifier: Apache-2.0
"""ZClip in the step, and called, against the paper's formulas in plain Python."""

import copy
import math

import numpy as np
import pytest
import torch

from lightning_optkit.clipping import ZClip
from lightning_optkit.optimizers import SGD

SIZES = (1.0, 1.2, 0.9, 1.1, 50.0, 1.0, 1.3, 8.0, 1.0)


def written_out(norms, z_threshold, alpha, warmup_steps):
    """The norm after clipping of each step."""
    clipped, mean, variance = [], None, None
    for t, norm in enumerate(norms):
        if t < warmup_steps:
            clipped.append(norm)
            mean, variance = np.mean(norms[: t + 1]), np.var(norms[: t + 1])
            continue
        z = (norm - mean) / math.sqrt(variance)
        value = mean + z_threshold**2 / z * math.sqrt(variance) if z > z_threshold else norm
        clipped.append(value)
        mean = alpha * mean + (1 - alpha) * value
        variance = alpha * variance + (1 - alpha) * (value - mean) ** 2
    return clipped


def test_it_is_the_formula():
    clip = ZClip(2.0, alpha=0.9, warmup_steps=4)
    clipped = [min(norm, float(clip.norm_bound(torch.tensor(norm, dtype=torch.float64)))) for norm in SIZES]
    assert clipped == pytest.approx(written_out(SIZES, 2.0, 0.9, 4), rel=1e-12)
    assert clipped[4] < 2  # the spike


def test_nothing_is_clipped_while_warming_up():
    clip = ZClip(warmup_steps=3)
    assert [float(clip.norm_bound(torch.tensor(norm))) for norm in (1.0, 100.0, 1e6)] == [math.inf] * 3


def test_folded_it_is_the_function_and_torchs_step(folded_and_called):
    ours, optimizer, theirs, norms = folded_and_called(ZClip(2.0, alpha=0.9, warmup_steps=4), SIZES)
    torch.testing.assert_close([p.double() for p in ours], theirs, rtol=1e-12, atol=1e-12)
    expected = written_out(norms, 2.0, 0.9, 4)
    assert optimizer.num_clipped == sum(after < norm for after, norm in zip(expected, norms, strict=True)) > 0


def test_a_skipped_step_teaches_nothing(fused):
    p = torch.ones(2, requires_grad=True)
    optimizer = SGD([p], lr=1.0, clip=ZClip(warmup_steps=2), fused=fused)
    for size in (1.0, math.nan, 3.0):
        p.grad = torch.tensor([size, 0.0])
        optimizer.step()
    assert optimizer.num_skipped == 1
    before = copy.deepcopy(optimizer.clip.state_dict())
    assert before["learned"].tolist() == [2.0, 1.0, 2.0]
    optimizer.clip.norm_bound(torch.tensor(math.nan))
    assert str(optimizer.clip.state_dict()) == str(before)


def authors(norms, z_threshold, alpha, warmup_steps, max_norm, skip):
    """The bound of every step as in the authors' code: the outer bound beside the learned one, which learns without."""
    bounds, mean, variance = [], None, None
    for t, norm in enumerate(norms):
        outer = math.inf if max_norm is None else max_norm
        if t < warmup_steps:
            bounds.append(outer)
            mean, variance = np.mean(norms[: t + 1]), np.var(norms[: t + 1])
            continue
        z = (norm - mean) / math.sqrt(variance)
        is_spike = z > z_threshold
        value = mean + z_threshold * math.sqrt(variance) / (z / z_threshold) if is_spike else norm
        bounds.append(min(value if is_spike else math.inf, outer))
        if is_spike and skip:
            continue
        mean = alpha * mean + (1 - alpha) * value
        variance = alpha * variance + (1 - alpha) * (value - mean) ** 2
    return bounds


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("max_norm", [None, 1.15, 3.0])
def test_the_outer_bound_and_skipped_spikes_are_the_authors(max_norm, skip):
    norms = [*np.random.default_rng(0).lognormal(0, 0.3, 200), *SIZES, *SIZES]
    clip = ZClip(1.5, alpha=0.9, warmup_steps=6, max_norm=max_norm, skip_update_on_spike=skip)
    bounds = [float(clip.norm_bound(torch.tensor(norm, dtype=torch.float64))) for norm in norms]
    expected = authors(norms, 1.5, 0.9, 6, max_norm, skip)
    assert bounds == pytest.approx(expected, rel=1e-12)
    assert expected != authors(norms, 1.5, 0.9, 6, max_norm, not skip)


def test_the_outer_bound_folded_and_called(folded_and_called):
    clip = ZClip(2.0, alpha=0.9, warmup_steps=4, max_norm=30.0, skip_update_on_spike=True)
    ours, optimizer, theirs, norms = folded_and_called(clip, SIZES)
    torch.testing.assert_close([p.double() for p in ours], theirs, rtol=1e-12, atol=1e-12)
    assert optimizer.num_clipped == sum(
        bound < norm for bound, norm in zip(authors(norms, 2.0, 0.9, 4, 30.0, True), norms, strict=True)
    )


def test_the_name_of_a_clip_without_the_options_stays():
    assert repr(ZClip()) == "ZClip(z_threshold=2.5, alpha=0.97, warmup_steps=25)"
    assert repr(ZClip(max_norm=1.0, skip_update_on_spike=True)).endswith("max_norm=1, skip_update_on_spike=True)")


def test_a_resumed_clip_goes_on():
    clip, resumed = ZClip(2.0, warmup_steps=3), ZClip(2.0, warmup_steps=3)
    for norm in SIZES[:5]:
        clip.norm_bound(torch.tensor(norm))
    resumed.load_state_dict(clip.state_dict())
    for norm in SIZES[5:]:
        assert clip.norm_bound(torch.tensor(norm)) == resumed.norm_bound(torch.tensor(norm))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(z_threshold=0.0), r"ZClip\(z_threshold=0.0\): z_threshold must be in \(0, inf\)\."),
        (dict(alpha=1.0), r"ZClip\(alpha=1.0\): alpha must be in \[0, 1\)\."),
        (dict(max_norm=0.0), r"ZClip\(max_norm=0.0\): max_norm must be in \(0, inf\)\."),
        (dict(skip_update_on_spike=1), r"ZClip\(skip_update_on_spike=1\): skip_update_on_spike must be one of"),
        (dict(warmup_steps=1), r"ZClip\(warmup_steps=1\): warmup_steps must be "),
    ],
    ids=str,
)
def test_refuses_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match="^" + message):
        ZClip(**kwargs)


@pytest.mark.parametrize(
    "bad",
    [
        None,
        {},
        {"history": torch.zeros(3)},
        {"learned": None},
        {"learned": [1.0, 1.0, 1.0]},
        {"learned": torch.ones(2)},
        {"learned": torch.ones(3, dtype=torch.int64)},
        {"learned": torch.ones(3).to_sparse()},
        {"learned": torch.ones(3, device="meta")},
        {"learned": torch.tensor([1.0, -1.0, 3.0])},
        {"learned": torch.tensor([1.0, float("nan"), 3.0])},
        {"learned": torch.tensor([1.0, 1.0, float("inf")])},
    ],
    ids=str,
)
def test_what_it_cannot_have_learned_is_refused_and_nothing_changes(bad, frozen):
    clip = ZClip()
    clip.norm_bound(torch.tensor(2.0))
    before = frozen(clip.state_dict())
    with pytest.raises((TypeError, ValueError), match=r"^ZClip\.load_state_dict\(state_dict=\.\.\.\): ") as refusal:
        clip.load_state_dict(bad)
    assert "\n" not in str(refusal.value)
    assert frozen(clip.state_dict()) == before


def test_what_was_learned_in_another_precision_is_taken():
    clip = ZClip()
    clip.load_state_dict({"learned": torch.tensor([1.0, 2.0, 3.0])})
    assert torch.equal(clip.state_dict()["learned"], torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-9, 1e-25])
def test_gradients_of_any_scale_are_clipped_alike(scale, sizes_after):
    moved, _ = sizes_after(ZClip(2.0, alpha=0.9, warmup_steps=4), SIZES, scale, rel=1e-11)
    assert moved == pytest.approx(written_out(SIZES, 2.0, 0.9, 4), rel=1e-11)


def test_after_norms_that_were_all_equal_a_larger_one_is_clipped_to_them():
    clip = ZClip(warmup_steps=3)
    bounds = [float(clip.norm_bound(torch.tensor(norm, dtype=torch.float64))) for norm in (0.5, 0.5, 0.5, 0.5, 0.75)]
    assert bounds == [math.inf, math.inf, math.inf, math.inf, 0.5]
