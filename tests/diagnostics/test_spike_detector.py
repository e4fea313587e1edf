# SPDX-License-Identifier: Apache-2.0
"""What the detector takes for a bad step, and what it does not."""

import math
import random
from dataclasses import asdict
from statistics import NormalDist

import pytest

from lightning_optkit.diagnostics import SpikeDetector, SpikeEvent


def steps(count=400, seed=0, noise=0.1):
    """A falling loss with noise that is log-normal, and a norm."""
    draw = random.Random(seed)
    for step in range(count):
        scale = math.exp(draw.gauss(0, noise))
        yield (0.1 + 2 * math.exp(-step / 60)) * scale, (0.5 + math.exp(-step / 60)) * scale


def after(values, **kwargs):
    detector = SpikeDetector(**kwargs)
    for loss, norm in values:
        detector.accept(loss, norm)
    return detector


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("noise", [0.02, 0.1, 0.3, 0.6])
def test_normal_steps_are_no_spikes(seed, noise):
    detector = SpikeDetector()
    verdicts = []
    for loss, norm in steps(800, seed, noise):
        verdicts.append(detector.judge(loss, norm))
        detector.accept(loss, norm)
    assert set(verdicts) == {"fine"}


@pytest.mark.parametrize(
    ("loss", "norm", "verdict"),
    [
        (2.5, 20.0, "spike"),
        (2.5, 0.01, "spike"),  # saturated: the loss alone is far enough
        (0.45, 0.6, "fine"),  # less than 30 % of the progress
        (0.1, 8.0, "fine"),  # the norm alone is the business of clipping
        (0.1, 100.0, "spike"),  # unless it is of another kind
        (math.nan, 1.0, "spike"),
        (0.1, math.inf, "spike"),
        (-math.inf, 1.0, "spike"),
    ],
)
def test_what_it_says_of_a_step(loss, norm, verdict):
    assert after(steps()).judge(loss, norm) == verdict


def test_a_hard_batch_has_the_norm_of_hard_batches():
    """Loss and norm count together: the same loss is normal with one norm and not with another."""
    detector = after(steps(noise=0.3))
    largest = max(norm for _, norm in [*steps(noise=0.3)][-256:])
    loss = next(x / 100 for x in range(30, 400) if detector.judge(x / 100, 4 * largest) == "spike")
    assert detector.judge(loss, largest) == "fine" and detector.judge(3 * loss, largest) == "spike"


def test_a_norm_that_the_run_has_had_is_no_spike_by_itself():
    usual = [*steps()]
    alone = (usual[-1][0], 100.0)
    assert after(usual).judge(*alone) == "spike"
    assert after([(usual[0][0], 200.0), *usual]).judge(*alone) == "fine"


def test_a_norm_that_the_run_has_survived_counts_less():
    """Hard samples return once in an epoch, which may be longer than the window."""
    usual = [*steps(600)]
    early, loss = [(usual[0][0], 20.0), *usual], 0.6
    norm = next(x / 10 for x in range(1, 200) if after(usual).judge(loss, x / 10) == "spike")
    assert after(early).judge(loss, norm) == "fine" and after(early).judge(loss, 10 * norm) == "spike"
    assert after(early).judge(3 * loss, norm) == "spike"


def test_three_spikes_in_a_row_are_broken_weights():
    detector = after(steps())
    verdicts = []
    for _ in range(4):
        verdicts.append(detector.judge(2.5, 20.0))
        detector.reject(2.5, 20.0)
    assert verdicts == ["spike", "spike", "broken", "broken"] and not detector.is_calm
    detector.restart()
    assert detector.is_calm and detector.judge(2.5, 20.0) == "spike"


def test_a_single_spike_is_forgotten():
    detector = after(steps())
    detector.reject(2.5, 20.0)
    for _ in range(5):
        detector.accept(0.1, 0.5)
    assert detector.is_calm and detector.judge(2.5, 20.0) == "spike"


def test_losses_that_stay_a_little_too_high_are_broken_weights():
    """No single one is a spike, and what may not be normal does not become usual."""
    detector = after(steps(600, noise=1.0))
    detector.restart()
    largest = max(detector.state_dict()["losses"][1])
    usual, verdicts = detector.usual, []
    while "broken" not in verdicts:
        verdicts.append(detector.judge(usual[0] + 0.55 * largest, 0.1))
        detector.accept(usual[0] + 0.55 * largest, 0.1)
        assert detector.usual == usual
    lower = sum(loss < usual[0] + 0.55 * largest for loss in detector.state_dict()["past"])
    score = NormalDist().inv_cdf((lower + 0.5) / 129)
    assert len(verdicts) == math.ceil(3 / (0.3 * score - 0.15)) and set(verdicts[:-1]) == {"fine"}


@pytest.mark.parametrize("tail", [0.3, 2.0])
def test_a_small_shift_of_all_losses_is_found_whatever_their_tail(tail):
    """By one standard deviation; without it the same losses are normal."""
    draw = random.Random(0)
    start = [(3 - step / 100, 1.0) for step in range(200)]
    scores = [draw.gauss(0, 1) for _ in range(1000)]
    usual = [(math.exp(tail * (score - 2)), 1.0) for score in scores]
    higher = [(math.exp(tail * (score - 1)), 1.0) for score in scores]
    detector, verdicts = after([*start, *usual[:500]]), []
    for loss, norm in higher[500:560]:
        verdicts.append(detector.judge(loss, norm))
        detector.accept(loss, norm)
    assert "broken" in verdicts
    detector = after([*start, *usual[:500]])
    for loss, norm in usual[500:]:
        assert detector.judge(loss, norm) == "fine"
        detector.accept(loss, norm)


def test_steps_that_wait_count_once_it_is_calm():
    detector = after(steps(600, noise=1.0))
    detector.restart()
    count = detector.state_dict()["count"]
    detector.accept(detector.usual[0] + 0.5 * max(detector.state_dict()["losses"][1]), 0.1)
    assert not detector.is_calm and detector.state_dict()["count"] == count
    detector.accept(0.0, 0.1)
    assert detector.is_calm and detector.state_dict()["count"] == count + 2


def test_less_than_a_twentieth_of_the_progress_is_nothing():
    detector = after(steps(600))
    for _ in range(100):
        assert detector.judge(detector.usual[0] + 0.05, 0.5) == "fine"
        detector.accept(detector.usual[0] + 0.05, 0.5)
    assert detector.is_calm


@pytest.mark.parametrize(("scale", "shift", "of_norm"), [(1e3, 0.0, 1.0), (1.0, -7.0, 1e-4), (1e-3, 5.0, 1e5)])
def test_units_do_not_matter(scale, shift, of_norm):
    plain = after(steps())
    other = after((loss * scale + shift, norm * of_norm) for loss, norm in steps())
    for loss, norm in ((0.5, 2.0), (0.9, 3.0), (1.5, 0.7), (3.0, 9.0)):
        assert plain.judge(loss, norm) == other.judge(loss * scale + shift, norm * of_norm)


def test_nothing_is_judged_before_the_warmup():
    detector = after(steps(63))
    assert detector.judge(1e9, 1e9) == "fine" and detector.judge(math.nan, 1.0) == "spike"
    detector.accept(0.5, 0.5)
    assert detector.judge(1e9, 1e9) == "spike"


def test_judging_remembers_nothing():
    detector = after(steps())
    before = detector.state_dict()
    detector.judge(100.0, 100.0)
    assert detector.state_dict() == before


def test_a_constant_loss():
    detector = after([(1.0, 1.0)] * 100)
    assert detector.judge(1.0, 1.0) == "fine" and detector.judge(1.0 + 1e-15, 1.0) == "fine"
    assert detector.judge(2.0, 1.0) == "spike"


def test_a_larger_threshold_finds_less():
    losses = [0.3 + place / 50 for place in range(100)]
    found = [
        sum(after(steps(noise=0.3), threshold=t).judge(loss, 1.0) == "spike" for loss in losses)
        for t in (1.2, 1.8, 4.0)
    ]
    assert found[0] > found[1] > found[2] > 0


def test_the_window_forgets():
    """A loss that was normal 300 steps ago is not any more."""
    detector = after(steps(330))
    assert detector.judge(1.2, 2.0) == "spike"
    early = after(steps(70))
    assert early.judge(1.2, 1.0) != "spike"


def test_state_round_trip():
    whole = after(steps(300))
    half = after(list(steps(300))[:150])
    resumed = SpikeDetector()
    resumed.load_state_dict(half.state_dict())
    for loss, norm in list(steps(300))[150:]:
        resumed.accept(loss, norm)
    assert resumed.state_dict() == whole.state_dict() and resumed.usual == whole.usual
    assert SpikeDetector().usual is None


@pytest.mark.parametrize(
    "state",
    [
        {},
        {
            "count": "3",
            "sum": 0.0,
            "highest": 0.0,
            "past": [],
            "waiting": [],
            "first": [],
            "losses": [[], []],
            "norms": [[], []],
        },
        {
            "count": 3,
            "sum": 0.0,
            "highest": None,
            "past": [],
            "waiting": [],
            "first": [],
            "losses": [[], []],
            "norms": [[], []],
        },
        {
            "count": 3,
            "sum": 0.0,
            "highest": 0.0,
            "past": [{}],
            "waiting": [],
            "first": [],
            "losses": [[], []],
            "norms": [[], []],
        },
        {
            "count": 3,
            "sum": 0.0,
            "highest": 0.0,
            "past": [],
            "waiting": [],
            "first": ["a"],
            "losses": [[], []],
            "norms": [[], []],
        },
        {
            "count": 3,
            "sum": 0.0,
            "highest": 0.0,
            "past": [],
            "waiting": [],
            "first": [],
            "losses": [[]],
            "norms": [[], []],
        },
        {
            "count": 3,
            "sum": 0.0,
            "highest": 0.0,
            "past": [],
            "waiting": [3],
            "first": [],
            "losses": [[], []],
            "norms": [[], []],
        },
        {
            "count": 3,
            "sum": 0.0,
            "highest": 0.0,
            "past": [],
            "waiting": [],
            "first": [],
            "losses": [[], [None]],
            "norms": [[], []],
        },
    ],
    ids=["empty", "count", "highest", "past", "first", "series", "waiting", "value"],
)
def test_a_damaged_state_changes_nothing(state):
    detector = after(steps())
    before = detector.state_dict()
    with pytest.raises((TypeError, ValueError), match=r"^SpikeDetector\.load_state_dict\("):
        detector.load_state_dict(state)
    assert detector.state_dict() == before


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"window": 63}, "window"),
        ({"threshold": 0}, "threshold"),
        ({"patience": -1.0}, "patience"),
        ({"warmup": 9}, "warmup"),
    ],
)
def test_wrong_arguments(arguments, name):
    with pytest.raises(ValueError, match=rf"^SpikeDetector\({name}="):
        SpikeDetector(**arguments)


def test_an_event_is_a_record():
    event = SpikeEvent(step=7, action="rollback", loss=2.0, norm=1.0, back_to=5)
    assert SpikeEvent(**asdict(event)) == event and hash(event) == hash(SpikeEvent(7, "rollback", 2.0, 1.0, 5))
    assert SpikeEvent(7, "skip", 2.0, 1.0).back_to is None
