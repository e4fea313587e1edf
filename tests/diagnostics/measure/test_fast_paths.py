# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_optkit._torch_private import entered_function_modes
from lightning_optkit.diagnostics.measure.fast_paths import WatchingMode

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


class Counting(WatchingMode):
    """Counts functions."""

    def __init__(self):
        super().__init__()
        self.num = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.num += 1
        return func(*args, **(kwargs or {}))


class Foreign(TorchFunctionMode):
    """One of the user's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def encoder():
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)


INPUT = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[False] * 4, [False, False, True, True]])


def test_modes_are_left_for_a_fast_path_and_entered_again():
    net, outer, inner = encoder().eval(), Counting(), Counting()
    with torch.no_grad():
        expected = net(INPUT, src_key_padding_mask=MASK)
        with outer, inner, outer:
            before = entered_function_modes()
            assert torch.equal(net(INPUT, src_key_padding_mask=MASK), expected)
            assert entered_function_modes() == before == [outer, inner, outer]
            num = inner.num
            torch.relu(INPUT)
            assert inner.num > num
    assert not expected[1, 2:].any() and entered_function_modes() == []


def test_each_layer_in_eval_mode_counts_and_attention_too():
    net = encoder()
    net.layers[1].eval()
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    with torch.no_grad():
        expected = attention(INPUT, INPUT, INPUT, need_weights=False)[0]
        with Counting() as mode:
            found = attention(INPUT, INPUT, INPUT, need_weights=False)[0]
            net(INPUT)
    assert mode.num == 0 and torch.equal(found, expected)


@pytest.mark.parametrize("eval_mode", [False, True])
def test_what_is_trained_is_watched(eval_mode):
    net = encoder().train(not eval_mode)
    with Counting() as mode:
        net(INPUT)
    assert mode.num > 0


def test_a_mode_of_others_stays_and_so_do_those_behind_it():
    net, outer, inner, foreign = encoder().eval(), Counting(), Counting(), Foreign()
    with torch.no_grad(), outer, foreign, inner:
        net(INPUT)
        assert entered_function_modes() == [outer, foreign, inner]
    assert outer.num > 0 and inner.num == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_call_leaves_all_modes(error):
    net = encoder().eval()

    def fails(*args, **kwargs):
        raise error

    net.layers[0].forward = fails
    with pytest.raises(error), torch.no_grad(), Counting(), Counting():
        net(INPUT)
    assert entered_function_modes() == []
    with torch.no_grad(), Counting() as mode:
        torch.relu(INPUT)
    assert mode.num > 0
