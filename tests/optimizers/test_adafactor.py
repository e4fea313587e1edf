# SPDX-License-Identifier: Apache-2.0
"""Adafactor against torch.optim.Adafactor, over every combination of arguments a user can give, and on real data."""

import copy
import itertools

import pytest
import torch
from torch import nn

from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue
from lightning_optkit.optimizers import Adafactor
from lightning_optkit.optimizers.convert import from_torch_, to_torch_, why_not_convertible
from lightning_optkit.step.in_backward import step_in_backward

needs_extension = pytest.mark.skipif(extension is None, reason="no compiled extension")

SHAPES = [(), (1,), (7,), (16, 33), (1, 5), (5, 1), (3, 4, 2, 3)]  # the last: a convolution
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
STATES = {0: {"variance"}, 1: {"variance"}, 2: {"row_var", "col_var"}, 4: {"row_var", "col_var"}}
COMBINATIONS = [
    dict(zip(("maximize", "beta2_decay", "eps", "d", "weight_decay"), values, strict=True)) | dict(foreach=foreach)
    for values, foreach in zip(
        itertools.product((False, True), (-0.8, 0.0), ((None, 1e-3), (0.5, 0.1)), (1.0, 1.5), (0.0, 0.1)),
        itertools.cycle((None, True, False)),
        strict=False,
    )
]
RATES = [0.0, 1e-3, 3.0, "tensor"]  # no step, below 1 / sqrt(t) throughout, above it


def short(kwargs):
    return "-".join(f"{name}={value}" for name, value in kwargs.items())


def parameters(dtype, count=2, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [[v.clone().requires_grad_() for v in values] for _ in range(count)]


def assert_state_close(one, ours, other, theirs, tolerance):
    for p, q in zip(ours, theirs, strict=True):
        assert set(one.state[p]) == set(other.state[q]) == STATES[p.ndim] | {"step"}
        for name, expected in other.state[q].items():
            torch.testing.assert_close(one.state[p][name], expected, rtol=tolerance, atol=tolerance)


# --- torch's numbers ---


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kwargs", COMBINATIONS, ids=short)
def test_follows_torch_over_50_steps(train, kwargs, dtype):
    ours, theirs = parameters(dtype)
    one, other = Adafactor(ours, **kwargs), torch.optim.Adafactor(theirs, **kwargs)
    train([one, other], [ours, theirs], steps=50)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_state_close(one, ours, other, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lr", RATES)
def test_follows_torch_at_every_rate(train, lr, dtype):
    ours, theirs = parameters(dtype)
    rates = [torch.tensor(0.02, dtype=dtype) if lr == "tensor" else lr for _ in range(2)]
    one = Adafactor(ours, lr=rates[0], weight_decay=0.01)
    other = torch.optim.Adafactor(theirs, lr=rates[1], weight_decay=0.01)
    train([one, other], [ours, theirs], steps=50)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_small_gradients_of_16_bit_parameters_are_divided_by_the_eps_of_their_dtype():
    """torch's eps[0] of None is 2**-7 in bf16, and much smaller in the fp32 that the step computes in."""
    ours, theirs = (p for (p,) in parameters(torch.bfloat16, 2, [(16, 33)]))
    one, other = Adafactor([ours], lr=0.1), torch.optim.Adafactor([theirs], lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        ours.grad = (1e-3 * torch.randn(16, 33, generator=generator)).bfloat16()
        theirs.grad = ours.grad.clone()
        before = ours.detach().clone()
        one.step()
        other.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * 2**-8)  # a rounding of numbers up to 2, now and then
    assert 0 < (ours - before).abs().max() < 0.05  # of 0.1, had the eps not bounded it


def test_each_dtype_of_a_group_has_its_own_eps():
    """torch uses that of the first parameter for all, so its results depend on the order of parameters."""

    def change(optimizer_class, dtypes):
        params = {dtype: torch.ones(4, 3, dtype=dtype, requires_grad=True) for dtype in dtypes}
        optimizer = optimizer_class(params.values(), lr=0.1)
        for p in params.values():
            p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
        return (1 - params[torch.float32].detach()).max().item()

    order = [torch.bfloat16, torch.float32]
    assert change(torch.optim.Adafactor, order) < 0.02
    assert change(torch.optim.Adafactor, order[::-1]) == pytest.approx(0.1)
    assert change(Adafactor, order) == change(Adafactor, order[::-1]) == pytest.approx(0.1)


def test_a_parameter_of_no_elements_stays_where_torch_divides_by_zero():
    def empty():
        p = torch.ones(3, 0, requires_grad=True)
        p.grad = torch.ones(3, 0)
        return [p]

    with pytest.raises(ZeroDivisionError):
        torch.optim.Adafactor(empty()).step()
    params = empty()
    optimizer = Adafactor(params)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    assert optimizer.explain().groups[0].bytes_moved == 2 * 4 * 3


# --- the compiled path ---

# Rows shorter and longer than a vector, matrices of several strips and chunks, several matrices, and columns in blocks.
COMPILED_SHAPES = [(9,), (20_000,), (3, 5), (2, 400, 330), (64, 8, 3, 3), (5, 5000), (3000, 7)]
STEP_TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def step_both_paths(dtype, shapes, steps, **kwargs):
    """A compiled optimizer and one in plain PyTorch, with their parameters, after the same steps."""
    lists = parameters(dtype, 2, shapes)
    optimizers = [Adafactor(params, lr=0.05, **copy.deepcopy(kwargs)) for params in lists]
    optimizers[1].param_groups[0]["fused"] = False
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p, q in zip(*lists, strict=True):
            p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) + 0.3).to(dtype)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return optimizers, lists


EVERYTHING = dict(
    maximize=True, clip=ClipUnitwise(0.05), average=EMA(0.9), l1=0.01, cautious=True, centralize=True, weight_decay=0.1,
    statistics=True,
)  # fmt: skip
COMPILED_STAGES = {
    "plain": dict(),
    "arguments": dict(beta2_decay=-0.3, eps=(0.5, 2.0), d=1.5, weight_decay=0.1, maximize=True),
    "no bounds": dict(eps=(0.0, 0.0), d=float("inf")),
    "norm": dict(clip=ClipNorm(0.5), average=EMA(0.9)),
    "value": dict(clip=ClipValue(0.5), l1=0.01),
    "per tensor": dict(clip=ClipPerTensor(0.5)),
    "bf16 state": dict(state_dtype=torch.bfloat16),
    "kahan": dict(rounding="kahan"),
    "stochastic": dict(rounding="stochastic"),
    "everything": EVERYTHING,
}


@needs_extension
@pytest.mark.parametrize("dtype", STEP_TOLERANCE, ids=str)
@pytest.mark.parametrize("stage", COMPILED_STAGES)
def test_the_compiled_step_is_the_step_in_plain_pytorch(stage, dtype):
    (one, other), (ours, expected) = step_both_paths(dtype, COMPILED_SHAPES, 2, **COMPILED_STAGES[stage])
    paths = [{plan.path for plan in optimizer.explain().groups} for optimizer in (one, other)]
    assert paths == [{f"compiled ({extension.cpu_isa()})"}, {"reference: fused=False"}]
    # A mean square that is rounded the other way to bf16 moves the step of its row by 2**-9.
    least = 2**-9 * 0.05 * 4 if stage == "bf16 state" and dtype != torch.float64 else 0.0
    for p, q in zip(ours, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2 * STEP_TOLERANCE[dtype], atol=max(least, STEP_TOLERANCE[dtype]))
        assert one.state[p].keys() == other.state[q].keys()
        for name, value in other.state[q].items():
            if name != "compensation":  # what is left depends on the last bit
                tolerance = max(STEP_TOLERANCE[dtype], 2**-7 if value.dtype == torch.bfloat16 else 0)
                torch.testing.assert_close(one.state[p][name], value, rtol=2 * tolerance, atol=tolerance, msg=name)
    if stage == "everything":
        assert one.num_clipped == other.num_clipped > 0
        for counted, q in zip(one.statistics(), other.statistics(), strict=True):
            assert counted.update_norm == pytest.approx(q.update_norm, rel=2e-2 if dtype.itemsize == 2 else 1e-5)


@needs_extension
@pytest.mark.parametrize("shape", [(3000, 40), (40, 3000), (300, 300), (30_000,)], ids=str)
def test_is_no_further_from_fp64_than_torch_after_50_steps(shape):
    def trained(optimizer_class, dtype):
        generator = torch.Generator().manual_seed(0)
        (p,) = params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_()]
        # eps[0] by hand: that of the dtype would differ.
        optimizer = optimizer_class(params, lr=0.05, eps=(1e-7, 1e-3), weight_decay=0.1)
        for _ in range(50):
            p.grad = (torch.randn(shape, generator=generator) + 0.3).to(dtype)
            optimizer.step()
        return p.detach().double()

    exact = trained(torch.optim.Adafactor, torch.float64)
    error, theirs = ((trained(c, torch.float32) - exact).norm() for c in (Adafactor, torch.optim.Adafactor))
    assert 0 < error < 1.2 * theirs


@needs_extension
@pytest.mark.parametrize("kwargs", [dict(), EVERYTHING], ids=["plain", "everything"])
def test_the_bits_do_not_depend_on_the_number_of_threads(kwargs, threads, snapshot):
    taken = []
    for count in (1, 2, 3):
        threads(count)
        (optimizer, _), _ = step_both_paths(torch.float32, COMPILED_SHAPES, 2, **kwargs)
        taken.append(snapshot(optimizer))
    assert taken[0] == taken[1] == taken[2]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_does_what_it_does_in_torch(bad):
    ours, theirs = parameters(torch.float32, 2, [(20, 30), (30,)])
    optimizers = [Adafactor(ours), torch.optim.Adafactor(theirs)]
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.ones_like(p)
        p.grad.view(-1)[7] = bad
        q.grad = p.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert any(not p.isfinite().all() for p in ours)


@needs_extension
def test_a_parameter_without_a_gradient_stands_still_beside_others():
    (params,) = parameters(torch.float32, 1, [(30, 40), (50, 60), (3,)])
    (alone,) = parameters(torch.float32, 1, [(30, 40), (50, 60), (3,)])
    one, other = Adafactor(params), [Adafactor([p]) for p in alone]
    for step in range(4):
        for k, (p, q) in enumerate(zip(params, alone, strict=True)):
            is_idle = step == 2 and k == 0
            p.grad = None if is_idle else torch.full_like(p, 1.0 + step)
            if not is_idle:
                q.grad = p.grad.clone()
                other[k].step()
        one.step()
    assert all(map(torch.equal, params, alone))


# --- state dicts and conversion ---


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("to_torch", [False, True])
def test_a_state_dict_continues_in_the_other_package(train, to_torch, dtype):
    kwargs = dict(lr=0.05, weight_decay=0.1, eps=(None, 0.01), d=2.0, beta2_decay=-0.5)
    ours, theirs, third = parameters(dtype, 3)
    optimizers = [Adafactor(ours, **kwargs), torch.optim.Adafactor(theirs, **kwargs)]
    train(optimizers, [ours, theirs], steps=5)
    source, target_class = (optimizers[0], torch.optim.Adafactor) if to_torch else (optimizers[1], Adafactor)
    resumed = target_class(third, lr=0.5)
    resumed.load_state_dict(copy.deepcopy(source.state_dict()))  # torch would alias these tensors
    for p, q in zip(third, ours, strict=True):
        p.data.copy_(q.detach())
    train([*optimizers, resumed], [ours, theirs, third], steps=5, seed=2)
    torch.testing.assert_close(third, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_state_close(resumed, third, optimizers[1], theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kwargs", [dict(), dict(foreach=True, maximize=True)], ids=short)
def test_converts_and_back(train, kwargs, dtype):
    ours, theirs = parameters(dtype)
    one, other = torch.optim.Adafactor(ours, **kwargs), torch.optim.Adafactor(theirs, **kwargs)
    groups = [{name: value for name, value in group.items() if name != "params"} for group in one.param_groups]
    train([one, other], [ours, theirs], steps=3)
    from_torch_(one)
    assert type(one) is Adafactor
    train([one, other], [ours, theirs], steps=3, seed=2)
    to_torch_(one)
    assert type(one) is torch.optim.Adafactor
    assert [{name: value for name, value in g.items() if name != "params"} for g in one.param_groups] == groups
    train([one, other], [ours, theirs], steps=3, seed=3)
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_state_close(one, ours, other, theirs, TOLERANCE[dtype])


def test_8_bit_state_comes_back_in_torchs_dtype_and_shapes(train):
    (params,) = parameters(torch.bfloat16, 1)
    optimizer = torch.optim.Adafactor(params)
    from_torch_(optimizer, state_dtype="int8")
    train([optimizer], [params], steps=3)
    to_torch_(optimizer)
    for p in params:
        assert set(optimizer.state[p]) == STATES[p.ndim] | {"step"}
        assert {optimizer.state[p][name].dtype for name in STATES[p.ndim]} == {torch.bfloat16}
    train([optimizer], [params], steps=3, seed=2)
    assert all(p.isfinite().all() for p in params)


def test_complex_parameters_are_left_to_torch_which_refuses_them_too():
    params = [torch.ones(2, 2, dtype=torch.complex64, requires_grad=True)]
    message = r"Adafactor(params=...): every parameter must be real, not complex"
    assert why_not_convertible(torch.optim.Adafactor(params)) == message
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match="complex"):
        torch.optim.Adafactor(params).step()
    for given in (params, [("weight", params[0])], [dict(params=params[0])]):
        with pytest.raises(RuntimeError, match=r"^Adafactor\(params=\.\.\.\): every parameter must be real"):
            Adafactor(given)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("row_var", (1, 4), r"'row_var' has shape \[1, 4\], its parameter \[3, 4\]; it must have \[3, 1\]"),
        ("col_var", (3, 4), r"'col_var' has shape \[3, 4\], its parameter \[3, 4\]; it must have \[1, 4\]"),
        ("variance", (3, 4), r"'variance' must not be there; its parameter of shape \[3, 4\] keeps none"),
    ],
)
def test_state_that_does_not_belong_is_refused_and_nothing_changes(name, shape, message, snapshot, train):
    (params,) = parameters(torch.float32, 1, [(3, 4), (5,)])
    optimizer = Adafactor(params)
    train([optimizer], [params], steps=2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0][name] = torch.ones(shape)
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=rf"^Adafactor\.load_state_dict\(state_dict=\.\.\.\): of parameter 0, the state {message}\.$"
    ):
        optimizer.load_state_dict(state_dict)
    assert snapshot(optimizer) == before


def test_state_of_another_shape_put_in_by_hand_is_refused(train):
    (params,) = parameters(torch.float32, 1, [(3, 4)])
    optimizer = Adafactor(params)
    train([optimizer], [params], steps=2)
    optimizer.state[params[0]]["row_var"] = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"^Adafactor\.step: the state 'row_var' has shape \[3, 4\], .* \[3, 4\]\.$"):
        optimizer.step()


# --- stages ---


def build(params, fused=None, **kwargs):
    return Adafactor(params, lr=0.01, **kwargs)


@pytest.mark.parametrize("kwargs", [dict(), dict(state_dtype="int8"), dict(rounding="stochastic")], ids=short)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit(resumes, dtype, kwargs):
    resumes(lambda params: build(params, clip=ClipNorm(1.0), average=EMA(0.9), **kwargs), dtype)


STAGES = {
    "norm": dict(clip=ClipNorm(0.5)),
    "value": dict(clip=ClipValue(0.1)),
    "per tensor": dict(clip=ClipPerTensor(0.5)),
    "per unit": dict(clip=ClipUnitwise(0.01)),
    "l1": dict(l1=0.1),
    "cautious": dict(cautious=True),
    "centralize": dict(centralize=True),
    "stochastic": dict(rounding="stochastic"),
    "kahan": dict(rounding="kahan"),
    "bf16 state": dict(state_dtype=torch.bfloat16),
    "int8 state": dict(state_dtype="int8"),
}


@pytest.mark.parametrize("shape", [(16, 9), (40,)], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_changes_the_step_and_none_by_much(stage, shape, train):
    dtype = torch.bfloat16 if "rounding" in STAGES[stage] else torch.float32
    plain, staged = parameters(
        dtype, 2, [shape, shape]
    )  # two: one factor for all would cancel out in the second moment
    one, other = (Adafactor(p, lr=0.01, weight_decay=0.5, **k) for p, k in ((plain, {}), (staged, STAGES[stage])))
    train([one, other], [plain, staged], steps=9)
    is_kept_as_ever = stage.endswith(" state") and len(shape) > 1  # rows and columns are in fp32
    assert torch.equal(plain[0], staged[0]) == (is_kept_as_ever or (stage == "centralize" and len(shape) == 1))
    torch.testing.assert_close(plain, staged, rtol=0, atol=0.3)


def test_l1_makes_exact_zeros_and_the_average_is_of_the_parameters():
    p = torch.tensor([[0.002, 1.0], [-0.002, 2.0]], requires_grad=True)
    optimizer = Adafactor([p], lr=0.1, l1=0.05, average=EMA(0.5), statistics=True)
    p.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([[0.0, 0.995], [0.0, 1.995]]))
    first = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["ema"], (first + p.detach()) / 2)
    assert optimizer.statistics()[0].param_norm == pytest.approx(p.norm().item(), rel=1e-6)


def test_the_gradient_is_clipped_before_the_rule_and_not_written():
    (params,) = parameters(torch.float64, 1, [(4, 3)])
    (expected,) = parameters(torch.float64, 1, [(4, 3)])
    one, other = (
        Adafactor(params, eps=(1.0, 1e-3), clip=ClipNorm(0.5)),
        torch.optim.Adafactor(expected, eps=(1.0, 1e-3)),
    )
    for seed in range(5):
        gradient = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        params[0].grad, expected[0].grad = gradient.clone(), gradient.clone()
        nn.utils.clip_grad_norm_(expected, 0.5)
        one.step()
        other.step()
        assert torch.equal(params[0].grad, gradient)
    torch.testing.assert_close(params, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "int8"], ids=str)
def test_state_is_held_in_the_dtype_asked_for_and_changes_dtype_when_loaded(state_dtype, train):
    (params,) = parameters(torch.float32, 1, [(3, 4, 5), (6,)])
    optimizer = Adafactor(params, state_dtype=state_dtype)
    train([optimizer], [params], steps=2)
    held = {"int8": torch.uint8}.get(state_dtype, state_dtype)
    state = optimizer.state[params[0]]
    assert (state["row_var"].shape, state["col_var"].shape) == ((3, 4, 1), (3, 1, 5))
    assert state["row_var"].dtype == state["col_var"].dtype == torch.float32  # few numbers
    assert optimizer.state[params[1]]["variance"].dtype == held
    plain = Adafactor(params)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    expected = Adafactor(copy.deepcopy(params))
    train([expected], [expected.param_groups[0]["params"]], steps=2)
    for name, value in expected.state[expected.param_groups[0]["params"][0]].items():
        assert plain.state[params[0]][name].dtype == torch.float32
        torch.testing.assert_close(plain.state[params[0]][name], value, rtol=0.25, atol=0)  # int8: twice 1/8


def test_steps_inside_the_backward_pass():
    models = [nn.Linear(4, 3).bfloat16() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [Adafactor(model.parameters(), lr=0.1) for model in models]
    handle = step_in_backward(optimizers[1])
    for seed in range(4):
        x = 1e-3 * torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for model, optimizer in zip(models, optimizers, strict=True):
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    handle.remove()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_a_transposed_parameter_and_a_sparse_gradient():
    rows = torch.arange(1.0, 13.0).view(3, 4)
    params = [rows.clone().requires_grad_(), rows.t().contiguous().t().requires_grad_(), rows.clone().requires_grad_()]
    optimizer = Adafactor(params, lr=0.1)
    for _ in range(3):
        gradient = torch.zeros(3, 4).index_fill_(0, torch.tensor([1]), 2.0)
        for p in params[:2]:
            p.grad = gradient.clone()
        params[2].grad = gradient.to_sparse()
        optimizer.step()
    torch.testing.assert_close(params[1], params[0])
    torch.testing.assert_close(params[2], params[0])


# --- what it says ---


@needs_extension
def test_says_which_path_it_takes_and_what_it_moves():
    model = nn.Linear(100, 50)
    matrix, vector = (
        Adafactor([p], weight_decay=0.1, clip=ClipNorm(1.0)).explain().groups[0] for p in model.parameters()
    )
    assert (matrix.rule, matrix.stages[-2:]) == ("adafactor", ("update", "decay(0.1)"))
    assert matrix.path == vector.path == f"compiled ({extension.cpu_isa()})"
    # g for the clip's norm, the factors, the update's norm and the update; p for its norm, read and written
    assert matrix.bytes_moved == 4 * (7 * 5000 + 2 * (100 + 50))
    assert vector.bytes_moved == 4 * (7 * 50 + 2 * 50)
    assert (matrix.state_dtype, vector.state_dtype) == ("float32", "float32")


@needs_extension
@pytest.mark.parametrize(
    ("param", "state_dtype", "reason"),
    [
        (torch.ones(3, 4).t(), torch.float32, "its rows do not lie one behind another in memory"),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.float32, "its rows do not lie"),
        (torch.ones(3, 4), "int8", None),
        (torch.ones(3, 4, dtype=torch.float64), "int8", None),
        (torch.ones(3, 4)[:, :1], torch.float32, "its memory has gaps"),
        (torch.ones(5), "int8", None),
        (torch.ones(3, 4), torch.bfloat16, None),
    ],
)
def test_says_what_the_compiled_path_does_not_cover(param, state_dtype, reason):
    param = param.detach().requires_grad_()
    optimizer = Adafactor([param], state_dtype=state_dtype)
    (plan,) = optimizer.explain().groups
    assert plan.path.startswith(f"reference: {reason}" if reason else "compiled")
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert (param < 1).all()


def test_keeps_numbers_per_row_and_column_only():
    (params,) = parameters(torch.float32, 1, [(200, 300)])
    optimizer = Adafactor(params)
    params[0].grad = torch.ones(200, 300)
    optimizer.step()
    assert sum(t.numel() for t in optimizer.state[params[0]].values()) == 200 + 300 + 1


def test_learns_the_digits(digits_loss):
    def model():
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    assert digits_loss(lambda params: Adafactor(params, lr=0.05), steps=200, model=model) < 0.1


# --- bad arguments ---


@pytest.mark.parametrize("fused", [None, pytest.param(False, id="reference")])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
@pytest.mark.parametrize("shape", [(40, 50), (300,)], ids=str)
def test_the_step_is_in_proportion_to_weights_of_any_scale(shape, scale, fused):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape) * scale, torch.randn(5, *shape)
    results = []
    for dtype in (torch.float32, torch.float64):
        p = values.to(dtype, copy=True).requires_grad_()
        optimizer = Adafactor([p], lr=0.1, eps=(1e-7, 0.0), weight_decay=0.0)
        for group in optimizer.param_groups:
            group["fused"] = fused
        for grad in gradients:
            p.grad = grad.to(dtype)
            optimizer.step()
        results.append(p.detach().double() / scale)
    assert not torch.allclose(results[1], values.double() / scale, rtol=0.01)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
