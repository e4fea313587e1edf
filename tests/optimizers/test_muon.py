# SPDX-License-Identifier: Apache-2.0
"""Muon against torch.optim.Muon for matrices and AdamW for the rest, alone and together, and on real data."""

import copy

import pytest
import torch
from torch import nn

from lightning_optkit.clipping import ClipPerTensor
from lightning_optkit.optimizers import AdamW, Muon, _newton_schulz
from lightning_optkit.optimizers._newton_schulz import orthogonalize
from lightning_optkit.optimizers.convert import from_torch_, to_torch_

SHAPES = [(8, 5), (5, 8), (6, 6), (1, 7), (33, 70)]
HYPERPARAMETERS = [
    dict(),
    dict(momentum=0.5, nesterov=False, adjust_lr_fn="match_rms_adamw"),
    dict(momentum=0.0, weight_decay=0.0, ns_steps=2),
    dict(nesterov=False, weight_decay=0.0, ns_steps=0),
    dict(adjust_lr_fn="original", ns_coefficients=(2.0, -1.5, 0.5), eps=1e-3),
]


def lists(dtype, count, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [[value.to(dtype).clone().requires_grad_() for value in values] for _ in range(count)]


@pytest.fixture
def products_of_torch(monkeypatch):
    """torch multiplies in bf16 on any CPU, and rounds at other points."""
    monkeypatch.setattr(_newton_schulz, "has_bf16_products", lambda: True)


@pytest.mark.usefixtures("products_of_torch")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS, ids=str)
def test_follows_torch_for_fifty_steps(hyperparameters, dtype, tolerance, train):
    ours, theirs = lists(dtype, 2)
    one, other = Muon(ours, lr=0.02, **hyperparameters), torch.optim.Muon(theirs, lr=0.02, **hyperparameters)
    train([one, other], [ours, theirs], steps=50)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.state[p]["momentum_buffer"], other.state[q]["momentum_buffer"])


@pytest.mark.parametrize("in_bf16", [True, False])
@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS, ids=str)
def test_follows_torch_within_the_rounding_of_the_iterations(hyperparameters, in_bf16, train, monkeypatch):
    """Batched products of bf16 matrices may add up in another order: some 2**-8 of a step of length lr."""
    monkeypatch.setattr(_newton_schulz, "has_bf16_products", lambda: in_bf16)
    ours, theirs = lists(torch.float32, 2, [(8, 5), (8, 5), (5, 8), (5, 8), (64, 64), (64, 64), (33, 70)])
    one, other = Muon(ours, lr=0.02, **hyperparameters), torch.optim.Muon(theirs, lr=0.02, **hyperparameters)
    train([one, other], [ours, theirs], steps=50)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=50 * 0.02 * 2**-8)


def test_matrices_go_a_few_at_a_time_and_each_gets_its_own_update(train, monkeypatch):
    together, apart = lists(torch.float32, 2, [(8, 5), (5, 8), (8, 5), (8, 5), (5, 8), (8, 5), (8, 5)])
    optimizers, sizes = [Muon(params, lr=0.02, clip=ClipPerTensor(0.5)) for params in (together, apart)], []

    def counted(matrices, *iteration):
        sizes.append(tuple(matrices.shape))
        return orthogonalize(matrices, *iteration)

    monkeypatch.setattr(_newton_schulz, "orthogonalize", counted)
    train(optimizers[:1], [together], steps=5)
    assert set(sizes) == {(5, 8, 5), (2, 5, 8)}
    sizes.clear()
    monkeypatch.setattr(_newton_schulz, "_BATCH", 2 * 40 + 1)
    train(optimizers[1:], [apart], steps=5)
    assert set(sizes) == {(2, 8, 5), (1, 8, 5), (2, 5, 8)}
    torch.testing.assert_close(together, apart, rtol=0, atol=5 * 0.02 * 2**-8)
    assert optimizers[0].num_clipped == optimizers[1].num_clipped == 5
    assert optimizers[0].grad_norm_clipped == pytest.approx(optimizers[1].grad_norm_clipped)


STACKS = [(4, 8, 5), (3, 5, 8), (2, 6, 6), (1, 9, 4), (4, 8, 5)]


@pytest.mark.parametrize("hyperparameters", HYPERPARAMETERS, ids=str)
@pytest.mark.parametrize("at_once", [2**19, 2 * 40])
def test_a_stack_moves_as_its_matrices_one_by_one(hyperparameters, at_once, train, monkeypatch):
    monkeypatch.setattr(_newton_schulz, "_BATCH", at_once)
    (ours,) = lists(torch.float32, 1, STACKS)
    with torch.no_grad():
        theirs = [matrix.clone().requires_grad_() for stack in ours for matrix in stack]
    one = Muon(ours, lr=0.02, stacked=True, **hyperparameters)
    other = torch.optim.Muon(theirs, lr=0.02, **hyperparameters)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for stack in ours:  # the author's point: matrices of very different gradients get updates of the same size
            sizes = 10.0 ** -torch.arange(2.0 * len(stack))[::2].view(-1, 1, 1)
            stack.grad = torch.randn(stack.shape, generator=generator) * sizes
        for p, g in zip(theirs, [g for stack in ours for g in stack.grad], strict=True):
            p.grad = g.clone()
        one.step()
        other.step()
    torch.testing.assert_close([m for stack in ours for m in stack.unbind()], theirs, rtol=0, atol=10 * 0.02 * 2**-8)


def test_a_stack_of_three_dimensions_alone_is_taken_apart_and_the_explanation_says_so():
    params = [torch.zeros(s, requires_grad=True) for s in [(4, 6, 6), (6, 6), (6, 3, 2, 2), (5,)]]
    rows = {(g.path.partition("; ")[2], g.num_tensors) for g in Muon(params, stacked=True).explain().groups}
    assert {("each stack by its matrices", 1), ("flattened to [first, rest]", 1)} < rows
    rows = {(g.path.partition("; ")[2], g.num_tensors) for g in Muon(params).explain().groups}
    assert ("flattened to [first, rest]", 2) in rows
    updates = []
    for stacked in (False, True):
        p = torch.zeros(4, 6, 6, requires_grad=True)
        p.grad = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
            [1.0, 1e-2, 1e-4, 1e-6]
        ).view(4, 1, 1)
        Muon([{"params": [p], "stacked": stacked}], lr=1.0, weight_decay=0.0).step()
        updates.append(p.detach().flatten(1).norm(dim=1))
    assert updates[0].min() < 0.1 * updates[0].max() and updates[1].min() > 0.7 * updates[1].max()


def test_a_stack_resumes_in_its_group_and_a_state_dict_from_before_loads():
    (params,) = lists(torch.float32, 1, [(4, 8, 5)])
    optimizer = Muon(params, lr=0.02, stacked=True)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["stacked"]
    resumed = Muon([params[0].detach().clone().requires_grad_()], lr=0.5, stacked=True)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["stacked"] is True and resumed.param_groups[0]["lr"] == 0.02
    with pytest.raises(ValueError, match=r"^Muon\(stacked=2\): stacked must be "):
        Muon(params, stacked=2)


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 3), (2, 3, 0)], ids=str)
def test_empty_stacks_are_left_alone_beside_others(shape):
    params = [torch.ones(s, requires_grad=True) for s in (shape, shape, (2, 3, 3))]
    for p in params:
        p.grad = torch.ones_like(p)
    Muon(params, stacked=True).step()
    assert params[2].max() < 1


def test_singular_values_move_towards_one_and_vectors_stay():
    torch.manual_seed(0)
    matrices = torch.randn(3, 20, 12)
    made = orthogonalize(matrices, (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    values = torch.linalg.svdvals(made)
    assert 0.5 < values.min() < values.max() < 1.35
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert (u * made.matmul(v.mT)).sum(1).min() > 0.5  # the vectors of each value are still those of the matrix


def test_matrices_and_the_rest_move_as_by_two_optimizers(train):
    shapes = [(8, 5), (5,), (), (4, 3, 2, 2), (6, 6)]
    ours, theirs = lists(torch.float64, 2, shapes)
    one = Muon(ours, lr=0.02, adamw_lr=0.01, adamw_weight_decay=0.3, weight_decay=0.2)
    assert [(g["use_muon"], len(g["params"]), g["lr"], g["weight_decay"]) for g in one.param_groups] == [
        (True, 3, 0.02, 0.2),
        (False, 2, 0.01, 0.3),
    ]
    flat = theirs[3].detach().flatten(1).requires_grad_()
    muon = torch.optim.Muon([theirs[0], theirs[4], flat], lr=0.02, weight_decay=0.2)
    adamw = torch.optim.AdamW(theirs[1:3], lr=0.01, betas=(0.9, 0.95), weight_decay=0.3)
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        flat.grad = ours[3].grad.flatten(1)
        for optimizer in (one, muon, adamw):
            optimizer.step()
    theirs[3] = flat.view(shapes[3])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_names_and_groups_say_what_is_no_matrix():
    model = nn.ModuleDict(dict(embed=nn.Embedding(9, 4), body=nn.Linear(4, 4), head=nn.Linear(4, 9)))
    by_name = Muon(model.named_parameters(), adamw_params=["^embed", "head"])
    assert [g["param_names"] for g in by_name.param_groups] == [
        ["body.weight"],
        ["embed.weight", "body.bias", "head.weight", "head.bias"],
    ]
    rest = [*model["embed"].parameters(), *model["head"].parameters()]
    groups = [dict(params=model["body"].parameters(), lr=0.1), dict(params=rest, use_muon=False, lr=0.3)]
    by_group = Muon(groups, adamw_lr=0.2)
    assert [(g["use_muon"], g["lr"], len(g["params"])) for g in by_group.param_groups] == [
        (True, 0.1, 1),
        (False, 0.2, 1),
        (False, 0.3, 3),
    ]


@pytest.mark.usefixtures("products_of_torch")
@pytest.mark.parametrize("other_first", [False, True])
def test_state_dicts_are_exchangeable_with_torch(other_first, train):
    ours, theirs = lists(torch.float32, 2)
    first, second = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02)
    train([first, second], [ours, theirs], steps=5)
    if other_first:
        resumed = Muon([p.detach().clone().requires_grad_() for p in theirs], lr=0.5)
        resumed.load_state_dict(second.state_dict())
    else:
        resumed = torch.optim.Muon([p.detach().clone().requires_grad_() for p in ours], lr=0.5)
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))  # torch keeps the tensors that it is given
    third = resumed.param_groups[0]["params"]
    train([first, second, resumed], [ours, theirs, third], steps=5, seed=2)
    torch.testing.assert_close(third, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.usefixtures("products_of_torch")
def test_converts_and_back(train):
    ours, theirs = lists(torch.float32, 2)
    one, other = torch.optim.Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02)
    groups = [set(group) for group in one.param_groups]
    train([one, other], [ours, theirs], steps=3)
    from_torch_(one)
    assert isinstance(one, Muon)
    train([one, other], [ours, theirs], steps=3, seed=2)
    to_torch_(one)
    assert type(one) is torch.optim.Muon
    assert [set(group) for group in one.param_groups] == groups
    train([one, other], [ours, theirs], steps=3, seed=3)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def build(params, **kwargs):
    return Muon(params, lr=0.01, adamw_lr=1e-3, **kwargs)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
def test_the_rest_takes_either_path_with_a_clip_and_an_average(paths_agree, dtype, tolerance):
    paths_agree(build, dtype, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "stages", [dict(rounding="kahan"), dict(rounding="stochastic"), dict(l1=0.1), dict(cautious=True)], ids=str
)
def test_stages_act_on_matrices(stages, paths_agree):
    paths_agree(lambda params, **kwargs: build(params, **stages, **kwargs), torch.bfloat16, rtol=0.05, atol=0.05)
    plain, staged = lists(torch.bfloat16, 2, [(16, 9)])
    optimizers = [build(plain), build(staged, **stages)]
    for p, optimizer in zip((plain[0], staged[0]), optimizers, strict=True):
        for g in torch.randn(9, 16, 9, generator=torch.Generator().manual_seed(0)):
            p.grad = g.bfloat16()
            optimizer.step()
    assert not torch.equal(plain[0], staged[0])


def test_the_momentum_may_be_in_16_bits_and_is_counted():
    p = torch.randn(16, 9, requires_grad=True)
    optimizer = Muon([p], state_dtype=torch.bfloat16, statistics=True)
    p.grad = torch.randn(16, 9)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.bfloat16
    assert optimizer.statistics()[0].grad_norm == pytest.approx(p.grad.norm().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit(resumes, dtype):
    resumes(build, dtype)


def test_says_which_path_it_takes():
    model = nn.Linear(3, 4)
    matrices, rest = Muon(model.parameters()).explain().groups
    assert (matrices.rule, matrices.path) == ("muon", "reference: matrix products, batched over equal shapes")
    assert rest.rule == AdamW(model.parameters()).explain().groups[0].rule == "adam"
    assert rest.path == AdamW(model.parameters()).explain().groups[0].path


def test_learns_the_digits(digits_loss):
    def model():
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    loss = digits_loss(lambda params: Muon(params, lr=0.1, adamw_lr=1e-2), steps=100, model=model)
    assert loss < 0.1


@pytest.mark.parametrize(
    "kwargs",
    [dict(lr=-1.0), dict(momentum=-1.0), dict(weight_decay=-1.0), dict(adjust_lr_fn="other"), dict(lr=torch.ones(2))],
    ids=str,
)
def test_refuses_what_torch_refuses_by_the_same_exception(kwargs):
    with pytest.raises(ValueError) as theirs:
        torch.optim.Muon([torch.ones(2, 2, requires_grad=True)], **kwargs)
    with pytest.raises(theirs.type, match=r"^Muon\("):
        Muon([torch.ones(2, 2, requires_grad=True)], **kwargs)


def test_a_later_group_must_be_of_one_kind():
    matrix, vector = torch.ones(2, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = Muon([torch.ones(2, 2, requires_grad=True)], lr=0.5, adamw_lr=0.25)
    with pytest.raises(ValueError, match=r"^Muon\(params=\.\.\.\): matrices and others need two groups\.$"):
        optimizer.add_param_group(dict(params=[matrix, vector]))
    with pytest.raises(ValueError, match=r"^Muon\(use_muon=True\): every parameter must be a real matrix\.$"):
        optimizer.add_param_group(dict(params=[vector], use_muon=True))
    optimizer.add_param_group(dict(params=[vector]))
    optimizer.add_param_group(dict(params=[matrix]))
    assert [(g["use_muon"], g["lr"]) for g in optimizer.param_groups] == [(True, 0.5), (False, 0.25), (True, 0.5)]


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (33, 70)], ids=str)
@pytest.mark.parametrize("power", [40, 64, 80, 110])
def test_large_gradients_are_orthogonalized_like_any_others(power, shape):
    torch.manual_seed(0)
    grad, results = torch.randn(shape), []
    for scale in (1.0, 2.0**power):
        p = torch.zeros(shape, requires_grad=True)
        p.grad = grad * scale
        Muon([p], lr=1.0, weight_decay=0.0).step()
        results.append(p.detach())
    assert results[0].abs().max() > 0.1
    assert torch.equal(*results)


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)], ids=str)
def test_an_empty_matrix_is_left_alone_beside_others(shape):
    empty, matrix, alone = torch.ones(shape), torch.ones(2, 3), torch.ones(2, 3)
    for p in (empty, matrix, alone):
        p.requires_grad_().grad = torch.linspace(-1, 1, p.numel()).view(p.shape)
    Muon([empty, matrix]).step()
    Muon([alone]).step()
    assert empty.shape == shape and torch.equal(matrix, alone) and not torch.equal(alone, torch.ones(2, 3))
