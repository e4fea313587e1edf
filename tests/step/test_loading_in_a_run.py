# SPDX-License-Identifier: Apache-2.0
"""State dicts loaded at any moment of a run, into any layout of the state."""

import copy

import pytest
import torch

from lightning_optkit.averaging import EMA
from lightning_optkit.clipping import ZClip
from lightning_optkit.optimizers import AdamW
from tests.step.loading_cases import give_gradients, steps, two_groups

LAYOUTS = [
    dict(),
    dict(state_dtype=torch.bfloat16),
    dict(state_dtype="int8"),
    dict(rounding="kahan"),
    dict(average=EMA(0.9)),
    dict(fused=False),
]


@pytest.mark.filterwarnings("ignore:.*continues rounding=.* of the checkpoint as")
@pytest.mark.filterwarnings("ignore:.*average.* is lost")
@pytest.mark.parametrize("to", LAYOUTS, ids=str)
@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_any_layout_loads_into_any_other_and_shares_no_memory(source, to, snapshot):
    first, params = two_groups(AdamW, torch.bfloat16, **source)
    steps(first, params, range(3))
    second, loaded = two_groups(AdamW, torch.bfloat16, **to)
    saved = first.state_dict()
    before = snapshot(first)
    for _ in range(2):  # two in a row
        second.load_state_dict(saved)
    twin, copied = copy.deepcopy((second, loaded))
    steps(second, loaded, [3])
    steps(twin, copied, [3])
    assert snapshot(first) == before
    assert snapshot(twin) == snapshot(second)
    assert {t.dtype for t in (second.state[loaded[0]][n] for n in ("exp_avg", "exp_avg_sq"))} == {
        {"int8": torch.uint8}.get(second.state_dtype, second.state_dtype)
    }


def test_its_own_state_dict_is_loaded_into_memory_of_its_own():
    optimizer, params = two_groups(AdamW, torch.float32)
    steps(optimizer, params, range(2))
    saved = optimizer.state_dict()
    kept = {name: t.clone() for name, t in saved["state"][0].items()}
    optimizer.load_state_dict(saved)
    steps(optimizer, params, [2])
    assert all(torch.equal(saved["state"][0][name], t) for name, t in kept.items())


def test_states_that_share_a_tensor_are_apart_afterwards():
    optimizer, params = two_groups(AdamW, torch.float32)
    steps(optimizer, params, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    shared = torch.tensor(2.0, requires_grad=True)
    for entries in saved["state"].values():
        entries["step"], entries["exp_avg_sq"] = shared, entries["exp_avg"].requires_grad_()
    optimizer.load_state_dict(saved)
    steps(optimizer, params, [2])
    assert [optimizer.state[p]["step"].item() for p in params[:2]] == [3.0, 3.0]
    assert not any(t.requires_grad for state in optimizer.state.values() for t in state.values())


def test_loads_between_two_backward_passes_and_under_inference_mode(snapshot):
    first, params = two_groups(AdamW, torch.float32, lr=torch.tensor(0.1), clip=ZClip())
    steps(first, params, range(3))
    plain, one = two_groups(AdamW, torch.float32, clip=ZClip())
    plain.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.inference_mode():
        saved = copy.deepcopy(first.state_dict())
        for entries in saved["state"].values():
            entries.update({name: t.clone() for name, t in entries.items()})  # tensors of that mode
    second, two = two_groups(AdamW, torch.float32, clip=ZClip())
    give_gradients(two, 3)
    grads = [p.grad.clone() for p in two[:2]]
    with torch.inference_mode():
        second.load_state_dict(saved)
    assert all(torch.equal(p.grad, g) for p, g in zip(two, grads, strict=False))
    for optimizer, each in ((plain, one), (second, two)):
        optimizer.param_groups[0]["lr"].mul_(0.5)
        steps(optimizer, each, range(3, 6))
    assert snapshot(second) == snapshot(plain)


def test_hooks_are_called_in_the_order_of_torch_and_may_hand_over_another_state_dict():
    calls = {}
    for optimizer_class in (AdamW, torch.optim.AdamW):
        optimizer, _ = two_groups(optimizer_class)
        good, called = optimizer.state_dict(), calls.setdefault(optimizer_class, [])
        optimizer.register_load_state_dict_post_hook(lambda o, called=called: called.append("after"))
        optimizer.register_load_state_dict_pre_hook(lambda o, d, called=called: called.append(sorted(d)))
        optimizer.register_load_state_dict_pre_hook(
            lambda o, d, good=good, called=called: called.append("first") or good, prepend=True
        )
        optimizer.load_state_dict({"not": "yet"})
    assert calls[AdamW][0::2] == calls[torch.optim.AdamW][0::2] == ["first", "after"]


def test_a_hook_that_raises_before_anything_is_read_leaves_all_as_it_was(snapshot):
    optimizer, params = two_groups(AdamW)
    steps(optimizer, params, range(2))
    before = snapshot(optimizer)

    def stop(optimizer, state_dict):
        raise KeyError("stop")

    optimizer.register_load_state_dict_pre_hook(stop)
    with pytest.raises(KeyError, match="stop"):
        optimizer.load_state_dict(two_groups(AdamW)[0].state_dict())
    assert snapshot(optimizer) == before


def test_a_clip_of_a_user_that_fails_half_way_is_not_half_changed(snapshot):
    class Fragile(ZClip):
        def load_state_dict(self, state_dict):
            self.alpha = 0.0
            raise KeyError("learned")

    optimizer, params = two_groups(AdamW, clip=Fragile())
    steps(optimizer, params, range(2))
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"^AdamW\.load_state_dict\(state_dict=\.\.\.\): 'clip' must be what Fragile\("
    ):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert snapshot(optimizer) == before
    assert optimizer.clip.alpha == 0.97


def test_counters_go_on():
    optimizer, params = two_groups(AdamW)
    steps(optimizer, params, range(3))
    optimizer.load_state_dict(two_groups(AdamW)[0].state_dict())
    assert optimizer.num_steps == 3
