# SPDX-License-Identifier: Apache-2.0
"""peft: a language model of which only low-rank adapters are trained."""

from typing import Any

import transformers
from _client import fits
from hugging_face import Model, loader, tokens
from peft import LoraConfig, get_peft_model


def lora() -> tuple[Any, dict[str, Any]]:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    model = get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    blocks = tokens()
    return Model(model), loader(input_ids=blocks, labels=blocks)


CLIENTS = {"peft: LoRA on Llama": fits(lora)}
