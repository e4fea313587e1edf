# SPDX-License-Identifier: Apache-2.0
"""The greedy soup on problems small enough to know the result."""

import pytest
import torch

from lightning_optkit.averaging import GreedySoup, average_checkpoints, greedy_soup


def member(value):
    return {"w": torch.tensor([float(value)]), "n": torch.tensor(int(value))}


def distance(weights):
    return abs(float(weights["w"]) - 2.0)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_first_and_each_only_if_the_mean_does_not_become_worse(mode):
    members = [member(v) for v in (0.0, 3.0, 9.0, 1.5)]
    sign = 1 if mode == "min" else -1
    found = greedy_soup(members, lambda weights: sign * distance(weights), mode)
    # 1.5 (0.5 away); with 3: 2.25 (0.25); with 0: 1.5 (0.5, worse); with 9: 4.5 (worse).
    assert isinstance(found, GreedySoup) and found.ingredients == (3, 1)
    assert found.state_dict["w"] == 2.25
    assert found.score == sign * 0.25
    assert found.scores == tuple(sign * s for s in (2.0, 1.0, 7.0, 0.5))
    torch.testing.assert_close(found.state_dict, average_checkpoints([members[3], members[1]]))


def test_an_equal_score_is_taken_in():
    found = greedy_soup([member(1), member(3)], lambda weights: 0.0)
    assert found.ingredients == (0, 1)


def test_is_never_worse_than_the_best_alone(tmp_path):
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(6):
        torch.save({"state_dict": {"w": torch.randn(4, generator=generator)}}, tmp_path / f"{i}.ckpt")
        paths.append(tmp_path / f"{i}.ckpt")
    calls = []

    def score(weights):
        calls.append(1)
        return -float((weights["w"] - 0.1).square().sum())

    found = greedy_soup(paths, score)
    assert found.score >= max(found.scores)
    assert found.score == score(found.state_dict)
    assert len(calls) == 2 * 6 - 1 + 1
    assert len(found.ingredients) > 1


def test_refuses():
    with pytest.raises(ValueError, match=r"^greedy_soup\(mode='best'\): mode must be one of 'max', 'min'\."):
        greedy_soup([member(1)], distance, mode="best")
    with pytest.raises(ValueError, match=r"^greedy_soup\(checkpoints=\[\]\)"):
        greedy_soup([], distance)
    with pytest.raises(
        ValueError, match=r"^greedy_soup\(.*\): soup of incompatible checkpoints; .* is in number 1 .* not in number 3"
    ):
        greedy_soup([member(1), member(2), {"w": torch.ones(1)}], distance)
