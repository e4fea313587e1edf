# SPDX-License-Identifier: Apache-2.0
"""The norms of Hugging Face transformers, as they are released."""

import importlib

import pytest
import torch

from lightning_optkit.layers import LayerNorm, RMSNorm, swap_norms

pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model, name, kind, ours",
    [
        ("llama", "LlamaRMSNorm", "rms", RMSNorm),
        ("qwen2", "Qwen2RMSNorm", "rms", RMSNorm),
        ("t5", "T5LayerNorm", "rms", RMSNorm),
        ("gemma", "GemmaRMSNorm", "rms", None),
        ("cohere", "CohereLayerNorm", "layer", LayerNorm),
    ],
)
def test_is_recognized_by_its_numbers(model, name, kind, ours):
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    norm = getattr(module, name)(64)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(40, 64, requires_grad=True)
    expected = norm(x)
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    (row,) = swap_norms(norm, kind).rows
    assert (row.after is None) == (ours is None)
    if ours is not None:
        assert isinstance(norm, ours)
        torch.testing.assert_close(norm(x), expected)
        torch.testing.assert_close(torch.autograd.grad(norm(x).square().sum(), x)[0], wanted)
