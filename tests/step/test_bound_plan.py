# SPDX-License-Identifier: Apache-2.0
"""The compiled plan as any caller may use it: right results for valid calls, clear errors for others."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from lightning_optkit._native import extension, node

pytestmark = pytest.mark.skipif(extension is None, reason="no compiled extension")

ADAM = dict(states=["exp_avg", "exp_avg_sq"], scales=["exp_avg_scale", "exp_avg_sq_scale"], scalars=[], average=None)
FIELDS = len(extension.GROUP_FIELDS) if extension is not None else 0
ROW = [0.1, *[0.0] * (FIELDS - 1), 0.9, 0.999, 1e-8]
BOUNDS = [extension.GROUP_FIELDS.index(name) for name in ("clip_value", "clip_tensor_norm", "clip_unit_ratio")]
for place in BOUNDS:
    ROW[place] = float("inf")


def row(**fields):
    values = list(ROW)
    for name, value in fields.items():
        values[extension.GROUP_FIELDS.index(name)] = value
    return values


def adam_state(**other):
    return {"exp_avg": torch.zeros(8), "exp_avg_sq": torch.zeros(8), "step": torch.zeros(()), **other}


def add(plan, param=None, state=None, **other):
    param = torch.zeros(8) if param is None else param
    state = adam_state() if state is None else state
    plan.add_tensor(param=param, state=state, **{**ADAM, **dict(unsigned_states=0, group=0, tensor_index=0), **other})
    return param, state


def bound(**other):
    plan = extension.Plan("adam", False, -1)
    param, state = add(plan, **other)
    plan.set_active([0])
    grad = torch.ones(8)
    assert plan.bind([param], [state], [grad]) == -1
    return plan, param, state, grad


def test_a_step_in_the_right_order():
    plan, param, state, _ = bound()
    assert plan.norm() == (8.0, 0.0)
    plan.step([ROW], 1.0, True)
    torch.testing.assert_close(param, torch.full((8,), -0.1))
    assert state["step"] == 1
    assert len(plan.sums()) == 1


ORDERS = {
    "step before bind": lambda p: p.step([ROW], 1.0, False),
    "norm before bind": lambda p: p.norm(),
    "check before bind": lambda p: p.check(),
    "bind before set_active": lambda p: p.bind([], [], []),
    "no such tensor": lambda p: p.set_active([0]),
    "a CUDA step of a plan for the CPU": lambda p: p.cuda_norm(torch.zeros(2, dtype=torch.float64), 0),
}


@pytest.mark.parametrize("order", ORDERS)
def test_calls_in_another_order_are_refused(order):
    with pytest.raises(ValueError, match=r"^Plan\.\w+.*\.$"):
        ORDERS[order](extension.Plan("adam", False, -1))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "one row for each group"),
        ([ROW[:-1]], "must hold"),
        ([[*ROW, 0.0]], "must hold"),
        ([row(rounding=5.0)], "rounding"),
        ([row(rounding=float("nan"))], "rounding"),
        ([row(average_kind=1.0)], "average_kind"),
        ([row(average_kind=-1.0)], "average_kind"),
        ([row(clip_tensor_norm=1.0)], "needs norm to be called before"),
    ],
)
def test_rows_that_the_tensors_cannot_be_walked_with_are_refused(rows, message, frozen):
    plan, param, state, _ = bound()
    before = frozen([param, state])
    with pytest.raises(ValueError, match=message):
        plan.step(rows, 1.0, False)
    assert frozen([param, state]) == before


def changed(**state):
    return dict(state={name: t for name, t in adam_state(**state).items() if t is not None})


TENSORS = {
    "group -1": dict(group=-1),
    "tensor_index -1": dict(tensor_index=-1),
    "an int parameter": dict(param=torch.zeros(8, dtype=torch.int32)),
    "an fp64 parameter": dict(param=torch.zeros(8, dtype=torch.float64)),
    "a parameter of codes": dict(param=torch.zeros(8, dtype=torch.uint8)),
    "a gapped parameter": dict(param=torch.zeros(16)[::2]),
    "an expanded parameter": dict(param=torch.zeros(1).expand(8)),
    "a meta parameter": dict(param=torch.zeros(8, device="meta")),
    "a wrapped parameter": dict(param=TwoTensor(torch.zeros(8), torch.zeros(8))),
    "no parameter": dict(param="weight"),
    "a short state": changed(exp_avg=torch.zeros(7)),
    "a state in another dtype": changed(exp_avg=torch.zeros(8, dtype=torch.float64)),
    "states in two dtypes": changed(exp_avg=torch.zeros(8).bfloat16()),
    "a gapped state": changed(exp_avg=torch.zeros(16)[::2]),
    "a missing state": changed(exp_avg=None),
    "no step": changed(step=None),
    "two steps": changed(step=torch.zeros(2)),
    "an fp64 step": changed(step=torch.zeros((), dtype=torch.float64)),
    "a number for a step": changed(step=1.0),
    "codes without scales": changed(exp_avg=torch.zeros(8).byte(), exp_avg_sq=torch.zeros(8).byte()),
    "codes with short scales": changed(
        exp_avg=torch.zeros(8).byte(),
        exp_avg_sq=torch.zeros(8).byte(),
        exp_avg_scale=torch.zeros(0),
        exp_avg_sq_scale=torch.zeros(1),
    ),
    "codes with bf16 scales": changed(
        exp_avg=torch.zeros(8).byte(),
        exp_avg_sq=torch.zeros(8).byte(),
        exp_avg_scale=torch.zeros(1).bfloat16(),
        exp_avg_sq_scale=torch.zeros(1),
    ),
    "a compensation in another dtype": changed(compensation=torch.zeros(8).bfloat16()),
    "an average that is not there": dict(average="ema"),
    "an average without a count": dict(average="ema", **changed(ema=torch.zeros(8))),
    "an average in another shape": dict(average="ema", **changed(ema=torch.zeros(4), num_averaged=torch.zeros(()))),
    "too few names": dict(states=["exp_avg"]),
    "too many numbers": dict(scalars=["a", "b", "c"]),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_the_rule_cannot_walk_are_refused(what):
    plan = extension.Plan("adam", False, -1)
    with pytest.raises(ValueError, match=r"^Plan\.add_tensor\(.*\.$"):
        add(plan, **TENSORS[what])
    with pytest.raises(ValueError, match="indices of tensors"):
        plan.set_active([0])  # nothing was added


@pytest.fixture(params=["by headers", "by exchange"])
def look(request):
    """Both ways to look at a tensor: by torch's headers, and by the exchange API, without them."""
    if request.param == "by headers" and node is None:
        pytest.skip("no look by torch's headers")
    extension.use_look(node.look if request.param == "by headers" else None)
    yield
    extension.use_look(None if node is None else node.look)


def test_a_tensor_whose_storage_is_shorter_than_its_shape_is_refused(look):
    param = torch.zeros(1000)
    param.untyped_storage().resize_(40)
    state = adam_state(exp_avg=torch.zeros(1000), exp_avg_sq=torch.zeros(1000))
    with pytest.raises(ValueError, match=r"^Plan\.add_tensor\(param=\.\.\.\): has less memory"):
        add(extension.Plan("adam", False, -1), param=param, state=state)


def test_a_gradient_whose_storage_became_shorter_is_not_bound_again(look):
    plan = extension.Plan("adam", False, -1)
    param, state = add(plan)
    plan.set_active([0])
    for offset in (0, 3):  # of the gradient in its storage
        whole = torch.ones(8 + offset)
        grad = whole[offset:]
        assert plan.bind([param], [state], [grad], 0) == -1
        plan.step([ROW], 1.0, False)
        whole.untyped_storage().resize_(4 * (7 + offset))
        assert plan.bind([param], [state], [grad], 0) == 0
        whole.untyped_storage().resize_(4 * (8 + offset))
        whole.fill_(1.0)
        assert plan.bind([param], [state], [grad], 0) == -1


def test_a_storage_that_is_back_at_its_address_and_shorter_is_seen(look):
    returned = False
    for size in 20 * (300, 1000, 3000):
        param, grad = torch.zeros(size), torch.ones(size)
        plan = extension.Plan("adam", False, -1)
        add(plan, param, adam_state(exp_avg=torch.zeros(size), exp_avg_sq=torch.zeros(size)))
        plan.set_active([0])
        before = grad.data_ptr()
        assert plan.bind([param], [{}], [grad], 0) == -1
        for length in (size - 1, size - 2):  # each time it moves
            grad.untyped_storage().resize_(4 * length)
        returned |= grad.data_ptr() == before
        assert plan.bind([param], [{}], [grad], 0) == 0
    if not returned:
        pytest.skip("the allocator gave no address twice")


GRADIENTS = {
    "short": torch.ones(7),
    "in two dimensions": torch.ones(8, 1),
    "fp64": torch.ones(8, dtype=torch.float64),
    "bytes": torch.ones(8).byte(),
    "gapped": torch.ones(16)[::2],
    "meta": torch.ones(8, device="meta"),
    "none": None,
}


@pytest.mark.parametrize("what", GRADIENTS)
def test_the_place_of_a_gradient_that_does_not_fit_is_told(what):
    plan = extension.Plan("adam", False, -1)
    members = [add(plan, tensor_index=i) for i in range(3)]
    plan.set_active([0, 1, 2])
    params, states = zip(*members, strict=True)
    grads = [torch.ones(8), GRADIENTS[what], torch.ones(8)]
    assert plan.bind(list(params), list(states), grads) == 1
    with pytest.raises(ValueError, match="call bind before"):
        plan.step([ROW], 1.0, False)
    grads[1] = torch.ones(8)
    with pytest.raises(ValueError, match="those before it"):
        plan.bind(list(params), list(states), grads, 2)
    assert plan.bind(list(params), list(states), grads, 1) == -1
    plan.step([ROW], 1.0, False)
    assert all((p == params[0]).all() for p in params)


@pytest.mark.parametrize("lists", [([], [], []), ([1], [1], []), ([1, 1], [1, 1], [1, 1])])
def test_lists_of_another_length_are_refused(lists):
    plan, param, state, grad = bound()
    make = {0: param, 1: state, 2: grad}
    with pytest.raises(ValueError, match=r"^Plan\.bind: needs lists"):
        plan.bind(*([make[k]] * len(given) for k, given in enumerate(lists)))


@pytest.mark.parametrize("call", ["step", "check", "norm"])
@pytest.mark.parametrize("what", ["gradient", "parameter", "state", "list", "dict"])
def test_what_moved_after_it_was_bound_is_seen_before_the_walk(what, call):
    plan = extension.Plan("adam", False, -1)
    param, state = add(plan)
    plan.set_active([0])
    params, states, grads = [param], [state], [torch.ones(8)]
    plan.bind(params, states, grads)
    if what == "list":
        grads.clear()
    elif what == "dict":
        state.clear()
    else:
        t = {"gradient": grads[0], "parameter": param, "state": state["exp_avg"]}[what]
        t.data = t.data.clone()
    calls = {"step": lambda: plan.step([ROW], 1.0, False), "check": plan.check, "norm": plan.norm}
    if call == "norm" and what in ("parameter", "state", "dict"):
        assert plan.norm() == (8.0, 0.0)  # it reads the gradients alone
        return
    with pytest.raises(extension.Moved, match="was moved or replaced while the step ran"):
        calls[call]()


def test_active_tensors_are_those_of_the_plan_in_order():
    plan = extension.Plan("adam", False, -1)
    for i in range(2):
        add(plan, tensor_index=i)
    for indices in ([2], [-1], [1, 0], [0, 0], [0, 1, 2]):
        with pytest.raises(ValueError, match=r"^Plan\.set_active"):
            plan.set_active(indices)


def test_other_entries_refuse_what_is_no_tensor_of_theirs(look):
    for wrong in (None, 3, torch.ones(3, device="meta"), torch.ones(1).expand(10_000)):
        with pytest.raises(ValueError, match=r"^advise_huge_pages\(tensor=\.\.\.\)"):
            extension.advise_huge_pages(wrong)
    with pytest.raises(ValueError, match=r"^use_look\(capsule"):
        extension.use_look(torch.Tensor.__dlpack_c_exchange_api__)
    with pytest.raises(ValueError, match=r"^Membership\(entries"):
        extension.Membership({}, [[1]], [torch.ones(1)])
    with pytest.raises(ValueError, match=r"^Membership\(lists"):
        extension.Membership({}, [(1,)], [])
