# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D101, D102  (Lightning documents its hooks)
"""PyTorch Geometric, with its own data modules: nodes of one graph, and many small graphs."""

from typing import Any

import lightning.pytorch as pl
import torch
from _client import fits
from torch import Tensor, nn
from torch_geometric.data.lightning import LightningDataset, LightningNodeData
from torch_geometric.datasets import FakeDataset, KarateClub
from torch_geometric.nn import GCN, GIN, MLP, global_add_pool


class Nodes(pl.LightningModule):
    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.gnn = GCN(in_channels, 32, 2, classes, dropout=0.1, norm="layer_norm")

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        out = self.gnn(data.x, data.edge_index)
        return nn.functional.cross_entropy(out[data.train_mask], data.y[data.train_mask])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=5e-4)


class Graphs(pl.LightningModule):
    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        self.gnn = GIN(in_channels, 32, 2, norm="batch_norm")
        self.head = MLP([32, 32, classes], dropout=0.1)

    def training_step(self, data: Any, batch_idx: int) -> Tensor:
        pooled = global_add_pool(self.gnn(data.x, data.edge_index), data.batch)
        return nn.functional.cross_entropy(self.head(pooled), data.y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def nodes() -> tuple[Any, dict[str, Any]]:
    data = KarateClub()[0]
    data.val_mask = data.test_mask = ~data.train_mask
    return Nodes(data.num_features, int(data.y.max()) + 1), {"datamodule": LightningNodeData(data, loader="full")}


def graphs() -> tuple[Any, dict[str, Any]]:
    data = FakeDataset(num_graphs=64, avg_num_nodes=20, num_classes=4)
    return Graphs(data.num_features, 4), {"datamodule": LightningDataset(data, batch_size=8)}


CLIENTS = {
    "PyTorch Geometric: GCN, LightningNodeData": fits(nodes),
    "PyTorch Geometric: GIN, LightningDataset": fits(graphs),
}
