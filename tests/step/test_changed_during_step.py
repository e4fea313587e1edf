# SPDX-License-Identifier: Apache-2.0
"""A step during which a clip, a gradient or another thread changes the run."""

import copy
import gc
import threading

import pytest
import torch

from lightning_optkit._native import node
from lightning_optkit.clipping import AutoClip, ClipNorm
from lightning_optkit.optimizers import SGD, AdamW
from tests.step.moved_cases import BUILDS
from tests.step.moves import by_data


class Meddling(ClipNorm):
    """Changes the run when its bound is requested."""

    def __init__(self, meddle):
        super().__init__(1e9)
        self.meddle = meddle

    def norm_bound(self, norm):
        self.meddle()
        gc.collect(1)
        return super().norm_bound(norm)


MEDDLING = {
    "drops the gradient": lambda o, p: setattr(p, "grad", None),
    "drops the state": lambda o, p: o.state.clear(),
    "replaces the state": lambda o, p: o.state[p].update(exp_avg=o.state[p]["exp_avg"].clone()),
    "moves the state": lambda o, p: by_data(o.state[p]["exp_avg"]),
    "moves the parameter": lambda o, p: by_data(p),
    "adds a group": lambda o, p: o.add_param_group(dict(params=[torch.nn.Parameter(torch.ones(2))])),
    "replaces the optimizer's state": lambda o, p: setattr(o, "state", copy.copy(o.state)),
}


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("what", MEDDLING)
def test_a_clip_that_meddles_with_the_run_gets_a_step_all_the_same(what, fused):
    p = torch.nn.Parameter(torch.zeros(300, 400))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0, clip=Meddling(lambda: MEDDLING[what](optimizer, p)), fused=fused)
    for _ in range(3):
        p.grad = torch.ones(300, 400)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((300, 400), -0.3))


@pytest.mark.parametrize("what", ["frees the gradient's memory", "moves the gradient"])
def test_a_gradient_taken_away_while_the_step_runs_is_said_and_nothing_is_written(what):
    def meddle():
        if what == "moves the gradient":
            by_data(p.grad)
            p.grad.mul_(2)
        else:
            p.grad.untyped_storage().resize_(0)

    p = torch.nn.Parameter(torch.zeros(300, 400))
    optimizer = SGD([p], lr=0.1, clip=Meddling(meddle))
    p.grad = torch.ones(300, 400)
    with pytest.raises((RuntimeError, ValueError), match=r"^SGD\.step: "):
        optimizer.step()
    assert not p.detach().any()


def test_a_step_inside_a_step_is_refused():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = SGD([p], clip=Meddling(lambda: optimizer.step()))
    p.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match=r"^SGD\.step: called inside a step of the same optimizer\.$"):
        optimizer.step()
    optimizer.clip = None
    optimizer.step()  # the next one finds no lock


@pytest.mark.parametrize("build", [*BUILDS, "AutoClip"])
def test_threads_that_step_one_optimizer_take_turns(build):
    builds = {**BUILDS, "AutoClip": lambda p, **kw: SGD(p, lr=0.1, clip=AutoClip(), **kw)}
    values = [torch.randn(200, 100) for _ in range(6)]
    ours, still = ([torch.nn.Parameter(v.clone()) for v in values] for _ in range(2))
    for params in (ours, still):
        for index, p in enumerate(params):
            p.grad = torch.full_like(p, 0.01 * (index + 1))
    optimizer, twin = builds[build](ours), builds[build](still)
    threads = [threading.Thread(target=lambda: [optimizer.step() for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(80):
        twin.step()
    for p, q in zip(ours, still, strict=True):
        assert torch.equal(p, q)


@pytest.mark.skipif(
    node is None, reason="from torch 2.13 on, reading `p.grad` while another thread drops it may crash by itself"
)
def test_gradients_dropped_by_another_thread_do_not_reach_the_walk():
    p = torch.nn.Parameter(torch.zeros(200_000))
    optimizer = SGD([p], lr=0.1, clip=ClipNorm(1e9))
    done, assigning = threading.Event(), threading.Lock()  # torch 2.13 by itself crashes when two threads assign `grad`

    def drop():
        junk = []
        while not done.is_set():
            with assigning:
                p.grad = None
            junk.append(torch.full((200_000,), 1e20))
            junk[:-3] = []

    thread = threading.Thread(target=drop)
    thread.start()
    for _ in range(300):
        with assigning:
            p.grad = torch.zeros(200_000)
        optimizer.step()
    done.set()
    thread.join()
    assert not p.detach().any()
