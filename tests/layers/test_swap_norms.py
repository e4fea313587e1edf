# SPDX-License-Identifier: Apache-2.0
"""swap_norms: which layers are converted, by behavior, with the same weights, and undone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_optkit.layers import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    LayerNorm,
    NormSwap,
    NormSwaps,
    RMSNorm,
    swap_norms,
)


class TwiceRoundedRMSNorm(nn.Module):
    """Written as in Llama."""

    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class OneMoreRMSNorm(TwiceRoundedRMSNorm):
    """Written as in Gemma."""

    def forward(self, x):
        return super().forward(x) * (1 + self.weight) / self.weight


class LateEpsRMSNorm(TwiceRoundedRMSNorm):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-2)


class ColumnLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.transpose(-1, -2)).transpose(-1, -2)


CLASSES = {"layer": (nn.LayerNorm, LayerNorm), "rms": (nn.RMSNorm, RMSNorm)}


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("arguments", [dict(), dict(eps=1e-3), dict(elementwise_affine=False)])
def test_torchs_layers_become_ours_in_place_and_back(kind, arguments):
    before, after = CLASSES[kind]
    model = nn.Sequential(nn.Linear(4, 300), before(300, **arguments))
    norm, x = model[1], torch.randn(80, 4)
    expected, attributes, parameters = model(x), dict(vars(norm)), list(model.parameters())
    swaps = swap_norms(model, kind)
    assert isinstance(swaps, NormSwaps) and isinstance(swaps.rows[0], NormSwap)
    assert model[1] is norm and type(norm) is after
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(x), expected)
    swaps.undo()
    swaps.undo()
    assert type(norm) is before and dict(vars(norm)) == attributes
    assert torch.equal(model(x), expected)


def test_hooks_training_flag_and_dtype_are_kept():
    model, calls = nn.Sequential(nn.LayerNorm(8)).double().eval(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    swap_norms(model, "layer")
    assert model(torch.ones(2, 8).double()).dtype == torch.float64 and calls == [1] and not model[0].training


def test_layers_of_others_are_recognized_by_their_numbers():
    model = nn.ModuleDict(
        {"llama": TwiceRoundedRMSNorm(8), "gemma": OneMoreRMSNorm(8), "late": LateEpsRMSNorm(8), "norm": nn.RMSNorm(8)}
    )
    rows = {row.name: row for row in swap_norms(model, "rms").rows}
    assert isinstance(model["llama"], RMSNorm) and isinstance(model["llama"], TwiceRoundedRMSNorm)
    assert "rounded once, not twice" in rows["llama"].note and rows["norm"].note == "same mathematics"
    for name in ("gemma", "late"):
        assert rows[name].after is None and "numbers differ in torch.float32" in rows[name].note
        assert not isinstance(model[name], RMSNorm)
    assert swap_norms(model, "layer").rows == []


def test_a_layer_of_others_keeps_what_it_returns_for_mixed_dtypes():
    norm, x = TwiceRoundedRMSNorm(8), torch.randn(3, 8).bfloat16()
    nn.init.normal_(norm.weight)
    expected = norm(x)
    swap_norms(norm, "rms")
    assert expected.dtype == torch.float32 and torch.equal(norm(x), expected)


def test_the_probe_touches_neither_generator_nor_hooks_nor_meta_weights():
    with torch.device("meta"):
        norm = TwiceRoundedRMSNorm(8)
    norm.register_forward_hook(lambda *_: pytest.fail("hook ran"))
    state = torch.get_rng_state()
    assert len(swap_norms(norm, "rms").swapped) == 1
    assert norm.weight.is_meta and torch.equal(torch.get_rng_state(), state)


def test_swapped_layers_of_others_are_copied_and_pickled():
    norm, x = TwiceRoundedRMSNorm(8), torch.randn(3, 8)
    swap_norms(norm, "rms")
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(twin) is type(norm) and torch.equal(twin(x), norm(x))


def test_what_cannot_be_swapped_is_left_alone_with_the_reason():
    replaced = nn.LayerNorm(8)
    replaced.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "replaced": replaced,
            "parametrized": parametrizations.weight_norm(nn.LayerNorm(8), dim=None),
            "first": ColumnLayerNorm(8),
            "group": nn.GroupNorm(2, 8),
            "batch": nn.BatchNorm1d(8, track_running_stats=False),
        }
    )
    notes = {row.name: row.note for row in swap_norms(model, "layer").rows if row.after is None}
    assert notes["replaced"] == "its forward is replaced on the instance"
    assert notes["parametrized"] == "its weight is parametrized"
    assert "input" in notes["first"] or "differ" in notes["first"]
    assert set(notes) == {"replaced", "parametrized", "first"}


@pytest.mark.parametrize("norm, ours", [(nn.BatchNorm1d, GhostBatchNorm1d), (nn.BatchNorm2d, GhostBatchNorm2d)])
def test_batch_norm_becomes_ghost_and_ghost_becomes_batch_norm(norm, ours):
    layer = norm(6)
    x = torch.randn(8, 6) if norm is nn.BatchNorm1d else torch.randn(8, 6, 3, 3)
    keys = list(layer.state_dict())
    (row,) = swap_norms(layer, "ghost", ghost_batch_size=4).rows
    assert row.after == f"layers.{ours.__name__}" and row.note == "changes training: 4 samples normalize"
    torch.testing.assert_close(layer(x), ours(6, ghost_batch_size=4)(x))
    assert list(layer.state_dict()) == keys and layer.num_features == 6
    assert swap_norms(layer, "ghost").rows == []
    (row,) = swap_norms(layer, "batch").rows
    assert type(layer) is norm and row.note.startswith("changes training")
    torch.testing.assert_close(layer(x), norm(6)(x))


@pytest.mark.parametrize(
    "channels, asked, groups", [(64, None, 32), (48, None, 24), (7, None, 7), (37, None, 1), (12, 5, 4)]
)
def test_batch_norm_becomes_group_norm(channels, asked, groups):
    model, x = nn.Sequential(nn.BatchNorm2d(channels)), torch.randn(3, channels, 4, 4) + 1
    nn.init.normal_(model[0].weight)
    model(x)
    expected, weight = model.eval()(x), model[0].weight
    swaps = swap_norms(model, "group", num_groups=asked)
    assert type(model[0]) is nn.GroupNorm and model[0].weight is weight
    torch.testing.assert_close(model(x), nn.functional.group_norm(x, groups, weight, model[0].bias))
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert swaps.rows[0].note.startswith(f"changes the model: {groups} groups")
    swaps.undo()
    assert torch.equal(model(x), expected)


def test_what_has_no_counterpart_says_so():
    model = nn.ModuleDict({"sync": nn.SyncBatchNorm(4), "volume": nn.BatchNorm3d(4)})
    notes = [row.note for row in swap_norms(model, "ghost").rows]
    assert notes == ["does not say how many dimensions its inputs have", "there is no ghost form of it"]


@pytest.mark.parametrize("only", ["encoder.*", lambda name, _: name.startswith("encoder")])
def test_only_some(only):
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.LayerNorm(4)), "decoder": nn.Sequential(nn.LayerNorm(4))})
    swaps = swap_norms(model, "layer", only=only)
    assert [row.name for row in swaps.rows] == ["encoder.0"] and type(model["decoder"][0]) is nn.LayerNorm


@pytest.mark.parametrize("original", [nn.LayerNorm, TwiceRoundedRMSNorm])
def test_undo_keeps_what_others_have_derived_and_set_since(original):
    """As `fully_shard` of the layer itself does: its methods live on a class derived from the layer's own."""
    norm, twin = original(8), original(8)
    swaps = swap_norms(norm, "layer" if original is nn.LayerNorm else "rms")
    became = type(norm)

    class Mixin:
        def reshard(self):
            return "resharded"

    norm.__class__ = type(f"FSDP{became.__name__}", (Mixin, became), {"__deepcopy__": None})
    norm.note = "theirs"
    swaps.undo()
    assert type(norm).__bases__ == (Mixin, original) and type(norm).__deepcopy__ is None
    assert norm.reshard() == "resharded" and type(norm).__name__ == f"FSDP{original.__name__}"
    assert vars(norm).keys() == vars(twin).keys() | {"note"}


def test_prints_as_a_table():
    text = str(swap_norms(nn.Sequential(nn.LayerNorm((2, 4)), TwiceRoundedRMSNorm(8)), "layer"))
    assert text.splitlines()[0].split() == ["name", "from", "to", "shape", "note"]
    assert text.splitlines()[1].split() == ["0", "LayerNorm", "layers.LayerNorm", "2x4", "same", "mathematics"]
    assert str(swap_norms(nn.Linear(2, 2), "layer")) == "no normalization layers of this kind"


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"swap_norms\(kind='instance'\): kind must be one of 'layer', 'rms'"):
        swap_norms(nn.Linear(2, 2), "instance")
    with pytest.raises(ValueError, match=r'swap_norms\(num_groups=4\): num_groups belongs to kind="group", not "rms"'):
        swap_norms(nn.Linear(2, 2), "rms", num_groups=4)
    with pytest.raises(ValueError, match=r"swap_norms\(ghost_batch_size=0\): ghost_batch_size must be an integer >= 1"):
        swap_norms(nn.Linear(2, 2), "ghost", ghost_batch_size=0)
