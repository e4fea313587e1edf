# SPDX-License-Identifier: Apache-2.0
"""State, parameters and gradients moved, replaced and resized between steps: the step uses their current memory."""

import copy
import gc

import pytest
import torch

from lightning_optkit.clipping import ClipNorm
from lightning_optkit.optimizers import SGD, AdamW
from tests.step.moved_cases import BUILDS, steps
from tests.step.moves import MOVES, REPLACEMENTS, by_dtype, by_transposing

SHAPES = [(), (7,), (33, 40), (3, 5, 4)]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


# --- one tensor after another, moved by whatever torch offers ---


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
