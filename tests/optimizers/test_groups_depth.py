# SPDX-License-Identifier: Apache-2.0
"""parameter_groups(layer_decay=...): rates by depth, whatever the layout of the model."""

import pytest
import torch
from torch import nn

from lightning_optkit.optimizers import parameter_groups
from tests.optimizers.groups_cases import Classifier, NoContainers, ResNet, Staged, Transformer, Unit


def scales(model, **arguments):
    """Prefix of the names -> exponent of the layer decay 1/2."""
    groups = parameter_groups(model, lr=1.0, layer_decay=0.5, **arguments)
    exponents = {}
    for group, names in zip(groups, groups.names, strict=True):
        for name in names:
            exponents[name] = -torch.log2(torch.tensor(group["lr"])).item()
    return exponents


class Experts(nn.Module):
    """A block with more experts than the model has blocks of its class; the first block of a model has none."""

    def __init__(self, has_experts):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.experts = nn.ModuleList(Unit(4) for _ in range(2)) if has_experts else Unit(5)


def starting(exponents, prefix):
    return {value for name, value in exponents.items() if name.startswith(prefix)}


def test_depth_in_a_sequential():
    exponents = scales(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)))
    assert [starting(exponents, prefix) for prefix in ("0", "2", "3")] == [{2}, {1}, {0}]


def test_depth_in_a_transformer():
    exponents = scales(Classifier())
    prefixes = ["token", "embeddings", "layers.0", "layers.1", "layers.2", "pooler"]
    found = [starting(exponents, f"backbone.{prefix}") for prefix in prefixes]
    assert found == [{4}, {4}, {3}, {2}, {1}, {0}]
    assert starting(exponents, "head") == {0}


@pytest.mark.parametrize("num_blocks", [(2, 2, 3), (2, 2, 2), (3, 9, 3), (1, 2, 1)], ids=str)
def test_every_block_of_a_stage_is_a_layer(num_blocks):
    """As in the groups of timm's Swin and ConvNeXt: downsampling belongs to the block it comes before."""
    exponents, last = scales(Staged(num_blocks)), sum(num_blocks) + 1
    assert {exponents["head.weight"], exponents["norm.weight"]} == {0} and exponents["stem.weight"] == last
    depth = 1
    for stage, count in enumerate(num_blocks):
        for block in range(count):
            assert exponents[f"stages.{stage}.blocks.{block}.mlp.0.weight"] == last - depth - block
        assert exponents[f"stages.{stage}.downsample.1.weight"] == last - depth
        assert exponents[f"stages.{stage}.after.weight"] == last - depth - count + 1
        depth += count


def test_stages_of_one_width_and_experts_are_no_stages():
    same = scales(Staged(widths=(8, 8, 8)))
    assert same["stages.0.blocks.0.mlp.0.weight"] == same["stages.0.blocks.1.mlp.0.weight"] == 3
    model = nn.Sequential(*(Experts(has_experts=i > 0) for i in range(4)))
    exponents = scales(model)
    assert exponents["1.experts.0.mlp.0.weight"] == exponents["1.experts.1.mlp.0.weight"] == 2
    assert exponents["0.attention.in_proj_weight"] == 3


def test_depth_in_a_resnet():
    exponents = scales(ResNet())
    prefixes = ["conv1", "bn1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer2.2", "fc"]
    assert [starting(exponents, prefix) for prefix in prefixes] == [{6}, {6}, {5}, {4}, {3}, {2}, {1}, {0}]


def test_depth_behind_a_container_of_few():
    model = nn.Sequential(Transformer(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    exponents = scales(model)
    assert starting(exponents, "0.embeddings") == {4} and starting(exponents, "0.layers.2") == {1}
    assert starting(exponents, "0.pooler") == starting(exponents, "1") == {0}


def test_depth_without_containers():
    exponents = scales(nn.ModuleDict({"net": NoContainers()}))
    assert [starting(exponents, f"net.{name}") for name in ("first", "second", "third")] == [{2}, {1}, {0}]


def test_depth_of_a_transformer_of_torch():
    layer = nn.TransformerEncoderLayer(4, 1, 4, batch_first=True)
    model = nn.ModuleDict(
        {
            "embed": nn.Linear(2, 4),
            "encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            "head": nn.Linear(4, 1),
        }
    )
    exponents = scales(model)
    found = [starting(exponents, prefix) for prefix in ("embed", "encoder.layers.0", "encoder.layers.1", "head")]
    assert found == [{3}, {2}, {1}, {0}]


def test_layers_by_name():
    exponents = scales(ResNet(), layers=["conv1", "bn*", "layer[12]", "fc"])
    found = [starting(exponents, prefix) for prefix in ("conv1", "bn1", "layer1", "layer2", "fc")]
    assert found == [{3}, {2}, {1}, {1}, {0}]


def test_a_shared_parameter_lies_where_it_comes_first():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    assert scales(model)["0.weight"] == 2


def test_names_sort_by_depth():
    groups = parameter_groups(nn.Sequential(*(nn.Linear(2, 2) for _ in range(11))), lr=1.0, layer_decay=0.9)
    names = [group["name"] for group in groups]
    assert names[:2] == ["layer00_decay", "layer00_no_decay"] and names[-1] == "layer10_no_decay"
    assert [group["lr"] for group in groups[::2]] == pytest.approx([0.9 ** (10 - depth) for depth in range(11)])
