# SPDX-License-Identifier: Apache-2.0
"""State, parameters and gradients moved, replaced and resized between steps: the step uses their current memory."""

import copy
import gc
import threading

import pytest
import torch

from lightning_optkit._native import node
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipPerTensor, ClipUnitwise
from lightning_optkit.optimizers import LAMB, LARS, SGD, Adafactor, AdamW, Lion, NAdam, Prodigy, ScheduleFreeAdamW
from tests.step.moves import MOVES, REPLACEMENTS, by_data, by_dtype, by_transposing

SHAPES = [(), (7,), (33, 40), (3, 5, 4)]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


# --- one tensor after another, moved by whatever torch offers ---


def training(optimizer):
    optimizer.train()
    return optimizer


BUILDS = {
    "AdamW": lambda p, **kw: AdamW(p, lr=0.1, **kw),
    "AdamW amsgrad, clip, EMA": lambda p, **kw: AdamW(
        p, lr=0.1, amsgrad=True, clip=ClipNorm(1.0), average=EMA(0.9), statistics=True, **kw
    ),
    "SGD momentum, Kahan": lambda p, **kw: SGD(p, lr=0.1, momentum=0.9, rounding="kahan", **kw),
    "Lion bf16 state": lambda p, **kw: Lion(p, lr=0.1, state_dtype=torch.bfloat16, **kw),
    "AdamW int8 state": lambda p, **kw: AdamW(p, lr=0.1, state_dtype="int8", **kw),
    "NAdam, units": lambda p, **kw: NAdam(p, lr=0.1, clip=ClipUnitwise(0.1), centralize=True, **kw),
    "LAMB": lambda p, **kw: LAMB(p, lr=0.1, **kw),
    "LARS, tensors": lambda p, **kw: LARS(p, lr=0.1, clip=ClipPerTensor(0.5), **kw),
    "Adafactor": lambda p, fused=None, **kw: Adafactor(p, lr=0.1, **kw),
    "Prodigy": lambda p, **kw: Prodigy(p, **kw),
    "ScheduleFreeAdamW": lambda p, **kw: training(ScheduleFreeAdamW(p, lr=0.1, **kw)),
}


def steps(optimizer, params, numbers, move=lambda: None):
    """Steps of fixed gradients; `move` before each but the first."""
    for number in numbers:
        generator = torch.Generator().manual_seed(number)
        if number:
            move()
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def tensors_of(optimizer):
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]


def frozen_state(frozen, optimizer, params):
    return [{name: frozen(t) for name, t in optimizer.state[p].items()} for p in params]


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("move", MOVES, ids=lambda f: f.__name__)
def test_state_moved_in_place_is_walked_where_it_lies(move, build, fused, frozen):
    if move is by_transposing and build == "AdamW int8 state":
        pytest.skip("codes in another order are made anew, by other random bits")
    ours, still = parameters(), parameters()
    optimizer, twin = BUILDS[build](ours, fused=fused), BUILDS[build](still, fused=fused)
    turn = iter(range(100))

    def move_some():
        for t in tensors_of(optimizer)[next(turn) % 2 :: 2]:
            move(t)
        gc.collect(1)  # what is young: the whole heap takes half a second
        scratch.extend(torch.full((1320,), 7.0) for _ in range(20))  # what was freed is used by others

    scratch = []
    steps(optimizer, ours, range(4), move_some)
    steps(twin, still, range(4))
    assert frozen(ours) == frozen(still)
    assert frozen_state(frozen, optimizer, ours) == frozen_state(frozen, twin, still)
    assert all((t == 7).all() for t in scratch)


@pytest.mark.parametrize("build", ["AdamW", "AdamW amsgrad, clip, EMA", "SGD momentum, Kahan", "LAMB"])
@pytest.mark.parametrize("move", [m for m in MOVES if m is not by_dtype], ids=lambda f: f.__name__)
def test_parameters_moved_in_place_are_walked_where_they_lie(move, build, frozen):
    ours, still = parameters(), parameters()
    optimizer, twin = BUILDS[build](ours), BUILDS[build](still)
    steps(optimizer, ours, range(4), lambda: [move(p) for p in ours])
    steps(twin, still, range(4))
    for p, q in zip(ours, still, strict=True):
        torch.testing.assert_close(p.detach(), q.detach())


# --- state replaced ---


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("build", ["AdamW", "AdamW int8 state", "AdamW amsgrad, clip, EMA", "NAdam, units"])
@pytest.mark.parametrize("how", REPLACEMENTS)
def test_state_replaced_is_taken_at_its_value(how, build, fused):
    ours, still = parameters(), parameters()
    optimizer, twin = BUILDS[build](ours, fused=fused), BUILDS[build](still, fused=fused)
    if build == "AdamW int8 state" and how in ("another layout", "gapped", "a subclass"):
        pytest.skip("codes that do not fit are made anew, by other random bits")

    def replace():
        for state in optimizer.state.values():
            for name, t in list(state.items()):
                state[name] = None  # the next tensor may have the same id
                state[name] = REPLACEMENTS[how](t)
        gc.collect(1)

    steps(optimizer, ours, range(4), replace)
    steps(twin, still, range(4))
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in still], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [3.0, 3, torch.tensor([3.0]), torch.tensor(3), torch.tensor(3.0).double()], ids=str)
def test_a_step_count_of_another_kind_counts_on(value):
    ours, theirs = parameters(), parameters()
    optimizers = [AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)]
    for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
        steps(optimizer, params, range(1))
        for state in optimizer.state.values():
            state["step"] = copy.deepcopy(value) if optimizer is optimizers[0] else torch.tensor(3.0)
        steps(optimizer, params, range(1, 3))
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in theirs], rtol=1e-6, atol=1e-6)
    assert [float(state["step"]) for state in optimizers[0].state.values()] == [5.0] * len(SHAPES)


BAD_STATE = {
    "a short scale": ("exp_avg_scale", lambda t: t[:1].clone(), "exp_avg_scale"),
    "no scale numbers": ("exp_avg_scale", lambda t: torch.empty(0), "exp_avg_scale"),
    "two step counts": ("step", lambda t: torch.ones(2), "step"),
    "a word for a count": ("step", lambda t: "three", "step"),
    "a number for a moment": ("exp_avg", lambda t: 1.0, "exp_avg"),
    "another shape": ("exp_avg", lambda t: torch.zeros(3, 3), "exp_avg"),
    "sparse": ("exp_avg", lambda t: torch.zeros(33, 40).to_sparse(), "exp_avg"),
    "meta": ("exp_avg", lambda t: torch.zeros(33, 40, device="meta"), "exp_avg"),
    "complex": ("exp_avg", lambda t: torch.zeros(33, 40, dtype=torch.complex64), "exp_avg"),
}


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("what", BAD_STATE)
def test_state_that_cannot_be_the_parameters_is_refused_in_a_sentence(what, fused, frozen):
    name, make, named = BAD_STATE[what]
    p = torch.nn.Parameter(torch.ones(33, 40))
    optimizer = AdamW([p], state_dtype="int8", fused=fused)
    steps(optimizer, [p], range(1))
    optimizer.state[p][name] = make(optimizer.state[p][name])
    p.grad = torch.ones_like(p)
    before = frozen(p)
    with pytest.raises(ValueError, match=rf"^AdamW\.step: the state '{named}' .*\.$"):
        optimizer.step()
    assert frozen(p) == before


def test_a_state_whose_memory_was_freed_is_refused():
    p = torch.nn.Parameter(torch.ones(33, 40))
    optimizer = AdamW([p])
    steps(optimizer, [p], range(1))
    optimizer.state[p]["exp_avg"].untyped_storage().resize_(0)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"^AdamW\.step: the state 'exp_avg' has lost its memory"):
        optimizer.step()


@pytest.mark.parametrize("which", ["parameter", "gradient"])
def test_a_parameter_or_gradient_whose_memory_was_freed_is_refused(which):
    p = torch.nn.Parameter(torch.ones(33, 40))
    optimizer = SGD([p])
    steps(optimizer, [p], range(1))
    (p.data if which == "parameter" else p.grad).untyped_storage().resize_(16)
    with pytest.raises(ValueError, match=rf"^SGD\.step: .*{which}"):
        optimizer.step()


# --- groups set by hand ---


def by_list(optimizer, new):
    optimizer.param_groups[0]["params"] = [new]


def by_tuple(optimizer, new):
    optimizer.param_groups[0]["params"] = (new,)


def by_tensor(optimizer, new):
    optimizer.param_groups[0]["params"] = new


def by_group(optimizer, new):
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "params": [new]}


def by_groups(optimizer, new):
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [new]}]


def by_item(optimizer, new):
    optimizer.param_groups[0]["params"][0] = new


def by_slice(optimizer, new):
    optimizer.param_groups[0]["params"][:] = [new]


def by_one_more_group(optimizer, new):
    optimizer.param_groups[0]["params"].clear()
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [new]})


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize(
    "how",
    [by_list, by_tuple, by_tensor, by_group, by_groups, by_item, by_slice, by_one_more_group],
    ids=lambda f: f.__name__,
)
def test_groups_set_by_hand_are_those_that_are_stepped(how, fused):
    old, new = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = AdamW([old], lr=0.1, fused=fused)
    steps(optimizer, [old], range(1))
    how(optimizer, new)
    before = old.detach().clone()
    old.grad, new.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(old.detach(), before)
    torch.testing.assert_close(new.detach(), torch.full((3,), 0.899))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda p: [p, p], ValueError, "given twice"),
        (lambda p: [p, None], TypeError, "must hold tensors, not a NoneType"),
        (lambda p: ["weight"], TypeError, "must hold tensors, not a str"),
    ],
)
def test_groups_set_by_hand_to_what_no_group_can_hold_are_refused(params, error, message):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = SGD([p])
    steps(optimizer, [p], range(1))
    optimizer.param_groups[0]["params"] = params(p)
    with pytest.raises(error, match=rf"^SGD\.step.*{message}"):
        optimizer.step()


@pytest.mark.parametrize("change", [dict(centralize=True), "clip", "average"], ids=str)
def test_a_stage_set_by_hand_is_there_in_the_next_step(change):
    def run(fused):
        # Its first dimension is not outermost in memory: the compiled walk cannot treat its rows by themselves.
        p = torch.nn.Parameter(torch.arange(12.0).view(3, 4).t())
        optimizer = SGD([p], lr=0.1, fused=fused)
        steps(optimizer, [p], range(1))
        if change == "clip":
            optimizer.clip = ClipUnitwise(0.01)
        elif change == "average":
            optimizer.keep_average(EMA(0.5))
        else:
            optimizer.param_groups[0].update(change)
        steps(optimizer, [p], range(1, 3))
        return [p.detach(), optimizer.state[p].get("ema", torch.zeros(()))]

    torch.testing.assert_close(run(None), run(False))


# --- while the step runs ---


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


# --- many gradients in another layout ---


def test_each_gradient_in_another_layout_is_looked_at_twice_however_many_there_are(monkeypatch):
    """Does not restart from the first gradient: the number of inspections would be quadratic."""
    params = [torch.nn.Parameter(torch.ones(2, 2)) for _ in range(200)]
    optimizer = SGD(params)
    for p in params:
        p.grad = torch.ones(2, 2).t().contiguous().t()
    optimizer.step()
    segment = optimizer._engine.plan.segments[0]
    plan, starts = segment._plan, []

    class Counting:
        def __getattr__(self, name):
            return getattr(plan, name)

        def bind(self, params, states, grads, start=0):
            starts.append(start)
            return plan.bind(params, states, grads, start)

    segment._plan = Counting()
    optimizer.step()
    assert starts == [0, *range(200)]


def test_nothing_of_a_step_is_kept_alive_until_the_next():
    """State moved between steps, as at the end of a fit, frees its old memory immediately."""
    import weakref

    p = torch.nn.Parameter(torch.ones(300, 400))
    optimizer = AdamW([p], clip=ClipNorm(1.0))
    steps(optimizer, [p], range(1))
    watched = [weakref.ref(p.grad), weakref.ref(optimizer.state[p]["exp_avg"])]
    p.grad = None
    optimizer.state[p] = {name: t.clone() for name, t in optimizer.state[p].items()}
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
