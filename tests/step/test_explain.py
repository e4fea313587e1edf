# SPDX-License-Identifier: Apache-2.0
"""explain(): rule, stages, dtypes, path and bytes of the next step, per group."""

import pytest
import torch

from lightning_optkit._native import extension
from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipUnitwise, ClipValue
from lightning_optkit.optimizers import SGD, Adam, AdamW

COMPILED = f"compiled ({extension.cpu_isa()})" if extension else "reference: no compiled extension"


def param(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize(
    ("optimizer_class", "dtype", "kwargs", "num_bytes"),
    [
        (AdamW, torch.float32, dict(), 28),  # read g p m v, write p m v
        (AdamW, torch.float32, dict(clip=ClipNorm(1.0)), 32),  # and read g once more
        (AdamW, torch.float32, dict(clip=ClipValue(1.0)), 28),
        (AdamW, torch.float32, dict(clip=ClipNorm(1.0), average=EMA()), 40),
        (AdamW, torch.float32, dict(clip=ClipUnitwise(0.1)), 40),  # g twice and p once more
        (AdamW, torch.float32, dict(centralize=True), 32),
        (AdamW, torch.float32, dict(amsgrad=True), 36),
        (AdamW, torch.float32, dict(state_dtype=torch.bfloat16), 20),
        (AdamW, torch.bfloat16, dict(), 22),
        (AdamW, torch.bfloat16, dict(rounding="kahan"), 26),
        (AdamW, torch.bfloat16, dict(rounding="split24"), 24),
        (AdamW, torch.bfloat16, dict(rounding="split32"), 26),
        (AdamW, torch.float32, dict(rounding="split32"), 28),
        (AdamW, torch.float64, dict(), 56),
        (SGD, torch.float32, dict(), 12),
        (SGD, torch.float32, dict(momentum=0.9), 20),
    ],
    ids=str,
)
def test_counts_the_bytes_that_a_step_moves(optimizer_class, dtype, kwargs, num_bytes):
    (plan,) = optimizer_class([param(10, dtype=dtype)], **kwargs).explain().groups
    assert (plan.bytes_per_element, plan.bytes_moved) == (num_bytes, 10 * num_bytes)


def test_lists_the_stages_in_their_order():
    optimizer = AdamW(
        [param(3, dtype=torch.bfloat16)],
        weight_decay=0.1,
        cautious=True,
        centralize=True,
        l1=0.5,
        rounding="stochastic",
        clip=ClipNorm(2.0),
        average=EMA(0.9),
        statistics=True,
    )
    (plan,) = optimizer.explain().groups
    assert plan.stages == (
        "norm",
        "ClipNorm(max_norm=2.0)",
        "centralize",
        "update",
        "cautious decay(0.1)",
        "L1(0.5)",
        "stochastic",
        "EMA(decay=0.9, start=1, every=1)",
        "statistics",
    )


def test_l2_stands_before_the_update_and_decoupled_decay_after():
    assert SGD([param(1)], weight_decay=0.1).explain().groups[0].stages == ("L2(0.1)", "update")
    assert AdamW([param(1)], weight_decay=0.1).explain().groups[0].stages == ("update", "decay(0.1)")


def test_stochastic_rounding_is_listed_only_where_it_acts():
    groups = SGD([param(1), param(1, dtype=torch.bfloat16)], rounding="stochastic").explain().groups
    assert [plan.stages for plan in groups] == [("update",), ("update", "stochastic")]


def test_names_the_rule_and_the_dtypes():
    groups = Adam([dict(params=[param(2)]), dict(params=[param(3)], amsgrad=True)]).explain().groups
    assert [(plan.group, plan.rule, plan.dtype, plan.state_dtype, plan.num_elements) for plan in groups] == [
        (0, "adam", "float32", "float32", 2),
        (1, "adam_amsgrad", "float32", "float32", 3),
    ]


def test_parameters_of_a_group_are_told_apart_by_dtype_and_path():
    gapped = torch.ones(4, 2)[:, 0].detach().requires_grad_()
    params = [param(2), param(3), param(5, dtype=torch.float64), gapped, param(2, dtype=torch.complex64)]
    groups = SGD(params).explain().groups
    rows = [(plan.dtype, plan.path, plan.num_tensors, plan.num_elements) for plan in groups]
    if extension is None:
        assert {path for _, path, _, _ in rows} == {COMPILED}
        return
    assert rows == [
        ("float32", COMPILED, 2, 5),
        ("float64", COMPILED, 1, 5),
        ("float32", "reference: its memory has gaps or overlaps", 1, 4),
        ("complex64", "reference: no kernel for complex64", 1, 2),
    ]


@pytest.mark.skipif(extension is None, reason="no compiled extension")
def test_says_when_plain_pytorch_was_asked_for():
    groups = AdamW([dict(params=[param(1)], fused=False), dict(params=[param(1)])]).explain().groups
    assert [plan.path for plan in groups] == ["reference: fused=False", COMPILED]


def test_says_that_a_sparse_gradient_is_written_out():
    p = param(5, 2)
    with torch.sparse.check_sparse_tensor_invariants():
        p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (5, 2))
    optimizer = SGD([p])
    optimizer.step()
    assert "sparse" in str(optimizer.explain())


def test_can_be_asked_before_and_after_the_first_step_and_changes_nothing(snapshot):
    p = param(4)
    optimizer = AdamW([p], average=EMA())
    before = snapshot(optimizer)
    first = optimizer.explain()
    assert snapshot(optimizer) == before
    p.grad = torch.ones(4)
    optimizer.step()
    assert optimizer.explain() == first


def test_prints_a_block_per_kind_of_group_and_a_total():
    few, many = dict(params=[param(500, 1000)], lr=0.1), dict(params=[param(1000, 1000)])
    lines = str(AdamW([many, few, dict(params=[param(7)], weight_decay=0.0)]).explain()).splitlines()
    assert lines == [
        "lightning_optkit.AdamW",
        "groups 0 to 1: adam",  # they differ in their rates alone
        f"  {COMPILED}",
        "  update > decay(0.01)",
        "  2 tensors, 1,500,000 elements of float32, state in float32",
        "  28 bytes per element, 42.0 MB",
        "group 2: adam",
        f"  {COMPILED}",
        "  update",
        "  1 tensor, 7 elements of float32, state in float32",
        "  28 bytes per element, 0.2 kB",
        "one step moves 42.0 MB",
    ]


@pytest.mark.skipif(extension is None, reason="compiled paths only")
@pytest.mark.parametrize(
    ("options", "gain"),
    [
        (dict(clip=ClipNorm(1.0), average=EMA()), ("in 2 passes", "52.0 kB in 4 passes")),
        (dict(average=EMA()), ("in 1 pass", "40.0 kB in 2 passes")),
        (dict(clip=ClipValue(1.0), l1=0.1), ("in 1 pass", "44.0 kB in 3 passes")),
        (dict(centralize=True), ("in 2 passes", "40.0 kB in 3 passes")),
        (dict(), None),
    ],
    ids=str,
)
def test_says_what_is_gained(options, gain):
    lines = str(AdamW([param(20, 50)], **options).explain()).splitlines()
    if gain is None:
        assert lines[-1].startswith("one step moves") and "pass" not in lines[-1]
    else:
        passes, apart = gain
        assert lines[-2].endswith(f" kB {passes}") and lines[-1] == f"each stage on its own: {apart}"


def test_without_a_compiled_path_nothing_is_gained():
    text = str(AdamW([param(20, 50)], average=EMA(), fused=False).explain())
    assert "on its own" not in text and "  reference: fused=False" in text.splitlines()


def test_fits_80_columns_and_breaks_no_stage():
    clip, average = AutoClip(percentile=10, window=1000), EMA(decay=0.999)
    optimizer = AdamW([param(4, 4)], clip=clip, average=average, l1=1e-3, centralize=True, cautious=True)
    lines = str(optimizer.explain()).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(repr(clip) in line for line in lines) == sum(repr(average) in line for line in lines) == 1


def test_frozen_parameters_are_left_out_and_counted():
    frozen, lazy = param(30).requires_grad_(False), param(20).requires_grad_(False)
    optimizer = AdamW([dict(params=[param(10), frozen]), dict(params=[lazy])])
    explained = optimizer.explain()
    assert [(plan.group, plan.num_tensors, plan.num_elements, plan.bytes_moved) for plan in explained.groups] == [
        (0, 1, 10, 280)
    ]
    assert (explained.num_frozen, explained.num_frozen_elements) == (2, 50)
    assert str(explained).splitlines()[-2:] == ["left out, frozen: 2 tensors, 50 elements", "one step moves 0.3 kB"]

    lazy.requires_grad_()
    explained = optimizer.explain()
    assert [(plan.group, plan.num_elements) for plan in explained.groups] == [(0, 10), (1, 20)]
    assert (explained.num_frozen, explained.num_frozen_elements) == (1, 30)


def test_what_has_a_gradient_is_stepped_whether_or_not_it_asks_for_one():
    p = param(4).requires_grad_(False)
    p.grad = torch.ones(4)
    optimizer = SGD([p])
    assert optimizer.explain().num_frozen == 0
    optimizer.step()
    assert p.tolist() != [1.0] * 4


def test_a_parameter_that_is_frozen_again_is_left_out_although_it_has_state():
    p, q = param(4), param(3)
    optimizer = AdamW([p, q])
    p.grad, q.grad = torch.ones(4), torch.ones(3)
    optimizer.step()
    p.grad = None
    p.requires_grad_(False)
    explained = optimizer.explain()
    assert ([plan.num_elements for plan in explained.groups], explained.num_frozen_elements) == ([3], 4)


def test_nothing_to_step_and_nothing_frozen_are_said_plainly():
    assert str(SGD([param(2).requires_grad_(False)]).explain()).splitlines()[1:] == [
        "left out, frozen: 1 tensors, 2 elements",
        "one step moves 0.0 kB",
    ]
    assert "frozen" not in str(SGD([param(2)]).explain())


@pytest.mark.parametrize(
    ("num_elements", "moved"),
    [(1, "0.0 kB"), (68, "1.9 kB"), (35_000, "980.0 kB"), (36_000, "1.0 MB"), (10**8, "2.8 GB")],
)
def test_sizes_are_in_the_unit_that_fits(num_elements, moved):
    text = str(AdamW([torch.empty(num_elements, device="meta").requires_grad_()]).explain())
    assert text.splitlines()[-1] == f"one step moves {moved}"
    assert text.splitlines()[-2].endswith(f", {moved}")


@pytest.mark.parametrize("fused", [None, False])
def test_the_rows_that_a_sparse_gradient_leaves_out_move_as_by_a_gradient_of_0_and_it_says_so(fused):
    p, q = (torch.ones(4, 2, requires_grad=True) for _ in range(2))
    ours, dense = AdamW([p], lr=0.1, weight_decay=0.1, fused=fused), torch.optim.AdamW([q], lr=0.1, weight_decay=0.1)
    theirs = torch.ones(4, 2, requires_grad=True)
    sparse = torch.optim.SparseAdam([theirs], lr=0.1)
    for row in (1, 2, 2):
        values = torch.sparse_coo_tensor(
            torch.tensor([[row]]), torch.ones(1, 2), (4, 2), is_coalesced=True, check_invariants=True
        )
        p.grad, q.grad, theirs.grad = values, values.to_dense(), values
        last = p[1].detach().clone(), theirs[1].detach().clone()
        for optimizer in (ours, dense, sparse):
            optimizer.step()
    torch.testing.assert_close(p, q)
    assert not torch.equal(p[1], last[0]) and torch.equal(theirs[1], last[1])
    assert (
        ours.explain()
        .groups[0]
        .path.endswith(", its sparse gradient written out first: a row without one has a gradient of 0")
    )
