# SPDX-License-Identifier: Apache-2.0
"""What a spawned process draws from the augmentations that it was given."""

from lightning_optkit.data._draws import Draws


def draw(augmentations, queue):
    """Puts the numbers, and how many generators there are."""
    draws = [part for augmentation in augmentations for part in augmentation.modules() if isinstance(part, Draws)]
    queue.put(([each.uniform(3).tolist() for each in draws], len({id(each.generator) for each in draws})))
