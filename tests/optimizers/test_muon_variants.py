# SPDX-License-Identifier: Apache-2.0
"""NorMuon, AdaMuon and Polar Express against their algorithms, written out in fp64 around torch's iterations."""

import math

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from lightning_optkit.optimizers import Muon, _newton_schulz
from lightning_optkit.optimizers._newton_schulz import orthogonalize
from lightning_optkit.optimizers._newton_schulz_coefficients import coefficients_per_step

SHAPES = [(8, 5), (5, 8), (6, 6), (7, 3, 2, 2)]
USUAL = (3.4445, -4.7750, 2.0315)


@pytest.fixture(autouse=True)
def products_of_torch(monkeypatch):
    """torch multiplies in bf16 on any CPU, and rounds at other points."""
    monkeypatch.setattr(_newton_schulz, "has_bf16_products", lambda: True)


def orthogonal(momentum):
    """torch's iterations in bf16, of the matrix [first, rest]."""
    return _zeropower_via_newtonschulz(momentum.flatten(1), USUAL, 5, 1e-7).double()


def normuon(values, gradients, lr, beta, beta2, decay, *, nesterov, ratio):
    """Algorithm 1 of NorMuon as its authors write it: rows divided by their root mean squares, the norm kept."""
    w, m = values.clone(), torch.zeros_like(values)
    v = torch.zeros(len(values), 1, dtype=torch.float64)
    for g in gradients:
        m = beta * m + (1 - beta) * g
        o = orthogonal((1 - beta) * g + beta * m if nesterov else m)
        v = beta2 * v + (1 - beta2) * (o * o).mean(dim=1, keepdim=True)
        scaled = o / (v.sqrt() + 1e-10)
        scaled = scaled * o.norm() / scaled.norm()
        w = w * (1 - lr * decay) - lr * ratio(o) * scaled.view_as(w)
    return w


def adamuon(values, gradients, lr, beta, beta2, decay, *, nesterov, ratio):
    """Algorithm 1 of AdaMuon: signs, elements divided by their root mean squares, root mean square 0.2."""
    w, m = values.clone(), torch.zeros_like(values)
    v = torch.zeros_like(values.flatten(1))
    for g in gradients:
        m = beta * m + (1 - beta) * g
        o = orthogonal(torch.sign((1 - beta) * g + beta * m if nesterov else m))
        v = beta2 * v + (1 - beta2) * o * o
        scaled = o / (v.sqrt() + 1e-8)
        scaled = 0.2 * math.sqrt(o.numel()) / (scaled.norm() + 1e-8) * scaled
        w = w * (1 - lr * decay) - lr * scaled.view_as(w)
    return w


WRITTEN = {"normuon": normuon, "adamuon": adamuon}
RATIOS = {
    None: lambda o: math.sqrt(max(1, o.size(0) / o.size(1))),
    "match_rms_adamw": lambda o: 0.2 * math.sqrt(max(o.shape)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust_lr_fn", RATIOS)
@pytest.mark.parametrize("variant", WRITTEN)
def test_follows_the_algorithm_for_two_hundred_steps(variant, adjust_lr_fn, nesterov, dtype, tolerance):
    torch.manual_seed(0)
    for shape in SHAPES:
        values = torch.randn(shape, dtype=torch.float64)
        gradients = torch.randn(200, *shape, dtype=torch.float64) * torch.rand(shape[0], *[1] * (len(shape) - 1))
        p = values.clone().to(dtype).requires_grad_()
        settings = dict(lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
        optimizer = Muon([p], variant=variant, beta2=0.8, **settings)
        for g in gradients:
            p.grad = g.to(dtype)
            optimizer.step()
        ratio = RATIOS[adjust_lr_fn]
        expected = WRITTEN[variant](values, gradients, 0.02, 0.9, 0.8, 0.1, nesterov=nesterov, ratio=ratio)
        # In fp32 a momentum may round to the next number of bf16 now and then.
        torch.testing.assert_close(p.detach().double(), expected, rtol=tolerance, atol=tolerance)
        plain = Muon([values.clone().requires_grad_()], **settings)
        assert plain.param_groups[0]["variant"] is None


@pytest.mark.parametrize("variant", WRITTEN)
def test_a_stack_moves_as_its_matrices_one_by_one(variant):
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 5, dtype=torch.float64)
    apart = [matrix.clone().requires_grad_() for matrix in stack]
    stack.requires_grad_()
    together, alone = Muon([stack], variant=variant, stacked=True), Muon(apart, variant=variant)
    for _ in range(20):
        stack.grad = torch.randn(3, 8, 5, dtype=torch.float64)
        for p, g in zip(apart, stack.grad, strict=True):
            p.grad = g.clone()
        together.step()
        alone.step()
    torch.testing.assert_close(list(stack.detach()), [p.detach() for p in apart], rtol=0, atol=20 * 1e-3 * 2**-8)
    shapes = {name: value.shape for name, value in together.state[stack].items() if value.dim()}
    assert shapes["second_momentum_buffer"] == ((3, 8) if variant == "normuon" else (3, 8, 5))


@pytest.mark.parametrize("variant", WRITTEN)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_convolutions_in_any_layout_and_resumed(variant, memory_format):
    torch.manual_seed(0)
    values, gradients = torch.randn(6, 3, 2, 2), torch.randn(6, 6, 3, 2, 2)
    ours = values.clone().to(memory_format=memory_format).requires_grad_()
    plain = values.clone().requires_grad_()
    optimizer, reference = (Muon([p], variant=variant) for p in (ours, plain))
    for step, g in enumerate(gradients):
        ours.grad, plain.grad = g.clone().to(memory_format=memory_format), g.clone()
        optimizer.step()
        reference.step()
        if step == 2:
            saved, optimizer = optimizer.state_dict(), Muon([ours], variant=variant)
            optimizer.load_state_dict(saved)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


def test_a_state_dict_brings_its_variant_and_one_from_before_loads():
    def stepped(**options):
        p = torch.ones(4, 3, requires_grad=True)
        p.grad = torch.rand(4, 3)
        optimizer = Muon([p], **options)
        optimizer.step()
        return optimizer

    saved = stepped().state_dict()
    for group in saved["param_groups"]:
        del group["variant"], group["beta2"]
    stepped().load_state_dict(saved)
    resumed = stepped(variant="adamuon")
    resumed.load_state_dict(stepped(variant="normuon").state_dict())
    [state] = resumed.state.values()
    assert resumed.param_groups[0]["variant"] == "normuon" and state["second_momentum_buffer"].shape == (4,)
    resumed.step()


# --- coefficients ---


def composed(x, steps):
    """The authors' iteration on singular values: x / 1.01, and every polynomial but the last of x / 1.01."""
    optimal = [
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    ]
    x = x / 1.01
    for step in range(steps):
        a, b, c = optimal[step] if step < 7 else (1.875, -1.25, 0.375)
        y = x / 1.01 if step < 7 else x
        x = a * y + b * y**3 + c * y**5
    return x


@pytest.mark.parametrize("steps", [1, 5, 7, 12])
def test_polar_express_is_the_authors_composition(steps):
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    y = x
    for a, b, c in coefficients_per_step("polar_express", steps):
        y = a * y + b * y**3 + c * y**5
    torch.testing.assert_close(y, composed(x, steps), rtol=1e-12, atol=1e-13)
    if steps >= 7:
        assert float((y[5:] - 1).abs().max()) < 0.02


def test_polar_express_comes_closer_to_orthogonal_matrices_than_one_polynomial():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(4, 32, 32)).Q for _ in range(2))
    values = torch.logspace(-2.5, 0, 32)
    matrices = u @ torch.diag(values / values.norm()) @ v.mT
    usual, optimal = (
        orthogonalize(matrices, coefficients, 6, 1e-7).double() for coefficients in (USUAL, "polar_express")
    )
    errors = [float((torch.linalg.svdvals(made) - 1).abs().max()) for made in (usual, optimal)]
    assert errors[1] < 0.1 < errors[0]
    product = (u @ v.mT).double()
    assert float((optimal - product).norm() / product.norm()) < 0.05


def test_a_triple_for_each_iteration_repeats_the_last():
    torch.manual_seed(0)
    matrices = torch.randn(2, 6, 4)
    triples = [(3.0, -4.0, 2.0), (1.875, -1.25, 0.375)]
    made = orthogonalize(matrices, triples, 3, 1e-7)
    x = matrices.bfloat16().mT
    x = x / torch.stack([m.norm() for m in x]).view(-1, 1, 1)
    for a, b, c in (triples[0], triples[1], triples[1]):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    torch.testing.assert_close(made.double(), x.mT.double(), rtol=0, atol=2**-5)
    p = torch.ones(4, 3, requires_grad=True)
    p.grad = torch.rand(4, 3)
    optimizer = Muon([p], ns_coefficients=triples)
    optimizer.step()
    resumed = Muon([p])
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["ns_coefficients"] == triples


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"variant": "normoun"},
            ValueError,
            r"Muon\(variant='normoun'\): variant must be one of None, 'normuon', 'adamuon'",
        ),
        ({"beta2": 1.0}, ValueError, r"Muon\(beta2=1.0\): beta2 must be in \[0, 1\)"),
        (
            {"ns_coefficients": "polar"},
            ValueError,
            r"Muon\(ns_coefficients='polar'\): ns_coefficients must be three num",
        ),
        (
            {"ns_coefficients": [(1.0, 2.0)]},
            ValueError,
            r"Muon\(ns_coefficients=\(1.0, 2.0\)\): ns_coefficients must be three",
        ),
        ({"ns_coefficients": [(1.0, 2.0, math.nan)]}, ValueError, r"Muon\(ns_coefficients=nan\)"),
        ({"ns_coefficients": []}, ValueError, r"Muon\(ns_coefficients=\[\]\): ns_coefficients must be three numbers"),
        ({"ns_coefficients": 3.0}, TypeError, r"Muon\(ns_coefficients=3.0\): ns_coefficients must be three numbers"),
        (
            {"variant": "adamuon", "adjust_lr_fn": "original"},
            ValueError,
            r'Muon\(adjust_lr_fn="original"\): adjust_lr_fn must be None for "adamuon"',
        ),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Muon([torch.ones(2, 2, requires_grad=True)], **options)
