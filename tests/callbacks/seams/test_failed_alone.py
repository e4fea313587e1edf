# SPDX-License-Identifier: Apache-2.0
"""Processes that have failed tell one another where, and do not wait for one that has told it."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from lightning_optkit.callbacks.seams import failed_alone


def raised(kind):
    try:
        raise kind("it failed")
    except kind as error:
        return error


@pytest.mark.parametrize(("kinds", "alike"), [((KeyError, KeyError), True), ((KeyError, RuntimeError), False)])
def test_both_know_at_once_whether_they_have_failed_alike(monkeypatch, kinds, alike):
    store = HashStore()
    monkeypatch.setattr(failed_alone, "default_store", lambda: store)
    monkeypatch.setattr(failed_alone, "SECONDS_FOR_OTHERS", 60.0)  # the answer is there long before

    def failed(rank):
        batch = SimpleNamespace(batch_idx=3)
        trainer = SimpleNamespace(world_size=2, global_rank=rank, current_epoch=1, global_step=7, fit_loop=batch)
        return failed_alone.failed_alike(trainer, raised(kinds[rank]))

    with ThreadPoolExecutor() as pool:
        answers = [pool.submit(failed, rank) for rank in (1, 0)]
        assert [answer.result(timeout=30) for answer in answers] == [alike, alike]


def test_one_that_fails_alone_waits_its_time_and_no_longer(monkeypatch):
    monkeypatch.setattr(failed_alone, "default_store", HashStore)
    monkeypatch.setattr(failed_alone, "SECONDS_FOR_OTHERS", 0.1)
    trainer = SimpleNamespace(
        world_size=2, global_rank=1, current_epoch=1, global_step=7, fit_loop=SimpleNamespace(batch_idx=3)
    )
    assert not failed_alone.failed_alike(trainer, raised(KeyError))
