# SPDX-License-Identifier: Apache-2.0
"""parameter_groups: every parameter once, decay by module type, overrides, the printed table."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_optkit.optimizers import AdamW, parameter_groups
from tests.optimizers.groups_cases import Classifier, NoContainers, ResNet, Staged


def names_by(groups, key):
    """Value of an entry -> names of the parameters that have it."""
    found = {}
    for group, names in zip(groups, groups.names, strict=True):
        found.setdefault(group.get(key), set()).update(names)
    return found


MODELS = {
    "sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
    "transformer": Classifier,
    "resnet": ResNet,
    "recurrent": lambda: nn.LSTM(4, 4, num_layers=2),
    "no containers": NoContainers,
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("arguments", [{}, {"lr": 1.0, "layer_decay": 0.5}, {"no_decay": []}], ids=str)
def test_each_parameter_once(model, arguments):
    model = MODELS[model]()
    groups = parameter_groups(model, weight_decay=0.1, **arguments)
    grouped = [param for group in groups for param in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    assert set(grouped) == set(model.parameters())
    assert {name for names in groups.names for name in names} == {name for name, _ in model.named_parameters()}
    assert len({group["name"] for group in groups}) == len(groups)


def test_a_shared_parameter_once_and_without_decay_if_one_place_has_none():
    model = nn.ModuleDict({"output": nn.Linear(4, 9, bias=False), "input": nn.Embedding(9, 4)})
    model["input"].weight = model["output"].weight
    groups = parameter_groups(model, weight_decay=0.1, no_decay=["embedding"])
    assert [(group["weight_decay"], names) for group, names in zip(groups, groups.names, strict=True)] == [
        (0.0, ["output.weight"])
    ]


# --- decay ---


def test_what_a_module_lists_does_not_decay():
    model = nn.ModuleDict({"net": Staged(), "table": nn.Linear(3, 3)})
    model["table"].no_weight_decay_keywords = lambda: {"weig"}
    listed = names_by(parameter_groups(model, weight_decay=0.1, no_decay=["model"]), "weight_decay")
    assert listed[0.0] == {"net.stem.weight", "table.weight"}
    assert "net.stem.weight" in names_by(parameter_groups(model, weight_decay=0.1), "weight_decay")[0.0]
    assert (
        "net.stem.weight" in names_by(parameter_groups(model, weight_decay=0.1, no_decay=["bias"]), "weight_decay")[0.1]
    )


@pytest.mark.parametrize("given", ["stem", 3, [nn.Linear]], ids=str)
def test_a_list_of_a_module_that_holds_no_names_is_refused(given):
    model = Staged()
    model.no_weight_decay = lambda: given
    with pytest.raises(TypeError, match=r"parameter_groups\(model=Staged\): its no_weight_decay\(\) must return a set"):
        parameter_groups(model)


def test_norms_biases_and_vectors_do_not_decay():
    not_decayed = names_by(parameter_groups(Classifier(), weight_decay=0.1), "weight_decay")[0.0]
    for block in range(3):
        prefix = f"backbone.layers.{block}"
        own = {"norm.weight", "norm.bias", "gamma", "mlp.0.bias", "mlp.2.bias"}
        own |= {"attention.in_proj_bias", "attention.out_proj.bias"}
        assert {name for name in not_decayed if name.startswith(prefix)} == {f"{prefix}.{name}" for name in own}
    assert {"backbone.token", "backbone.embeddings.weight"}.isdisjoint(not_decayed)


class LlamaRMSNorm(nn.Module):
    """Of another library; its weight is a matrix here, so that only its class tells."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


@pytest.mark.parametrize(
    ("module", "no_decay", "exempt"),
    [
        (nn.BatchNorm1d(2), ["norm"], ["weight", "bias"]),
        (nn.GroupNorm(1, 2), ["norm"], ["weight", "bias"]),
        (nn.RMSNorm(2), ["norm"], ["weight"]),
        (nn.InstanceNorm1d(2, affine=True), ["norm"], ["weight", "bias"]),
        (LlamaRMSNorm(), ["norm"], ["weight"]),
        (nn.LayerNorm(2), ["bias"], ["bias"]),
        (nn.LayerNorm(2), [], []),
        (nn.LSTM(2, 2), ["bias"], ["bias_ih_l0", "bias_hh_l0"]),
        (nn.Embedding(2, 2), ["embedding"], ["weight"]),
        (nn.EmbeddingBag(2, 2), ["embedding"], ["weight"]),
        (nn.Embedding(2, 2), ["norm", "bias", "vector"], []),
        (nn.Linear(2, 2), ["vector"], ["bias"]),
        (nn.Conv2d(2, 2, 1), [nn.Conv2d], ["weight", "bias"]),
        (nn.Linear(2, 2), [nn.Conv2d, "norm"], []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_what_does_not_decay_is_a_matter_of_choice(module, no_decay, exempt):
    groups = parameter_groups(module, weight_decay=0.1, no_decay=no_decay)
    assert names_by(groups, "weight_decay").get(0.0, set()) == set(exempt)


def test_without_a_weight_decay_the_optimizer_has_its_own():
    optimizer = torch.optim.AdamW(parameter_groups(nn.Linear(4, 2)), weight_decay=0.3)
    assert [(group["name"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("decay", 0.3),
        ("no_decay", 0.0),
    ]


# --- overrides ---


def test_overrides_by_pattern():
    overrides = {
        "net.*": {"lr": 0.2},
        r"re:\.weight$": {"betas": (0.5, 0.9)},
        "net.0.weight": {"lr": 0.3, "name": "stem"},
    }
    model = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, overrides=overrides)
    entries = {
        name: (group["lr"], group.get("betas"), group["weight_decay"])
        for group, names in zip(groups, groups.names, strict=True)
        for name in names
    }
    assert entries == {
        "net.0.weight": (0.3, (0.5, 0.9), 0.1),
        "net.1.weight": (0.2, (0.5, 0.9), 0.1),
        "net.0.bias": (0.2, None, 0.0),
        "net.1.bias": (0.2, None, 0.0),
        "head.weight": (1.0, (0.5, 0.9), 0.1),
        "head.bias": (1.0, None, 0.0),
    }
    assert any("stem" in group["name"] for group in groups)


def test_an_override_wins_over_depth_and_type():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    overrides = {"0.*": {"lr": 0.7, "weight_decay": 0.4}}
    groups = parameter_groups(model, lr=1.0, layer_decay=0.1, weight_decay=0.2, overrides=overrides)
    found = {
        name: (g["lr"], g["weight_decay"]) for g, names in zip(groups, groups.names, strict=True) for name in names
    }
    assert found == {"0.weight": (0.7, 0.4), "0.bias": (0.7, 0.4), "1.weight": (1.0, 0.2), "1.bias": (1.0, 0.0)}


# --- with an optimizer, printed ---


def test_a_step_is_that_of_groups_by_hand():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1)) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    first, norm, last = models[0]
    by_hand = torch.optim.AdamW(
        [
            {"params": [first.weight], "weight_decay": 0.5, "lr": 0.025},
            {"params": [first.bias], "weight_decay": 0.0, "lr": 0.025},
            {"params": norm.parameters(), "weight_decay": 0.0, "lr": 0.05},
            {"params": [last.weight], "weight_decay": 0.5, "lr": 0.1},
            {"params": [last.bias], "weight_decay": 0.0, "lr": 0.1},
        ]
    )
    groups = [parameter_groups(model, lr=0.1, weight_decay=0.5, layer_decay=0.5) for model in models[1:]]
    optimizers = [by_hand, torch.optim.AdamW(groups[0]), AdamW(groups[1])]
    for model, optimizer in zip(models, optimizers, strict=True):
        for step in range(3):
            model(torch.full((2, 3), 1.0 + step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, models[1].state_dict()[name])
        torch.testing.assert_close(weight, models[2].state_dict()[name], rtol=1e-6, atol=1e-7)


def test_prints_as_a_table():
    model = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30))
    overrides = {"0.weight": {"name": "w", "eps": 1}}
    table = str(parameter_groups(model, lr=0.001, weight_decay=0.05, overrides=overrides))
    assert table.splitlines() == [
        "group     tensors  parameters     lr  weight decay  other  names",
        "w_decay         1       1,200  0.001          0.05  eps=1  0.weight",
        "no_decay        3          90  0.001             0         0.bias, 1.weight, +1",
    ]


def test_names_that_the_terminal_has_no_room_for_stand_below(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = nn.Sequential(OrderedDict(an_encoder_with_a_rather_long_name=nn.Linear(40, 30), b=nn.LayerNorm(30)))
    table = str(parameter_groups(model, lr=0.001, weight_decay=0.05))
    assert table.splitlines() == [
        "group     tensors  parameters     lr  weight decay",
        "decay           1       1,200  0.001          0.05",
        "  an_encoder_with_a_rather_long_name.weight",
        "no_decay        3          90  0.001             0",
        "  an_encoder_with_a_rather_long_name.bias, b.weight, +1",
    ]


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": -0.1}, r"\(weight_decay=-0.1\): weight_decay must be in \[0, inf\)\.$"),
        ({"lr": -1.0}, r"\(lr=-1.0\): lr must be in \[0, inf\)\.$"),
        ({"layer_decay": 1.5, "lr": 1.0}, r"\(layer_decay=1.5\): layer_decay must be in \(0, 1\]\.$"),
        ({"layer_decay": 0.5}, r"\(layer_decay=0.5\): layer_decay needs lr\.$"),
        ({"layers": ["0"]}, r"\(layers=\['0'\]\): layers needs layer_decay\.$"),
        (
            {"layers": ["0"], "layer_decay": 0.5, "lr": 1.0},
            r"\(layers=\['0'\]\): layers must cover every parameter, not all but 1.weight\.$",
        ),
        ({"no_decay": ["norms"]}, r"\(no_decay=\['norms'\]\): no_decay must be a list of module classes and of 'norm'"),
        ({"no_decay": "norm"}, r"\(no_decay='norm'\): no_decay must be a list"),
        (
            {"overrides": {"encoder.*": {"lr": 1.0}}},
            r"\(overrides=\{'encoder.\*': ...\}\): the pattern matches no parameter; names are such as 0.w",
        ),
        (
            {"overrides": {"0.*": {"lr": -1.0}}},
            r"\(overrides\['0.\*'\]\['lr'\]=-1.0\): overrides\['0.\*'\]\['lr'\] must be in \[0, inf\)\.$",
        ),
        ({"overrides": {"0.*": 3}}, r"\(overrides\['0.\*'\]=3\): it must be a mapping of group entries\.$"),
        (
            {"overrides": {"re:(": {"lr": 1.0}}},
            r"\(overrides=\{'re:\(': ...\}\): what follows re: must be a regular expression, but has missing \)",
        ),
    ],
)
def test_rejects_bad_input(arguments, message):
    with pytest.raises((TypeError, ValueError), match=rf"^parameter_groups{message}"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **arguments)
