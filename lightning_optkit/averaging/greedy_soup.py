# SPDX-License-Identifier: Apache-2.0
"""The greedy soup: the mean of the checkpoints that improve it.

Source: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", arXiv:2203.05482, recipe 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lightning_optkit._checks import check_callable, check_in, check_one_of
from lightning_optkit.averaging.average_checkpoints import Checkpoint, Mean, check_checkpoints, read_weights

__all__ = ["GreedySoup", "greedy_soup"]


@dataclass(frozen=True)
class GreedySoup:
    """The result of `greedy_soup`.

    Args:
        state_dict: The mean of the ingredients.
        score: Its score.
        ingredients: Indices of the checkpoints in it, in the order in which they were added.
        scores: Score of every single checkpoint, in the given order.
    """

    state_dict: dict[str, Tensor]
    score: float
    ingredients: tuple[int, ...]
    scores: tuple[float, ...]


def greedy_soup(
    checkpoints: Sequence[Checkpoint],
    score: Callable[[dict[str, Tensor]], float],
    mode: Literal["max", "min"] = "max",
) -> GreedySoup:
    """Adds checkpoints to an average, the best first, and keeps each if that does not become worse.

    On the data of `score` the soup is at least as good as the best single checkpoint. Use other data for the test.

    Args:
        checkpoints: See `average_checkpoints`; e.g. runs with different hyperparameters from one pre-trained network.
        score: Returns the score of a state dict on held-out data; called at most `2 * len(checkpoints) - 1` times.
        mode: "max" if a higher score is better, "min" if a lower one is.

    Raises:
        ValueError: as in `average_checkpoints`, or for an invalid `mode`.

    Example:
        >>> import torch
        >>> found = greedy_soup(
        ...     [{"w": torch.tensor(0.0)}, {"w": torch.tensor(3.0)}, {"w": torch.tensor(9.0)}],
        ...     score=lambda weights: abs(float(weights["w"]) - 2.0),
        ...     mode="min",
        ... )
        >>> found.ingredients, found.state_dict["w"], found.score
        ((1, 0), tensor(1.5000), 0.5)
    """
    check_one_of("greedy_soup", "mode", mode, ("max", "min"))
    checkpoints = check_checkpoints("greedy_soup", checkpoints)
    check_callable("greedy_soup", "score", score, "score(state_dict)")
    sign = 1.0 if mode == "max" else -1.0
    fits = Mean("greedy_soup", checkpoints[0])
    scores: list[float] = []
    for number, checkpoint in enumerate(checkpoints, start=1):
        weights = read_weights("greedy_soup", "checkpoints", checkpoint)
        fits.check(weights, checkpoint, number)
        scores.append(_scored(score, weights))
    ranked = sorted(range(len(checkpoints)), key=lambda i: -sign * scores[i])
    soup, best = Mean("greedy_soup", checkpoints[ranked[0]]), scores[ranked[0]]
    ingredients = [ranked[0]]
    for i in ranked[1:]:
        candidate = _scored(score, soup.read(read_weights("greedy_soup", "checkpoints", checkpoints[i])))
        if sign * candidate >= sign * best:
            soup.add(checkpoints[i])
            best = candidate
            ingredients.append(i)
    return GreedySoup(soup.read(), best, tuple(ingredients), tuple(scores))


def _scored(score: Callable[[dict[str, Tensor]], float], weights: dict[str, Tensor]) -> float:
    value: Any = score(weights)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(check_in("greedy_soup", "score(state_dict)", value, "[-inf, inf]"))
