# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102  (Lightning documents its hooks)
"""Models of transformers with random weights, as its own examples train them: AdamW, linear warmup, clipping by 1.

Text: Python's own library, byte by byte.
"""

from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from _client import fits, python_text
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LENGTH = 64


def tokens() -> Tensor:
    """Blocks of bytes (N, LENGTH)."""
    data = torch.tensor(list(python_text(100_000).encode()))
    return data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)


class Model(pl.LightningModule):
    """A model of transformers, whose outputs hold the loss."""

    def __init__(self, model: nn.Module, lr: float = 1e-3, has_scheduler: bool = True) -> None:
        super().__init__()
        self.model, self.lr, self.has_scheduler = model, lr, has_scheduler

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        decayed = [param for param in self.parameters() if param.requires_grad and param.dim() > 1]
        others = [param for param in self.parameters() if param.requires_grad and param.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=self.lr)
        if not self.has_scheduler:
            return optimizer
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loader(**columns: Tensor) -> dict[str, Any]:
    """Batches of named tensors, as the collators of transformers make them."""
    names, data = [*columns], TensorDataset(*columns.values())

    def collate(rows: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}

    return {"train_dataloaders": DataLoader(data, batch_size=4, collate_fn=collate)}


def gpt2() -> tuple[Any, dict[str, Any]]:
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
    )
    blocks = tokens()
    return Model(transformers.GPT2LMHeadModel(config)), loader(input_ids=blocks, labels=blocks)


def llama() -> tuple[Any, dict[str, Any]]:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    blocks = tokens()
    return Model(transformers.LlamaForCausalLM(config), has_scheduler=False), loader(input_ids=blocks, labels=blocks)


def t5() -> tuple[Any, dict[str, Any]]:
    config = transformers.T5Config(
        vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    blocks = tokens()
    return Model(transformers.T5ForConditionalGeneration(config)), loader(input_ids=blocks, labels=blocks)


def bert() -> tuple[Any, dict[str, Any]]:
    """Is this block of text a part of a docstring or a comment?"""
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=2
    )
    blocks = tokens()
    labels = (blocks == ord("(")).any(dim=1).long()
    mask = torch.ones_like(blocks)
    return (
        Model(transformers.BertForSequenceClassification(config)),
        loader(input_ids=blocks, attention_mask=mask, labels=labels),
    )


def vit() -> tuple[Any, dict[str, Any]]:
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=8, patch_size=2,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    pixels = images.float().view(-1, 1, 8, 8) / 16
    return Model(transformers.ViTForImageClassification(config)), loader(pixel_values=pixels, labels=labels)


def frozen_body() -> tuple[Any, dict[str, Any]]:
    """Only the head of a classifier is trained."""
    module, data = bert()
    module.model.bert.requires_grad_(False)
    return module, data


CLIENTS = {
    "transformers: GPT-2, linear warmup, gradient_clip_val": fits(gpt2, gradient_clip_val=1.0),
    "transformers: Llama": fits(llama),
    "transformers: T5, accumulate_grad_batches": fits(t5, accumulate_grad_batches=2),
    "transformers: BERT classifier": fits(bert),
    "transformers: BERT classifier, frozen body": fits(frozen_body),
    "transformers: ViT classifier": fits(vit),
}
