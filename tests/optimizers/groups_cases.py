# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of parameter_groups: models of several layouts."""

import torch
from torch import nn


class Block(nn.Module):
    """A residual block of a transformer, more or less."""

    def __init__(self, dim=4):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 1)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.gamma = nn.Parameter(torch.ones(dim))


class Transformer(nn.Module):
    """As in transformers: embeddings, a ModuleList of blocks, a pooler; the head above it."""

    def __init__(self, num_blocks=3):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.embeddings = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Block() for _ in range(num_blocks))
        self.pooler = nn.Linear(4, 4)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Transformer()
        self.head = nn.Linear(4, 2)


class BasicBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
        self.downsample = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 2, 7), nn.BatchNorm2d(2)
        self.layer1 = nn.Sequential(BasicBlock(), BasicBlock())
        self.layer2 = nn.Sequential(BasicBlock(), BasicBlock(), BasicBlock())
        self.fc = nn.Linear(2, 2)


class NoContainers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)


class Stage(nn.Module):
    """As in ConvNeXt: downsampling, then blocks; `after` as in transformers' Swin."""

    def __init__(self, width, num_blocks, wider=None):
        super().__init__()
        self.downsample = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) if num_blocks else nn.Identity()
        self.blocks = nn.ModuleList(Unit(width) for _ in range(max(num_blocks, 1)))
        self.after = nn.Linear(width, wider) if wider else nn.Identity()


class Unit(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


class Staged(nn.Module):
    def __init__(self, num_blocks=(2, 2, 3), widths=(4, 6, 8)):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4)
        self.stages = nn.Sequential(*(Stage(w, n, w + 1) for w, n in zip(widths, num_blocks, strict=True)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def no_weight_decay(self):
        return {"stem.weight", "unknown"}
