# SPDX-License-Identifier: Apache-2.0
"""LAWA against the mean of the snapshots themselves."""

import copy

import pytest
import torch

from lightning_optkit.averaging import LAWA
from lightning_optkit.averaging.standalone import averages_of, protect_average, update_average_
from lightning_optkit.optimizers import SGD, AdamW


def make(dtype=torch.float64, ours=False):
    p = torch.nn.Parameter(torch.zeros(5, 3, dtype=dtype))
    return p, (AdamW if ours else torch.optim.AdamW)([p], lr=0.1)


def train(p, optimizer, steps, average, begin=0):
    passed = {}
    for step in range(begin + 1, begin + steps + 1):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype)
        optimizer.step()
        update_average_(optimizer, average, step)
        passed[step] = p.detach().clone()
    return passed


def assert_close(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def expected(passed, average):
    taken = [w for s, w in passed.items() if s >= average.start and (s - average.start) % average.every == 0]
    return torch.stack([w.to(torch.promote_types(w.dtype, torch.float32)) for w in taken[-average.k :]]).mean(dim=0)


@pytest.mark.parametrize("average", [LAWA(3), LAWA(3, every=2, start=4), LAWA(1, every=3), LAWA(50)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ours", [False, True], ids=["torch's", "one-pass"])
def test_it_is_the_mean_of_the_last_snapshots(dtype, average, ours):
    p, optimizer = make(dtype, ours)
    passed = train(p, optimizer, 11, average)
    actual = averages_of(optimizer, average)[p]
    tolerance = 1e-6 if dtype != torch.float64 else 1e-12
    torch.testing.assert_close(actual.double(), expected(passed, average).double(), rtol=0, atol=tolerance)
    snapshots = [name for name in optimizer.state[p] if name.startswith("lawa_snapshot_")]
    assert len(snapshots) == average.k
    assert {optimizer.state[p][name].dtype for name in snapshots} == {dtype}


def test_before_its_first_snapshot_there_is_none():
    p, optimizer = make()
    train(p, optimizer, 3, LAWA(2, start=4))
    assert averages_of(optimizer, LAWA(2, start=4)) == {}


@pytest.mark.parametrize("ours", [False, True], ids=["torch's", "one-pass"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_continues_the_ring_exactly(dtype, ours):
    average = LAWA(3, every=2)
    p, optimizer = make(dtype, ours)
    train(p, optimizer, 5, average)
    q, resumed = make(dtype, ours)
    handles = protect_average(resumed, average)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    q.data.copy_(p.detach())
    train(p, optimizer, 6, average, begin=5)
    train(q, resumed, 6, average, begin=5)
    assert torch.equal(averages_of(resumed, average)[q], averages_of(optimizer, average)[p])
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("ours", [False, True], ids=["torch's", "one-pass"])
@pytest.mark.parametrize("protects", [False, True], ids=["", "protected"])
@pytest.mark.parametrize("steps", [2, 3, 5, 8, 11])
@pytest.mark.parametrize("before, now", [(3, 5), (5, 3), (1, 2), (2, 1), (4, 9)])
def test_a_ring_of_another_length_keeps_the_newest_that_fit(before, now, steps, protects, ours):
    if ours and not protects:
        pytest.skip("it refuses state that is not its own")
    (p, optimizer), (q, resumed) = make(ours=ours), make(ours=ours)
    passed = train(p, optimizer, steps, LAWA(before))
    handles = protect_average(resumed, LAWA(now)) if protects else []
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    q.data.copy_(p.detach())
    room = min(before, now)
    for step in range(steps + 1, steps + 12):
        kept = LAWA(min(now, room + step - 1 - steps))
        assert_close(averages_of(resumed, LAWA(now))[q], expected(passed, kept))
        passed |= train(q, resumed, 1, LAWA(now), begin=step - 1)
    assert {name for name in resumed.state[q] if "snapshot" in name} == {f"lawa_snapshot_{n}" for n in range(now)}
    for handle in handles:
        handle.remove()


def test_a_damaged_ring_is_read_as_far_as_it_is_there():
    p, optimizer = make()
    train(p, optimizer, 2, LAWA(3))
    saved = copy.deepcopy(optimizer.state_dict())
    state = saved["state"][0]
    del state["lawa_snapshot_0"], state["lawa_snapshot_2"]
    q, resumed = make()
    protect_average(resumed, LAWA(3))
    resumed.load_state_dict(saved)
    assert torch.equal(averages_of(resumed, LAWA(3))[q], p)


def test_two_of_them_and_a_folded_one_stand_side_by_side():
    p, optimizer = make()
    fast, slow = LAWA(2), LAWA(4)
    for step in range(1, 7):
        p.grad = torch.ones_like(p) * step
        optimizer.step()
        update_average_(optimizer, fast, step)
        update_average_(optimizer, slow, step, name="slow")
    assert optimizer.state[p]["num_averaged_lawa"] == optimizer.state[p]["num_averaged_slow"] == 6
    assert not torch.equal(averages_of(optimizer, fast)[p], averages_of(optimizer, slow, "slow")[p])


def test_a_step_says_that_it_cannot_keep_it():
    with pytest.raises(TypeError, match=r"^SGD\(average=LAWA\(k=6, every=1, start=1\)\): no step keeps it; use Weight"):
        SGD([torch.zeros(1, requires_grad=True)], lr=0.1, average=LAWA())


def test_its_start_may_be_an_epoch_or_a_fraction_of_the_run():
    assert LAWA(3, start=2, start_interval="epoch").for_run(100, 10) == LAWA(3, start=11)
    assert LAWA(3, start=0.75).for_run(100) == LAWA(3, start=75)
    assert repr(LAWA(3, start=2, start_interval="epoch")) == "LAWA(k=3, every=1, start=2, start_interval='epoch')"
    p, optimizer = make()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"start must be a step; give average.for_run\(total_steps\)"):
        update_average_(optimizer, LAWA(start=0.5), 1)


@pytest.mark.parametrize("start", [0, 1.5, 0.0])
def test_refuses_a_start_that_is_neither(start):
    with pytest.raises(
        ValueError, match=rf"LAWA\(start={start}\): start must be an int >= 1 \(optimizer step\) or a float"
    ):
        LAWA(start=start)


@pytest.mark.parametrize("kwargs", [dict(k=0), dict(every=0)], ids=str)
def test_refuses_arguments_out_of_range(kwargs):
    (name,) = kwargs
    with pytest.raises(ValueError, match=rf"LAWA\({name}=0\): {name} must be an integer >= 1\."):
        LAWA(**kwargs)
