# SPDX-License-Identifier: Apache-2.0
"""Every kind of layer under initialize, against torch.nn.init applied by hand to each of its blocks."""

import functools

import pytest
import torch
from torch import nn

from lightning_optkit.init import he, initialize, lecun, lsuv, orthogonal, truncated_normal, xavier


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def by_name(rows):
    return {f"{row.module}.{row.parameter}".lstrip("."): row for row in rows}


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 4), nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3), nn.Conv3d(6, 4, 2)], ids=str
)
def test_a_plain_layer_equals_torch(layer):
    reference = nn.init.kaiming_normal_(torch.empty_like(layer.weight), nonlinearity="relu", generator=seeded())
    initialize(layer, he, generator=seeded())
    assert torch.equal(layer.weight, reference)
    assert torch.equal(layer.bias, torch.zeros(4))


@pytest.mark.filterwarnings("ignore")
def test_the_transposed_linear_of_hugging_face_is_a_linear():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 6)  # 6 inputs, 4 outputs
    linear = nn.Linear(6, 4)
    rows = by_name(initialize(conv1d, he, generator=seeded()))
    initialize(linear, he, generator=seeded())
    assert torch.equal(conv1d.weight, linear.weight.T) and torch.equal(conv1d.bias, torch.zeros(4))
    assert rows["weight"].scheme == "he"
    x = torch.randn(64, 6, generator=seeded()) + 1
    for layer in (conv1d, linear):
        lsuv(layer, x, generator=seeded())
        assert abs(float(layer(x).var(correction=0)) - 1) < 0.01


@pytest.mark.parametrize("make", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_grouped_convolution_has_one_fan_per_group(make):
    layer = make(8, 12, 3, groups=4)
    generator = seeded()
    groups = [
        nn.init.xavier_normal_(torch.empty(3, 2, *layer.kernel_size), generator=generator) for _ in range(4)
    ]  # fmt: skip
    initialize(layer, functools.partial(xavier, distribution="normal"), generator=seeded())
    assert torch.equal(layer.weight, torch.cat(groups))


def test_a_grouped_orthogonal_convolution_is_orthogonal_in_each_group():
    layer = nn.Conv2d(8, 6, 3, groups=2)
    initialize(layer, orthogonal, generator=seeded())
    for group in layer.weight.flatten(1).chunk(2):
        torch.testing.assert_close(group @ group.T, torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("make", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_transposed_convolution_swaps_its_fans_in_each_group(make, groups):
    layer = make(6, 12, 2, groups=groups)
    generator = seeded()
    blocks = [
        nn.init.kaiming_normal_(torch.empty(12 // groups, 6 // groups, *layer.kernel_size), generator=generator)
        for _ in range(groups)
    ]
    initialize(layer, he, activation=nn.LeakyReLU(0.0), generator=seeded())
    assert torch.equal(layer.weight, torch.cat([block.transpose(0, 1) for block in blocks]))


def test_bilinear_counts_all_pairs_of_inputs_as_fan_in():
    layer = nn.Bilinear(20, 30, 50)
    initialize(layer, lecun, generator=seeded())
    assert layer.weight.detach().std() == pytest.approx(600**-0.5, rel=0.02)  # 30 000 samples: standard error 0.4 %


@pytest.mark.parametrize(
    ("layer", "gates"),
    [
        (nn.LSTM(9, 5, num_layers=2, bidirectional=True), ("sigmoid", "sigmoid", "tanh", "sigmoid")),
        (nn.GRU(9, 5), ("sigmoid", "sigmoid", "tanh")),
        (nn.RNN(9, 5), ("tanh",)),
        (nn.RNN(9, 5, nonlinearity="relu"), ("relu",)),
        (nn.LSTMCell(9, 5), ("sigmoid", "sigmoid", "tanh", "sigmoid")),
        (nn.GRUCell(9, 5), ("sigmoid", "sigmoid", "tanh")),
        (nn.RNNCell(9, 5), ("tanh",)),
    ],
    ids=str,
)
def test_each_recurrent_gate_is_drawn_for_itself(layer, gates):
    rows = by_name(initialize(layer, xavier, generator=seeded()))
    generator = seeded()
    for name, parameter in layer.named_parameters():
        if name.startswith("weight_ih"):
            for gate, part in zip(gates, parameter.chunk(len(gates)), strict=True):
                gain = nn.init.calculate_gain(gate)
                expected = nn.init.xavier_uniform_(torch.empty(part.shape), gain=gain, generator=generator)
                assert torch.equal(part, expected), name
            assert rows[name].scheme == ", ".join(["xavier", *dict.fromkeys(gates)])
        elif name.startswith("weight_hh"):
            for part in parameter.chunk(len(gates)):
                assert torch.equal(part, nn.init.orthogonal_(torch.empty(5, 5), generator=generator)), name
        else:
            assert torch.equal(parameter, torch.zeros_like(parameter))


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4, num_layers=2), nn.LSTMCell(3, 4)], ids=str)
def test_the_forget_gate_s_two_biases_add_up_to_the_argument(layer):
    initialize(layer, xavier, forget_bias=1.0)
    biases = [parameter for name, parameter in layer.named_parameters() if name.startswith("bias")]
    for input_bias, hidden_bias in zip(biases[::2], biases[1::2], strict=True):
        assert (input_bias + hidden_bias).tolist() == [0] * 4 + [1] * 4 + [0] * 8


def test_only_the_lstm_has_a_forget_gate():
    gru = nn.GRU(3, 4)
    initialize(gru, xavier, forget_bias=1.0)
    assert torch.equal(gru.bias_ih_l0, torch.zeros(12))


def test_the_lstm_s_projection_is_one_matrix():
    lstm = nn.LSTM(8, 8, proj_size=3)
    initialize(lstm, orthogonal, generator=seeded())
    torch.testing.assert_close(lstm.weight_hr_l0 @ lstm.weight_hr_l0.T, torch.eye(3), atol=1e-5, rtol=0)
    for gate in lstm.weight_hh_l0.chunk(4):
        torch.testing.assert_close(gate.T @ gate, torch.eye(3), atol=1e-5, rtol=0)


def test_attention_draws_q_k_and_v_apart():
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    initialize(attention, xavier, generator=seeded())
    generator = seeded()
    for part in attention.in_proj_weight.chunk(3):
        assert torch.equal(part, nn.init.xavier_uniform_(torch.empty(8, 8), generator=generator))
    assert torch.equal(attention.out_proj.weight, nn.init.xavier_uniform_(torch.empty(8, 8), generator=generator))
    for bias in (attention.in_proj_bias, attention.bias_k, attention.bias_v, attention.out_proj.bias):
        assert torch.equal(bias, torch.zeros_like(bias))


def test_attention_with_other_key_and_value_sizes():
    attention = nn.MultiheadAttention(8, 2, kdim=5, vdim=3)
    initialize(attention, xavier, generator=seeded())
    generator = seeded()
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        part = getattr(attention, name)
        assert torch.equal(part, nn.init.xavier_uniform_(torch.empty_like(part), generator=generator))


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_has_unit_variance_and_a_zero_padding_row(make):
    table = make(500, 64, padding_idx=3)
    rows = initialize(table, he, generator=seeded())
    assert torch.equal(table.weight[3], torch.zeros(64))
    assert table.weight.detach().std() == pytest.approx(1, rel=0.02)
    assert rows[0].scheme == "N(0, 1), row 3 zero"


def test_a_scheme_with_its_own_std_draws_embeddings_too():
    table = nn.Embedding(500, 64)
    initialize(table, truncated_normal, generator=seeded())
    assert table.weight.abs().max() <= 0.04
    initialize(table, truncated_normal, embedding=functools.partial(truncated_normal, std=1.0), generator=seeded())
    assert table.weight.abs().max() > 1


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4),
             nn.InstanceNorm1d(4, affine=True)], ids=str
)  # fmt: skip
def test_norms_start_as_the_identity_and_their_buffers_are_left_alone(norm):
    for tensor in norm.parameters():
        nn.init.normal_(tensor)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        norm.running_mean.fill_(5)
    buffers = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    initialize(norm, he)
    assert torch.equal(norm.weight, torch.ones(4))
    assert getattr(norm, "bias", None) is None or torch.equal(norm.bias, torch.zeros(4))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in norm.named_buffers())
