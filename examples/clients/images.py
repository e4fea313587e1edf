# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102  (Lightning documents its hooks)
"""Networks for images, random weights: segmentation-models-pytorch, timm, and two kinds of pretraining of lightly."""

import copy
from typing import Any

import lightning.pytorch as pl
import segmentation_models_pytorch as smp
import timm
import timm.optim
import torch
from _client import fits
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import CosineWarmupScheduler, cosine_schedule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def digits(size: int) -> dict[str, Any]:
    images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
    images = nn.functional.interpolate(images.float().view(-1, 1, 8, 8) / 16, size=size)
    return {"train_dataloaders": DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)}


class Segmentation(pl.LightningModule):
    """As the example of segmentation-models-pytorch: which pixels belong to the digit?"""

    def __init__(self) -> None:
        super().__init__()
        self.model = smp.Unet(
            "resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(64, 32, 16), in_channels=1
        )
        self.loss_fn = smp.losses.DiceLoss(smp.losses.BINARY_MODE, from_logits=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss_fn(self.model(batch[0]), (batch[0] > 0.5).float())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=1e-5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Classifier(pl.LightningModule):
    """A network of timm with its own groups: no decay on vectors, rates that fall with depth."""

    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__()
        self.model = timm.create_model(name, num_classes=10, in_chans=1, **arguments)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return timm.optim.create_optimizer_v2(self.model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)


def small_backbone() -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def two_views(images: Tensor) -> tuple[Tensor, Tensor]:
    return images + 0.1 * torch.randn_like(images), images.flip(-1)


class SimCLR(pl.LightningModule):
    """As lightly's example, with its scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = small_backbone(), SimCLRProjectionHead(32, 32, 16)
        self.criterion = NTXentLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = (self.head(self.backbone(view)) for view in two_views(batch[0]))
        return self.criterion(first, second)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.06, momentum=0.9, weight_decay=1e-4)
        return {"optimizer": optimizer, "lr_scheduler": CosineWarmupScheduler(optimizer, 1, 10)}


class BYOL(pl.LightningModule):
    """As lightly's example: the module keeps an average of its own, and one optimizer for what is not frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.projection = small_backbone(), BYOLProjectionHead(32, 32, 16)
        self.prediction = BYOLPredictionHead(16, 32, 16)
        self.backbone_momentum, self.projection_momentum = copy.deepcopy(self.backbone), copy.deepcopy(self.projection)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_momentum)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        momentum = cosine_schedule(self.current_epoch, 10, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection, self.projection_momentum, m=momentum)
        views = two_views(batch[0])
        predicted = [self.prediction(self.projection(self.backbone(view))) for view in views]
        with torch.no_grad():
            targets = [self.projection_momentum(self.backbone_momentum(view)) for view in views]
        return 0.5 * (self.criterion(predicted[0], targets[1]) + self.criterion(predicted[1], targets[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.06)


CLIENTS = {
    "segmentation-models-pytorch: Unet": fits(lambda: (Segmentation(), digits(32))),
    "timm: ViT, layer_decay": fits(
        lambda: (Classifier("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=2), digits(32))
    ),
    "timm: ConvNeXt": fits(lambda: (Classifier("convnext_atto", depths=(1, 1, 1, 1)), digits(32))),
    "lightly: SimCLR, CosineWarmupScheduler": fits(lambda: (SimCLR(), digits(32))),
    "lightly: BYOL": fits(lambda: (BYOL(), digits(32))),
}
