# SPDX-License-Identifier: Apache-2.0
"""SOAP against an explicit implementation (Vyas et al. 2024, Algorithms 3 and 4)."""

import pytest
import torch

from lightning_optkit.optimizers import SOAP


def written_out(values, gradients, lr, betas, shampoo, eps, decay, every, largest):
    """W, M and V of the paper for a matrix; L, R and their bases Q_L, Q_R; the first gradient only initializes."""
    w = values.clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    rotates = [size <= largest for size in w.shape]
    left, right = (torch.zeros(size, size, dtype=w.dtype) for size in w.shape)
    bases = [torch.eye(size, dtype=w.dtype) for size in w.shape]
    for t, g in enumerate(gradients):
        w = w - lr * decay * w
        if t > 0:
            m = betas[0] * m + (1 - betas[0]) * g
            rotated = bases[0].T @ g @ bases[1]
            v = betas[1] * v + (1 - betas[1]) * rotated**2
            normed = (bases[0].T @ m @ bases[1]) / (v.sqrt() + eps)
            w = w - lr * (1 - betas[1] ** t) ** 0.5 / (1 - betas[0] ** t) * (bases[0] @ normed @ bases[1].T)
        # Bit for bit: the first statistics have no full rank, and their other eigenvectors hang on the last one.
        left, right = left.lerp(g @ g.T, 1 - shampoo), right.lerp(g.T @ g, 1 - shampoo)
        for side, statistics in enumerate((left, right)):
            if rotates[side] and t == 0:
                bases[side] = torch.linalg.eigh(statistics)[1].flip(1)
            elif rotates[side] and t % every == 0:
                order = torch.diag(bases[side].T @ statistics @ bases[side]).argsort(descending=True)
                v = v.index_select(side, order)
                bases[side] = torch.linalg.qr(statistics @ bases[side][:, order])[0]
    return w, m


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
@pytest.mark.parametrize("largest", [100, 10, 1])  # both sides, one, none
@pytest.mark.parametrize("shape", [(9, 13), (20, 3), (4, 3, 2)], ids=str)
def test_follows_the_algorithm_of_the_paper_over_200_steps(shape, largest, dtype, tolerance):
    torch.manual_seed(0)
    values, gradients = torch.randn(shape, dtype=dtype), torch.randn(200, *shape, dtype=dtype)
    p = values.clone().requires_grad_()
    given = dict(lr=3e-3, betas=(0.8, 0.95), shampoo_beta=0.9, eps=1e-4, weight_decay=0.2, precondition_frequency=7)
    optimizer = SOAP([p], **given, max_precondition_dim=largest)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    matrix, matrices = values.flatten(1), gradients.flatten(2)
    w, m = written_out(matrix, matrices, *given.values(), largest)
    torch.testing.assert_close(p.detach().flatten(1), w, rtol=0, atol=tolerance)
    torch.testing.assert_close(optimizer.state[p]["exp_avg"].flatten(1), m, rtol=0, atol=1e-5)


def test_a_vector_follows_adam_from_the_second_step():
    torch.manual_seed(0)
    values, gradients = torch.randn(7), torch.randn(20, 7)
    p, q = values.clone().requires_grad_(), values.clone().requires_grad_()
    optimizer = SOAP([p], lr=1e-2, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
    adam = torch.optim.Adam([q], lr=1e-2, betas=(0.9, 0.99), eps=0.0)
    for step, g in enumerate(gradients):
        p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        if step > 0:
            adam.step()
    torch.testing.assert_close(p, q, rtol=0, atol=2e-6)


def test_a_rotation_of_the_problem_changes_nothing():
    """Adam depends on the axes; SOAP with both bases does not."""
    torch.manual_seed(0)
    values, gradients = torch.randn(5, 4, dtype=torch.float64), torch.randn(30, 5, 4, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    plain, turned = values.clone().requires_grad_(), (turn @ values).requires_grad_()
    optimizer = SOAP([plain, turned], lr=1e-2, precondition_frequency=1)
    for g in gradients:
        plain.grad, turned.grad = g.clone(), turn @ g
        optimizer.step()
    torch.testing.assert_close(turned.detach(), turn @ plain.detach(), rtol=0, atol=1e-6)


def test_a_transposed_parameter_a_broken_gradient_and_no_elements():
    torch.manual_seed(0)
    plain = torch.randn(6, 4).requires_grad_()
    transposed = plain.detach().T.contiguous().T.requires_grad_()
    optimizer = SOAP([plain, transposed], lr=1e-2, precondition_frequency=2)
    for _ in range(6):
        plain.grad = transposed.grad = torch.randn(6, 4)
        optimizer.step()
    torch.testing.assert_close(plain, transposed, rtol=0, atol=1e-6)
    empty, broken = torch.ones(0, 3, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    optimizer = SOAP([empty, broken])
    empty.grad, broken.grad = torch.ones(0, 3), torch.full((2, 2), float("nan"))
    for _ in range(12):
        optimizer.step()
    assert broken.isnan().all()


def test_complex_parameters_are_refused_and_explain_says_that_it_runs_in_pytorch():
    with pytest.raises(ValueError, match=r"^SOAP\(params=\.\.\.\): every parameter must be real, not complex\.$"):
        SOAP([torch.ones(2, dtype=torch.complex64, requires_grad=True)])
    (plan,) = SOAP([torch.ones(2, 3, requires_grad=True)]).explain().groups
    assert plan.path == "reference: matrix products and decompositions"
