# SPDX-License-Identifier: Apache-2.0
"""Draws from augmentations in a spawned process."""

from lightning_optkit.data._draws import Draws


def draw(augmentations, queue):
    """Puts the numbers, and the number of generators, into the queue."""
    draws = [part for augmentation in augmentations for part in augmentation.modules() if isinstance(part, Draws)]
    queue.put(([each.uniform(3).tolist() for each in draws], len({id(each.generator) for each in draws})))
