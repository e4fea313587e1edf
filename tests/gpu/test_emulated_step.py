# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the step, emulated on the CPU thread by thread, against the CPU kernels: bitwise, except sums."""

import gc
import itertools

import pytest
import torch

pytest.importorskip("ninja")
import emulated
from gpu_cases import (
    MIDDLE_SHAPES,
    ROUNDINGS,
    RULES,
    SMALL_SHAPES,
    STAGES,
    STATE_DTYPES,
    assert_same,
    is_exact,
    is_possible,
    is_refused,
    train,
)

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipPerTensor, ClipUnitwise
from lightning_optkit.optimizers import LAMB, LARS, SGD, AdamW
from lightning_optkit.step.split_weights import join

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


def run(name, *args, **kwargs):
    with emulated.cuda():
        return train(name, "cpu", *args, **kwargs)


@pytest.mark.parametrize("stage", STAGES)
def test_every_rule_with_every_stage(stage):
    for name in RULES:
        exact = is_exact(name, stage, same_powers=True)
        if not is_possible(name, STAGES[stage]) or (stage == "int8" and not exact):
            continue  # a last bit before the code decides between two codes
        case = dict(shapes=MIDDLE_SHAPES, **STAGES[stage])
        assert_same(run(name, **case), train(name, "cpu", **case), exact=exact)


@pytest.mark.parametrize("name", RULES)
def test_every_dtype_rounding_and_state(name):
    for dtype, rounding, state_dtype in itertools.product(
        [torch.float32, torch.bfloat16, torch.float16, torch.float64], ROUNDINGS, STATE_DTYPES
    ):
        exact = is_exact(name, "plain", same_powers=True)
        if (state_dtype == "int8" and not exact) or is_refused(dtype, rounding):
            continue
        case = dict(rounding=rounding, state_dtype=state_dtype, average=EMA(0.9))
        if not is_possible(name, case):
            case = dict(rounding=rounding)
        case |= dict(shapes=SMALL_SHAPES, steps=3)
        assert_same(run(name, dtype, **case), train(name, "cpu", dtype, **case), exact=exact)


def scattered(tensors, offset):
    """Copies at odd places of one buffer, with room between them that nobody may touch."""
    room = torch.full((sum(t.numel() + 64 for t in tensors) + 64,), 7.0, dtype=tensors[0].dtype)
    views, begin = [], offset
    for t in tensors:
        views.append(room[begin : begin + t.numel()].view(t.shape).copy_(t))
        begin += t.numel() + 33
    return room, views


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 4])
def test_tensors_at_any_address_and_nothing_beside_them(dtype, offset):
    rooms = []

    def place(tensors):
        room, views = scattered(tensors, offset)
        rooms.append((room, views))
        return views

    stages = dict(average=EMA(0.9), rounding="kahan")
    expected = train("adamw", "cpu", dtype, shapes=MIDDLE_SHAPES, **stages)
    assert_same(run("adamw", dtype, shapes=MIDDLE_SHAPES, place=place, **stages), expected, exact=True)
    for room, views in rooms:
        inside = torch.zeros_like(room, dtype=torch.bool)
        for view in views:
            inside[view.storage_offset() : view.storage_offset() + view.numel()] = True
        assert (room[~inside] == 7.0).all()


@pytest.mark.parametrize("stage", ["ema", "unit", "int8", "norm"])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_the_order_of_threads_and_blocks_changes_no_bit(name, stage):
    if name == "lamb" and stage == "int8":
        pytest.skip("an order of its own is all that the others have in common with it")
    case = dict(shapes=MIDDLE_SHAPES, steps=2, **STAGES[stage])
    expected = run(name, **case)
    for seed in (1, 2, 3):
        with emulated.order(seed):
            assert_same(run(name, **case), expected, exact=True)


@pytest.mark.parametrize("count", [64, 65, 440, 441, 3501])
def test_any_number_of_tensors(count):
    case = dict(shapes=[(3,)] * count, steps=1, clip=ClipNorm(0.5))
    assert_same(run("adamw", **case), train("adamw", "cpu", **case), exact=False)


def test_more_groups_than_one_launch_takes():
    def stepped():
        groups = [dict(params=[torch.ones(5, requires_grad=True)], lr=0.01 * (k + 1)) for k in range(35)]
        optimizer = AdamW(groups, clip=ClipPerTensor(0.5))
        for group in groups:
            group["params"][0].grad = torch.arange(5.0)
        optimizer.step()
        return [group["params"][0].detach() for group in groups], optimizer.num_clipped

    with emulated.cuda():
        found = stepped()
    assert found[1] == 1
    torch.testing.assert_close(found[0], stepped()[0], rtol=1e-6, atol=0)


def test_large_tensors_have_large_chunks_and_the_same_result():
    case = dict(shapes=[(9_000_001,), (3,)], steps=1)  # chunks of 4096
    assert_same(run("sgd", **case), train("sgd", "cpu", **case), exact=True)


@pytest.mark.parametrize("clip", [ClipNorm(1.0), ClipPerTensor(1.0), ClipUnitwise(0.1)], ids=lambda c: type(c).__name__)
def test_a_gradient_that_is_not_finite_skips_the_step(clip):
    with emulated.cuda():
        for bad in (float("inf"), float("nan")):
            p, q = torch.ones(5, requires_grad=True), torch.ones(3, 3, requires_grad=True)
            optimizer = AdamW([p, q], clip=clip, average=EMA(0.9))
            p.grad, q.grad = torch.tensor([1.0, bad, 0.0, 0.0, 0.0]), torch.ones(3, 3)
            optimizer.step()
            assert p.tolist() == [1.0] * 5
            assert (optimizer.num_steps, optimizer.num_skipped, optimizer.num_clipped) == (0, 1, 0)
            assert optimizer.state[p]["step"] == 0 and optimizer.state[q]["num_averaged"] == 0
            p.grad[1] = 1.0
            optimizer.step()
            assert (optimizer.num_steps, optimizer.num_skipped) == (1, 1)


@pytest.mark.parametrize("clip", [ClipNorm(0.5), ClipPerTensor(0.5), ClipUnitwise(0.1)], ids=lambda c: type(c).__name__)
def test_what_a_clip_leaves_out(clip):
    def stepped(only_left_out):
        torch.manual_seed(0)
        params = [torch.randn(shape).requires_grad_() for shape in [(40, 50), (33,), (5, 7), (3, 2, 4)]]
        optimizer = SGD(params, lr=0.1, clip=clip)
        optimizer.leaves_out = lambda: {params[0], params[3]}
        for step in range(3):
            for place, p in enumerate(params):
                p.grad = torch.randn(p.shape) * 10.0
                if step == 1 and only_left_out and place in (1, 2):
                    p.grad = None
            optimizer.step()
        params[0].grad[0] = float("nan")
        optimizer.step()
        counts = [optimizer.num_steps, optimizer.num_clipped, optimizer.num_skipped]
        params[0].grad[0] = 1.0
        optimizer.step()
        return [p.detach() for p in params], counts, [optimizer.grad_norm, optimizer.grad_norm_clipped]

    for only_left_out in (False, True):
        expected = stepped(only_left_out)
        with emulated.cuda():
            found = stepped(only_left_out)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
        assert found[1] == expected[1] == [3, 3 - only_left_out, 1]
        assert found[2] == pytest.approx(expected[2], rel=1e-6)


def test_squares_that_overflow_are_no_bad_gradients():
    with emulated.cuda():
        p = torch.zeros(5, requires_grad=True)
        optimizer = SGD([p], lr=1.0, clip=ClipNorm(1.0))
        p.grad = torch.full((5,), 3e30)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((5,), -(5**-0.5)))
        assert optimizer.num_clipped == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_parameter_that_overflowed_and_was_brought_back_trains_on_with_the_bits_of_the_cpu(rounding, dtype):
    largest = torch.finfo(dtype).max
    if is_refused(dtype, rounding):
        pytest.skip("refused")

    def trained():
        torch.manual_seed(0)
        p = torch.ones(300, dtype=dtype)
        p[::2] = largest
        p.requires_grad_()
        optimizer = SGD([p], lr=1.0, rounding=rounding, statistics=True)
        for step in range(5):
            p.grad = torch.randn(300).to(dtype)
            if step == 0:
                p.grad[::4], p.grad[2::4] = -largest, float("nan")
            optimizer.step()
            if step == 0:
                assert not p[::2].isfinite().any()
                with torch.no_grad():
                    p.copy_(torch.ones_like(p))
        assert p.isfinite().all()
        return p.detach(), optimizer.state[p].get("compensation"), optimizer.statistics()[0].lost

    with emulated.cuda():
        found = trained()
    expected = trained()
    assert torch.equal(found[0], expected[0]) and found[2] == expected[2]
    assert found[1] is None or torch.equal(found[1], expected[1])


@pytest.mark.parametrize("clip", [None, ClipUnitwise(0.01)], ids=["", "clipped"])
@pytest.mark.parametrize("rounding", ["split24", "split32"])
def test_split_weights_that_somebody_wrote_are_those_of_the_cpu(rounding, clip):
    def trained():
        torch.manual_seed(0)
        p = torch.randn(30, 33).bfloat16().requires_grad_()
        optimizer = SGD([p], lr=0.1, rounding=rounding, clip=clip)
        for step in range(5):
            p.grad = torch.randn(30, 33).bfloat16()
            optimizer.step()
            if step == 2:
                with torch.no_grad():
                    p[::2], p[1::4] = 0.0, -0.0
        return join(p, optimizer.state[p]["correction8" if rounding == "split24" else "correction16"])

    with emulated.cuda():
        found = trained()
    assert found.isfinite().all()
    # The norms of a unit are summed in another order.
    tolerance = dict(rtol=0, atol=0) if clip is None else dict(rtol=2**-14, atol=2**-14)
    torch.testing.assert_close(found, trained(), **tolerance)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38])
@pytest.mark.parametrize("name", ["sgd", "rmsprop", "lion"])
def test_8_bit_state_of_extremes_has_the_codes_of_the_cpu(name, bad):
    def trained():
        torch.manual_seed(0)
        p = torch.ones(300, requires_grad=True)
        optimizer_class, kwargs = RULES[name]
        optimizer = optimizer_class([p], **kwargs, state_dtype="int8")
        for step in range(4):
            p.grad = torch.randn(300)
            if step == 1:
                p.grad[7], p.grad[200:] = bad, torch.randn(100) * 1e-38
            optimizer.step()
            with torch.no_grad():
                p.nan_to_num_(nan=1.0, posinf=1.0, neginf=1.0)
        return optimizer.state[p]

    with emulated.cuda():
        found = trained()
    for key, value in trained().items():
        if value.dtype == torch.uint8 or key.endswith("_scale"):
            torch.testing.assert_close(found[key], value, rtol=0, atol=0, msg=key)
            assert found[key].float().isfinite().all()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1.0, 1e15, 1e20])
@pytest.mark.parametrize("optimizer_class", [LARS, LAMB, SGD])
def test_norms_of_any_scale_decide_as_on_the_cpu(optimizer_class, size, scale):
    if optimizer_class is LAMB and size > 1e18:
        pytest.skip("the second moment of such gradients is beyond fp32")
    clips = [ClipPerTensor(1.0), ClipUnitwise(0.1), ClipNorm(1.0)] if optimizer_class is SGD else [None]

    def trained(clip):
        torch.manual_seed(0)
        params = [(torch.randn(shape) * scale).requires_grad_() for shape in ((3, 900), (2500,))]
        optimizer = optimizer_class(params, lr=0.1, clip=clip, statistics=True)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape) * size
            optimizer.step()
        norms = [(s.grad_norm, s.param_norm, s.update_norm) for s in optimizer.statistics()]
        return [p.detach().double() / scale for p in params], norms, optimizer.num_clipped

    for clip in clips:
        with emulated.cuda():
            found = trained(clip)
        expected = trained(clip)
        for ours, theirs in zip(found[0], expected[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))
        for ours, theirs in zip(found[1], expected[1], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=0)
        assert found[2] == expected[2]


def test_a_loss_scaler_hands_over_its_scale_and_its_verdict():
    with emulated.cuda():
        p = torch.zeros(3, requires_grad=True)
        optimizer = SGD([p], lr=1.0)
        p.grad = torch.full((3,), 8.0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        optimizer.step()
        assert p.tolist() == [-2.0] * 3
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        assert p.tolist() == [-2.0] * 3
        assert (optimizer.num_steps, optimizer.num_skipped) == (1, 1)


def small_step(lr=0.1, **kwargs):
    params = [torch.ones(300, requires_grad=True), torch.ones(4, 7, requires_grad=True)]
    for p in params:
        p.grad = torch.linspace(-1, 1, p.numel()).view(p.shape)
    return params, AdamW(params, lr=lr, **kwargs)


def test_a_captured_step_replays_with_its_counters_and_the_learning_rate_of_the_day():
    lr = torch.tensor(0.1)
    expected, plain = small_step(0.1, clip=ClipNorm(1.0), average=EMA(0.9))
    for rate in (0.1, 0.1, 0.02, 0.02):
        plain.param_groups[0]["lr"] = rate
        plain.step()
    with emulated.cuda():
        params, optimizer = small_step(lr.double(), clip=ClipNorm(1.0), average=EMA(0.9))
        optimizer.step()
        with emulated.capture():
            optimizer.step()
        optimizer.state_dict()
        assert emulated.library().emulated_replay() == 3  # norm, coefficients, walk
        optimizer.param_groups[0]["lr"].fill_(0.02)
        for _ in range(2):
            emulated.library().emulated_replay()
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)
    assert optimizer.num_steps == 4


def test_the_first_step_cannot_be_captured_and_says_so():
    with emulated.cuda():
        params, optimizer = small_step()
        with emulated.capture(), pytest.raises(RuntimeError, match="a graph is being captured; take one step"):
            optimizer.step()
        optimizer.step()
        params[1].grad = None
        with emulated.capture(), pytest.raises(RuntimeError, match="a graph is being captured"):
            optimizer.step()
        optimizer.step()
        assert optimizer.num_steps == 2


@pytest.mark.parametrize("clip", [ClipNorm(1.0), ClipUnitwise(0.1)], ids=lambda c: type(c).__name__)
def test_after_a_call_that_failed_a_step_is_as_ever_and_nothing_leaks(clip):
    library = emulated.library()
    gc.collect()  # what earlier tests left in cycles would go while this one counts
    before, failures = library.emulated_allocations(), 0
    expected, plain = small_step(clip=clip)
    plain.step()
    for call in itertools.count(1):
        with emulated.cuda():
            params, optimizer = small_step(clip=clip)
            library.emulated_failure(call)
            try:
                optimizer.step()
            except RuntimeError as error:
                assert str(error).startswith("lightning_optkit on CUDA: ")
                assert str(error).endswith(": out of memory.")
                failures += 1
                if "layout" in str(error) or "norm" in str(error):  # nothing was written yet
                    optimizer.step()
                    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)
            else:
                library.emulated_failure(0)
                break
            finally:
                library.emulated_failure(0)
        optimizer._engine.forget()
        assert library.emulated_allocations() == before
    assert failures > 15


def test_a_plan_leaves_the_current_device_as_it_was():
    with emulated.cuda():
        emulated.library()
        _, optimizer = small_step()
        optimizer.step()
        assert emulated.library().emulated_device() == 0


def test_averages_of_parameters_without_a_gradient_move_on():
    def stepped():
        params, optimizer = small_step(average=EMA(0.5))
        optimizer.step()
        params[1].grad = None
        optimizer.step()
        optimizer.step()
        return params, [optimizer.state[p]["ema"] for p in params], optimizer.state[params[1]]["num_averaged"]

    with emulated.cuda():
        found = stepped()
    torch.testing.assert_close(found, stepped(), rtol=0, atol=0)


def test_units_of_any_length():
    shapes = [(5, 1), (3, 2), (2, 129), (1, 4000), (7, 3, 3), (1000, 3)]
    case = dict(shapes=shapes, steps=2, clip=ClipUnitwise(0.05), centralize=True)
    for dtype in (torch.float32, torch.bfloat16):
        assert_same(run("sgd", dtype, **case), train("sgd", "cpu", dtype, **case), exact=False)


def test_two_precisions_in_one_optimizer():
    def stepped():
        params = [torch.ones(9, requires_grad=True), torch.ones(9, dtype=torch.float64, requires_grad=True)]
        optimizer = LAMB(params, clip=ClipNorm(0.5))
        for p in params:
            p.grad = torch.arange(9, dtype=p.dtype)
        optimizer.step()
        return params, optimizer.num_clipped

    with emulated.cuda():
        found = stepped()
    expected = stepped()
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-9)
    assert found[1] == expected[1] == 1
