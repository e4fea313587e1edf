# SPDX-License-Identifier: Apache-2.0
"""The step on CUDA against the step on CPU: the same headers, so the same bits unless a sum is involved."""

import contextlib
import itertools

import pytest
import torch
from gpu_cases import (
    ROUNDINGS,
    RULES,
    SHAPES,
    SMALL_SHAPES,
    STAGES,
    STATE_DTYPES,
    TOLERANCE,
    assert_same,
    is_exact,
    is_possible,
    is_refused,
    train,
)

from lightning_optkit import optimizers as ours
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm
from lightning_optkit.step.segments import why_not_compiled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_kernels_are_there():
    assert why_not_compiled(torch.zeros(1, device="cuda")) is None


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", RULES)
def test_every_rule_with_every_stage(name, stage):
    exact = is_exact(name, stage, same_powers=False)
    if not is_possible(name, STAGES[stage]) or (stage == "int8" and not exact):
        pytest.skip("the rule does not take the stage, or a last bit before the code decides between two codes")
    assert_same(train(name, "cuda", **STAGES[stage]), train(name, "cpu", **STAGES[stage]), exact=exact)


@pytest.mark.parametrize("name", RULES)
def test_every_dtype_rounding_and_state(name):
    for dtype, rounding, state_dtype in itertools.product(TOLERANCE, ROUNDINGS, STATE_DTYPES):
        exact = is_exact(name, "plain", same_powers=False)
        case = dict(rounding=rounding, state_dtype=state_dtype, average=EMA(0.9))
        if not is_possible(name, case):
            case = dict(rounding=rounding)
        # Where a last bit may differ, rounding at random or to few bits makes it a large one.
        if not exact and (state_dtype != torch.float32 or rounding in ("stochastic", "split24")):
            continue
        if is_refused(dtype, rounding):
            continue
        case |= dict(shapes=SMALL_SHAPES, steps=3)
        assert_same(train(name, "cuda", dtype, **case), train(name, "cpu", dtype, **case), exact=exact)


@pytest.mark.parametrize(
    "stage", ["plain", "value, l1", "cautious", "centralize", "ema", "swa", "norm", "tensor", "unit"]
)
def test_fp32_follows_fp64(stage):
    for name in RULES:
        if name in ("lion", "lars") or not is_possible(name, STAGES[stage]):
            continue  # a sign, or a rate by norms, makes a small difference a large one
        found, _ = train(name, "cuda", torch.float32, **STAGES[stage])
        exact, _ = train(name, "cpu", torch.float64, **STAGES[stage])
        for p, q in zip(found, exact, strict=True):
            torch.testing.assert_close(p.cpu().double(), q, rtol=1e-4, atol=1e-4, msg=f"{name}, {stage}")


@contextlib.contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_waits_for_nothing(stage):
    for name in filter(lambda name: is_possible(name, STAGES[stage]), ("adamw", "lamb", "sgd")):
        params, optimizer = train(name, "cuda", steps=1, **STAGES[stage])
        with no_waiting():
            optimizer.step()
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        assert optimizer.num_steps == 3


def test_averages_of_parameters_without_a_gradient_wait_for_nothing():
    params = [torch.ones(5, device="cuda", requires_grad=True) for _ in range(2)]
    optimizer = ours.SGD(params, lr=0.1, average=EMA(0.5))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[1].grad = None
    optimizer.step()  # lays the plan out anew
    with no_waiting():
        optimizer.step()
    assert optimizer.state[params[1]]["num_averaged"] == 3


def steps_of(device, lr, *, capturable=False):
    torch.manual_seed(0)
    params = [torch.randn(shape).to(device).requires_grad_() for shape in SHAPES]
    optimizer = ours.AdamW(params, lr=lr, clip=ClipNorm(1.0), average=EMA(0.9), capturable=capturable)
    for p in params:
        p.grad = torch.randn(p.shape).to(device)
    return params, optimizer


def test_a_captured_step_replays_with_its_counters_and_the_learning_rate_of_the_day():
    expected, plain = steps_of("cuda", 0.01)
    for rate in (0.01, 0.01, 0.01, 0.002, 0.002):
        plain.param_groups[0]["lr"] = rate
        plain.step()
    lr = torch.tensor(0.01, dtype=torch.float64, device="cuda")
    params, optimizer = steps_of("cuda", lr, capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        optimizer.step()  # builds the plan
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    graph.replay()
    lr.fill_(0.002)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    for p, q in zip(params, expected, strict=True):
        assert torch.equal(p, q)
    assert optimizer.num_steps == 5


def test_the_first_step_cannot_be_captured_and_says_so():
    params, optimizer = steps_of("cuda", 0.01, capturable=True)
    optimizer.step()
    params[0].grad = None
    with pytest.raises(RuntimeError, match="a graph is being captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
    torch.cuda.synchronize()
    optimizer.step()


def test_a_gradient_that_is_not_finite_skips_the_step_on_the_device():
    p = torch.ones(5, device="cuda", requires_grad=True)
    optimizer = ours.AdamW([p], clip=ClipNorm(1.0))
    p.grad = torch.tensor([1.0, float("inf"), 0.0, 0.0, 0.0], device="cuda")
    optimizer.step()
    assert p.tolist() == [1.0] * 5
    assert (optimizer.num_steps, optimizer.num_skipped) == (0, 1)
    assert optimizer.state[p]["step"] == 0


def test_a_loss_scaler_waits_for_nothing_of_ours():
    p = torch.ones(1000, device="cuda", requires_grad=True)
    optimizer = ours.SGD([p], lr=1.0, clip=ClipNorm(1e9))
    p.grad = torch.full_like(p, 8.0)
    optimizer.step()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0, device="cuda"), torch.tensor(0.0, device="cuda")
    with no_waiting():
        optimizer.step()
        optimizer.found_inf.fill_(1.0)
        optimizer.step()
    assert p.tolist() == [1.0 - 8.0 - 2.0] * 1000
    assert (optimizer.num_steps, optimizer.num_skipped) == (2, 1)


def test_an_estimate_is_made_without_waiting_and_left_by_a_skipped_step():
    torch.manual_seed(0)
    p = torch.randn(5000, device="cuda", requires_grad=True)
    q = p.detach().cpu().requires_grad_()
    optimizer, expected = ours.Prodigy([p], d0=1e-2), ours.Prodigy([q], d0=1e-2)
    p.grad = torch.randn_like(p)
    q.grad = p.grad.cpu()
    optimizer.step()
    found_inf = torch.ones((), device="cuda")
    with no_waiting():
        optimizer.step()
        optimizer.found_inf = found_inf
        optimizer.step()
    for _ in range(2):
        expected.step()
    for name in ("d", "d_max", "d_numerator"):
        found, wanted = (float(o.param_groups[0][name]) for o in (optimizer, expected))
        assert abs(found - wanted) <= 1e-5 * abs(wanted), name
    assert optimizer.num_skipped == 1


def test_streams_of_their_own():
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        p = torch.randn(1_000_000, device="cuda", requires_grad=True)
        p.grad = torch.randn_like(p)
        optimizer = ours.AdamW([p], clip=ClipNorm(1.0))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_two_streams_at_once():
    optimizers, params = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        params.append(torch.randn(3_000_000, device="cuda", requires_grad=True))
        params[-1].grad = torch.randn_like(params[-1])
        optimizers.append(ours.AdamW([params[-1]], clip=ClipNorm(1.0)))
    alone = []
    for seed in range(2):
        torch.manual_seed(seed)
        p = torch.randn(3_000_000, device="cuda", requires_grad=True)
        p.grad = torch.randn_like(p)
        optimizer = ours.AdamW([p], clip=ClipNorm(1.0))
        for _ in range(5):
            optimizer.step()
        alone.append(p)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        for stream, optimizer in zip(streams, optimizers, strict=True):
            with torch.cuda.stream(stream):
                optimizer.step()
    torch.cuda.synchronize()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))


@pytest.mark.parametrize("count", [65, 441, 3501])
def test_any_number_of_tensors(count):
    case = dict(shapes=[(3,)] * count, steps=2, clip=ClipNorm(0.5))
    assert_same(train("adamw", "cuda", **case), train("adamw", "cpu", **case), exact=False)


def test_more_than_two_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free memory")
    p = torch.zeros(2**31 + 5, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = ours.SGD([p], lr=0.5, clip=ClipNorm(1e9))
    optimizer.step()
    assert abs(optimizer.grad_norm - (2**31 + 5) ** 0.5) < 1.0
    assert p[-5:].tolist() == [-0.5] * 5
    assert p[2**31 - 1 : 2**31 + 1].tolist() == [-0.5] * 2
    assert p[:5].tolist() == [-0.5] * 5


def test_sanitized_steps():
    for name, stage in (("adamw", "ema"), ("lamb", "norm"), ("sgd", "unit"), ("adamw", "int8"), ("adamw", "tensor")):
        case = dict(shapes=SMALL_SHAPES, steps=2, **STAGES[stage])
        assert_same(
            train(name, "cuda", **case), train(name, "cpu", **case), exact=is_exact(name, stage, same_powers=False)
        )
