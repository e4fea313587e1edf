# SPDX-License-Identifier: Apache-2.0
"""The whole one-pass step: any parameters in any layout against torch in fp64, and its other guarantees."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ClipNorm, ClipValue
from lightning_optkit.optimizers import SGD, Adam, AdamW

RULES = {
    "sgd": (SGD, torch.optim.SGD, dict(momentum=0.9, weight_decay=0.1)),
    "plain sgd": (SGD, torch.optim.SGD, dict(maximize=True)),
    "adam": (Adam, torch.optim.Adam, dict(amsgrad=True, weight_decay=0.1)),
    "adamw": (AdamW, torch.optim.AdamW, dict(weight_decay=0.1)),
}
CHUNK = 16384  # elements: kChunk of csrc/core/tables.h
SHAPES = [(), (1,), (0,), (3, 0), (7,), (6, 9), (2, 3, 4, 5), (1, 5, 1), (CHUNK + 37,), (5, CHUNK)]
# Largest error after 4 steps on numbers of size 1, moved by about 0.1 a step.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,  # arithmetic rounds by 6e-8 where the oracle's does not
    torch.bfloat16: 4 * 2**-8,  # one unit in the last place of a number in [2, 4), and half of one for each later step
    torch.float16: 4 * 2**-11,
}


# --- any parameters, any layout, any gradients, against torch in fp64 ---


def transposed(t):
    back = tuple(reversed(range(t.dim())))
    return t.permute(back).contiguous().permute(back)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t.contiguous()


def gapped(t):
    room = torch.zeros(*t.shape, 2, dtype=t.dtype)
    room[..., 0] = t
    return room[..., 0]


def unaligned(t):
    room = torch.zeros(t.numel() + 1, dtype=t.dtype)
    room[1:] = t.reshape(-1)
    return room[1:].view(t.shape)


def expanded(t):
    return t.reshape(-1)[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() else t


PARAM_LAYOUTS = [torch.Tensor.contiguous, transposed, channels_last, gapped, unaligned]
GRAD_LAYOUTS = [*PARAM_LAYOUTS, expanded]

parameter_specs = st.tuples(
    st.sampled_from(SHAPES), st.sampled_from(list(TOLERANCE)), st.sampled_from(PARAM_LAYOUTS), st.booleans()
)
gradient_specs = st.lists(st.none() | st.sampled_from(GRAD_LAYOUTS), min_size=4, max_size=4)


@given(
    rule=st.sampled_from(list(RULES)),
    specs=st.lists(parameter_specs, min_size=1, max_size=4),
    gradients=st.lists(gradient_specs, min_size=4, max_size=4),
    swaps=st.lists(st.none() | st.sampled_from(PARAM_LAYOUTS), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_follows_torch_in_fp64_for_any_parameters(rule, specs, gradients, swaps, seed):
    """`gradients[step][i]` is the layout of a gradient, None for no gradient; `swaps[step]` moves every parameter."""
    torch.manual_seed(seed)
    ours_class, _torch_class, kwargs = RULES[rule]
    ours = [torch.nn.Parameter(layout(torch.randn(shape).to(dtype))) for shape, dtype, layout, _ in specs]
    oracle = [p.detach().double().contiguous().clone().requires_grad_() for p in ours]

    def groups(params):
        first = [p for p, spec in zip(params, specs, strict=True) if spec[3]]
        second = [p for p, spec in zip(params, specs, strict=True) if not spec[3]]
        return [g for g in (dict(params=first, lr=0.1), dict(params=second, lr=0.05, weight_decay=0.0)) if g["params"]]

    optimizers = [ours_class(groups(ours), **kwargs), _torch_class(groups(oracle), **kwargs)]
    for layouts, swap in zip(gradients, swaps, strict=True):
        for p, q, layout in zip(ours, oracle, layouts, strict=False):
            if swap is not None:
                p.data = swap(p.detach().clone())
            p.grad = None if layout is None else layout(torch.randn(p.shape).to(p.dtype))
            q.grad = None if layout is None else p.grad.double().clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(ours, oracle, strict=True):
            q.data.copy_(q.detach().to(p.dtype))  # what storing in 16 or 32 bits does
    for p, q in zip(ours, oracle, strict=True):
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=0, atol=TOLERANCE[p.dtype])


# --- promises besides numbers ---


def busy_optimizer(seed=0):
    """Many small tensors and some of several chunks, in every dtype, with every stage on."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5)] * 20 + [(CHUNK * 3 + 5,), (7, CHUNK), (100_000,)]
    params = []
    for index, shape in enumerate(shapes):
        p = torch.randn(shape, generator=generator).to(list(TOLERANCE)[index % 4]).requires_grad_()
        p.grad = torch.randn(shape, generator=generator).to(p.dtype)
        params.append(p)
    return AdamW(
        params, clip=ClipNorm(1.0), average=EMA(0.9), l1=1e-3, cautious=True, rounding="stochastic", statistics=True
    )


def test_bits_do_not_depend_on_the_number_of_threads(snapshot, threads):
    seen = []
    for count in (1, 2):
        threads(count)
        optimizer = busy_optimizer()
        for _ in range(3):
            optimizer.step()
        seen.append((snapshot(optimizer), optimizer.grad_norm, optimizer.statistics()))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("clip", [None, ClipNorm(1e-3), ClipValue(1e-3)], ids=str)
def test_never_writes_to_the_gradient(clip, dtype, fused, frozen):
    params = [torch.randn(5, 7).to(dtype).requires_grad_() for _ in range(3)]
    for p, layout in zip(params, (torch.Tensor.contiguous, transposed, expanded), strict=True):
        p.grad = layout(torch.randn(5, 7).to(dtype))
    grads = [p.grad for p in params]
    before = frozen(grads)
    optimizer = AdamW(params, maximize=True, clip=clip, fused=fused)
    for _ in range(2):
        optimizer.step()
    assert frozen(grads) == before
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
def test_a_backward_pass_over_an_updated_parameter_is_refused(fused):
    p = torch.ones(3, requires_grad=True)
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    version = p._version
    AdamW([p], fused=fused).step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_continues_exactly_as_the_original(copied, snapshot):
    optimizer = busy_optimizer()
    optimizer.step()
    if copied == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif copied == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    else:
        buffer = io.BytesIO()
        torch.save(optimizer, buffer)
        twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    for p, q in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        assert p.data_ptr() != q.data_ptr()
        q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert snapshot(twin) == snapshot(optimizer)


def test_a_closure_is_evaluated_with_gradients_and_its_loss_is_returned():
    p = torch.tensor([3.0], requires_grad=True)
    optimizer = SGD([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(2)]
    assert losses == pytest.approx([9.0, 2.4**2])


def test_step_hooks_run_as_in_torch():
    optimizer = SGD([torch.ones(1, requires_grad=True)])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]


def test_counts_steps_and_clipped_steps():
    p = torch.ones(4, requires_grad=True)
    optimizer = SGD([p], clip=ClipNorm(1.0))
    for norm in (0.5, 2.0, 3.0):
        p.grad = torch.full((4,), norm / 2)
        optimizer.step()
    assert (optimizer.num_steps, optimizer.num_clipped, optimizer.num_skipped) == (3, 2, 0)
    assert optimizer.grad_norm == pytest.approx(3.0)
    assert optimizer.grad_norm_clipped == pytest.approx(1.0)


# --- a GradScaler, and gradients that are not finite ---


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("clip", [None, ClipNorm(0.1), ClipValue(0.1)], ids=str)
def test_unscales_by_grad_scale_before_it_clips(clip, fused):
    params = [torch.ones(9, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    grad = torch.randn(9, dtype=torch.float64)
    optimizers = [AdamW([p], lr=0.1, clip=clip, fused=fused) for p in params]
    optimizers[1].grad_scale, optimizers[1].found_inf = torch.tensor(1000.0), torch.tensor(0.0)
    for _ in range(3):
        for p, optimizer, scale in zip(params, optimizers, (1.0, 1000.0), strict=True):
            p.grad = grad * scale
            optimizer.step()
    torch.testing.assert_close(params[1], params[0], rtol=0, atol=1e-13)
    if clip == ClipNorm(0.1):
        assert optimizers[1].grad_norm == pytest.approx(grad.norm().item(), rel=1e-12)


def test_found_inf_skips_the_step_and_every_counter(snapshot):
    optimizer = busy_optimizer()
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    optimizer.step()
    assert snapshot(optimizer) == before
    assert optimizer.num_skipped == 1


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("where", [0, 20, 22], ids=["small", "several chunks", "last"])
def test_clip_norm_skips_a_step_with_a_non_finite_gradient_and_every_counter(bad, where, snapshot):
    optimizer = busy_optimizer()
    optimizer.step()
    optimizer.param_groups[0]["params"][where].grad.view(-1)[-1] = bad
    before = snapshot(optimizer)
    optimizer.step()
    assert snapshot(optimizer) == before
    assert optimizer.num_skipped == 1
    assert math.isnan(optimizer.grad_norm)


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("rule", RULES)
def test_without_a_clip_a_non_finite_gradient_does_what_it_does_in_torch(rule, fused):
    ours_class, _torch_class, kwargs = RULES[rule]
    ours = torch.ones(4, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    optimizers = [ours_class([ours], fused=fused, **kwargs), _torch_class([theirs], **kwargs)]
    for last in (math.inf, 1.0):
        for p in (ours, theirs):
            p.grad = torch.tensor([1.0, math.nan, -2.0, last], dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14, equal_nan=True)
    for name, value in optimizers[1].state[theirs].items():
        torch.testing.assert_close(optimizers[0].state[ours][name], value, rtol=0, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("hands_over", [False, True], ids=["scaler unscales", "step unscales"])
def test_a_grad_scaler_gives_the_training_it_gives_with_torch(hands_over):
    trained = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        p = torch.randn(50, requires_grad=True)
        optimizer = optimizer_class([p], lr=0.1)
        if hands_over and optimizer_class is AdamW:
            optimizer._step_supports_amp_scaling = True
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for step in range(6):
            optimizer.zero_grad()
            scaler.scale((p - 1).square().sum()).backward()
            if step == 3:
                p.grad[7] = math.inf
            scaler.step(optimizer)
            scaler.update()
        trained.append((p, scaler.get_scale(), optimizer.state[p]["step"]))
    torch.testing.assert_close(trained[0], trained[1], rtol=0, atol=1e-6)
    assert trained[0][2] == 5


# --- what cannot be compiled ---


def test_a_complex_parameter_follows_torch_and_says_that_it_takes_the_reference_path():
    ours = torch.randn(5, dtype=torch.complex128, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    optimizers = [Adam([ours], lr=0.1, weight_decay=0.1), torch.optim.Adam([theirs], lr=0.1, weight_decay=0.1)]
    for _ in range(5):
        ours.grad = torch.randn(5, dtype=torch.complex128)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert "reference: no kernel for complex128" in str(optimizers[0].explain())


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
def test_a_sparse_gradient_follows_torch(fused, frozen):
    ours = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    optimizers = [SGD([ours], lr=0.1, clip=ClipNorm(1e9), fused=fused), torch.optim.SGD([theirs], lr=0.1)]
    with torch.sparse.check_sparse_tensor_invariants():
        for rows in ([0, 0, 4], [5], []):
            values = torch.randn(len(rows), 3, dtype=torch.float64)
            ours.grad = torch.sparse_coo_tensor(torch.tensor([rows], dtype=torch.long), values, (6, 3))
            theirs.grad = ours.grad.clone()
            before = frozen(ours.grad)
            for optimizer in optimizers:
                optimizer.step()
            assert frozen(ours.grad) == before
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# --- gradients that do not fit ---


@pytest.mark.parametrize("fused", [None, False], ids=["compiled", "reference"])
@pytest.mark.parametrize("shapes", [((3,), (4,)), ((4,), (1,)), ((2, 2), (4,))], ids=str)
def test_a_gradient_of_another_shape_is_refused_before_anything_is_touched(shapes, fused, snapshot):
    good, bad = torch.ones(2, requires_grad=True), torch.ones(shapes[1], requires_grad=True)
    optimizer = SGD([good, bad], momentum=0.9, fused=fused)
    good.grad, bad.grad = torch.ones(2), torch.ones(shapes[1])
    bad.data = torch.ones(shapes[0])
    before = snapshot(optimizer)
    expected = rf"SGD\.step: a gradient has shape \[{', '.join(map(str, shapes[1]))}\]"
    with pytest.raises(ValueError, match=expected):
        optimizer.step()
    after = snapshot(optimizer)
    assert (after["params"], after["num_steps"]) == (before["params"], before["num_steps"])
    assert all(not state["step"] for state in optimizer.state.values() if "step" in state)


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_step_at_a_rate_of_zero_before_a_state_dict_is_loaded_is_no_step(rate):
    weights = [torch.ones(3, requires_grad=True) for _ in range(2)]
    saved, loaded = (AdamW([weight], lr=rate, clip=ClipNorm(0.1)) for weight in weights)
    for weight, optimizer in zip(weights, (saved, loaded), strict=True):
        weight.grad = torch.ones(3)
        optimizer.step()
    loaded.load_state_dict(saved.state_dict())
    assert loaded.num_steps == (0 if rate == 0 else 1)
    loaded.param_groups[0]["lr"] = 0.1
    loaded.step()
    assert loaded.num_steps == (1 if rate == 0 else 2)
    loaded.load_state_dict(saved.state_dict())
    assert loaded.num_steps == (1 if rate == 0 else 2)
