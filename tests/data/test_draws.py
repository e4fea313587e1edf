# SPDX-License-Identifier: Apache-2.0
"""The generator of an augmentation is copied, pickled, and sent to a spawned process with it."""

import copy
import pickle
import queue

import draws_worker
import pytest
import torch

from lightning_optkit.data import CutMix, GaussianNoise, Mixup, RandomErasing, RandomHorizontalFlip


def drawn(modules):
    inbox = queue.SimpleQueue()
    draws_worker.draw(modules, inbox)
    return inbox.get()


def drawn_in_a_spawned_process(modules):
    context = torch.multiprocessing.get_context("spawn")
    inbox = context.SimpleQueue()
    process = context.Process(target=draws_worker.draw, args=(modules, inbox))
    process.start()
    numbers = inbox.get()
    process.join()
    return numbers


WAYS = {
    "pickle": lambda modules: drawn(pickle.loads(pickle.dumps(modules))),
    "deepcopy": lambda modules: drawn(copy.deepcopy(modules)),
    "spawn": drawn_in_a_spawned_process,
}


@pytest.mark.parametrize("way", WAYS)
def test_draws_on_where_it_was_and_shares_what_was_shared(way):
    shared = torch.Generator().manual_seed(7)
    kinds = (GaussianNoise, RandomHorizontalFlip, RandomErasing, Mixup, CutMix)
    modules = [*(kind(generator=shared) for kind in kinds), GaussianNoise(), GaussianNoise()]
    drawn(modules)
    there = WAYS[way](modules)
    assert there == drawn(modules)
    assert (len(there[0]), there[1]) == (7, 3)
