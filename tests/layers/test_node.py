# SPDX-License-Identifier: Apache-2.0
"""The norms' C++ autograd node: bitwise equal to the Python node, and unused where it is not supported."""

import gc
import weakref

import pytest
import torch
from norm_cases import NORMS, numbers, run
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_optkit._native import node
from lightning_optkit.layers import _dispatch, add_layer_norm, layer_norm, rms_norm

pytestmark = pytest.mark.skipif(node is None, reason="the node is not built")


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that the node handled."""

    class Counting:
        taken = 0

        def count(self, result):
            Counting.taken += result is not None
            return result

        def norm(self, *a):
            return self.count(node.norm(*a))

        def add_norm(self, *a):
            return self.count(node.add_norm(*a))

    counting = Counting()
    monkeypatch.setattr(_dispatch, "node", counting)
    return counting


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float64,), (torch.bfloat16, torch.float32)]
)
def test_bits_are_those_of_the_node_in_python(kind, dtypes, calls, monkeypatch):
    for size in (3, 40, 255):
        n = numbers(33, size).to(*dtypes)
        ours = run(kind, n, ours=True)
        monkeypatch.setattr(_dispatch, "node", None)
        monkeypatch.setattr(_dispatch, "SMALL_LAYER", -1)
        monkeypatch.setattr(_dispatch, "SMALL_ADD_LAYER", -1)
        python = run(kind, n, ours=True)
        monkeypatch.setattr(_dispatch, "node", calls)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, python, strict=True))
    assert calls.taken == 3


@pytest.mark.parametrize(
    "given", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_gradients_of_those_that_want_one(given, calls):
    n = numbers(20, 40).to(torch.float32)
    tensors = [t.requires_grad_(wants) for t, wants in zip((n.x, n.weight, n.bias), given, strict=True)]
    wanted = [t for t in tensors if t.requires_grad]
    found = torch.autograd.grad(layer_norm(tensors[0], (40,), *tensors[1:]), wanted, n.dy)
    expected = torch.autograd.grad(torch.layer_norm(tensors[0], (40,), *tensors[1:]), wanted, n.dy)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, atol=1e-5, rtol=1e-5)
    assert calls.taken == 1


def test_only_one_output_of_a_sum_may_be_used(calls):
    n = numbers(20, 40).to(torch.float32)
    x = n.x.requires_grad_()
    for k in (0, 1):
        outputs = add_layer_norm(x, n.residual, (40,), n.weight, n.bias)
        total = x + n.residual
        theirs = torch.layer_norm(total, (40,), n.weight, n.bias), total
        (found,), (expected,) = (torch.autograd.grad(o[k], x, n.dy) for o in (outputs, theirs))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert calls.taken == 2


def test_dropout_has_the_mask_of_the_node_in_python(calls, monkeypatch):
    results = []
    for used in (calls, None):
        monkeypatch.setattr(_dispatch, "node", used)
        monkeypatch.setattr(_dispatch, "SMALL_ADD_LAYER", -1)
        torch.manual_seed(3)
        x = numbers(20, 40).to(torch.float32).x.requires_grad_()
        y, total = add_layer_norm(x, torch.ones(20, 40), (40,), dropout=0.3)
        (first,) = torch.autograd.grad(y.square().sum() + total.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((y, total, first, second))
    assert calls.taken == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (results[0][1] == 1).float().mean().item() == pytest.approx(0.3, abs=0.1)


def test_no_gradient_no_node(calls):
    x = torch.randn(4, 40, requires_grad=True)
    with torch.no_grad():
        assert layer_norm(x, (40,)).grad_fn is None
    with torch.inference_mode():
        assert layer_norm(x, [40]).is_inference()
    assert calls.taken == 2
    assert layer_norm(x, (40,)).grad_fn is not None


def test_an_input_changed_in_place_is_noticed():
    x = torch.randn(4, 40, requires_grad=True) * 1
    y = layer_norm(x, (40,))
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_hooks_on_saved_tensors_see_them():
    packed = []
    x = torch.randn(4, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        layer_norm(x, (40,), torch.ones(40)).sum().backward()
    assert packed == [(4, 40), (2, 4), (40,)]


def test_a_graph_that_is_gone_frees_what_it_kept():
    x = torch.randn(4, 40, requires_grad=True)
    middle = x * 1
    gone = weakref.ref(middle)
    y, _ = add_layer_norm(middle, middle, (40,))
    del middle
    y.sum().backward()
    del y, _
    gc.collect()
    assert gone() is None


def test_batched_gradients_go_through_operators_of_torch(calls):
    x = torch.randn(4, 40, requires_grad=True)
    dys = torch.randn(3, 4, 40)
    (found,) = torch.autograd.grad(layer_norm(x, (40,)), x, dys, is_grads_batched=True)
    y = torch.layer_norm(x, (40,))
    for k in range(3):
        torch.testing.assert_close(
            found[k], torch.autograd.grad(y, x, dys[k], retain_graph=True)[0], atol=1e-5, rtol=1e-5
        )
    assert calls.taken == 1


def test_stays_out_of_transforms_traces_and_fakes(calls):
    x = torch.randn(4, 40)
    torch.func.vmap(lambda t: layer_norm(t, (40,)))(x)
    torch.func.jvp(lambda t: layer_norm(t, (40,)), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(layer_norm(dual, (40,))).tangent is not None
    with FakeTensorMode() as mode:
        assert layer_norm(mode.from_tensor(x), (40,)).shape == (4, 40)
        layer_norm(torch.ones(4, 40), (40,))
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda t: layer_norm(t, (40,)))(x)
    assert len(traced.graph.nodes) > 2
    layer_norm(torch.nn.Buffer(x), (40,))
    before = calls.taken
    layer_norm(torch.randn(4, 40, device="meta"), (40,))
    layer_norm(torch.randn(0, 40), (40,))
    assert before <= 1 and calls.taken == before


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch looks, in its own tracing
def test_compiled_autograd_runs_it(calls):
    x = torch.randn(4, 40, requires_grad=True)
    weight = torch.randn(40, requires_grad=True)
    expected = torch.autograd.grad(layer_norm(x, (40,), weight).square().sum(), [x, weight])
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        layer_norm(x, (40,), weight).square().sum().backward()
    torch.testing.assert_close([x.grad, weight.grad], list(expected))
    assert calls.taken == 2


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.10 says so of every profile
def test_the_profiler_names_it():
    x = torch.randn(4, 40, requires_grad=True)
    with torch.profiler.profile() as profile:
        rms_norm(x, (40,)).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"lightning_optkit::norm", "lightning_optkit::norm_backward"} <= names


@pytest.mark.parametrize("payload", [0x7FC00000, 0x7FFFFFFF, -1])
def test_nan_in_float32_parameters_beside_bfloat16_stays_nan(payload, isa):
    weight = torch.ones(40)
    weight.view(torch.int32)[7] = payload
    for part in (weight, weight[6:9]):
        y = rms_norm(torch.ones(4, len(part), dtype=torch.bfloat16), (len(part),), part)
        assert y.isnan().any(-1).all()


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("size", [1024, 1028])
def test_rows_that_go_past_the_caches(kind, size, isa):
    rows = (1 << 23) // (4 * 1024) + 3
    n = numbers(rows, size).to(torch.float32)
    exact = run(kind, n.to(torch.float64), ours=False)
    for found, e in zip(run(kind, n, ours=True), exact, strict=True):
        torch.testing.assert_close(found.double(), e, atol=1e-3, rtol=1e-4)
