# SPDX-License-Identifier: Apache-2.0
"""pytorch-tabular, which makes module, data and Trainer itself: the callbacks are an argument of its `fit`."""

from typing import Any

import pandas as pd
import pytorch_lightning
from _client import VARIANTS, Run, watch
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig
from sklearn.datasets import load_breast_cancer


def category_embedding(variant: str, steps: int) -> Run:
    callbacks, precision = VARIANTS[variant][0](), VARIANTS[variant][1]
    data = load_breast_cancer(as_frame=True)
    frame: pd.DataFrame = data.frame.rename(columns=lambda name: name.replace(" ", "_"))
    names = [name for name in frame.columns if name != "target"]
    arguments: dict[str, Any] = {} if precision is None else {"precision": precision}
    trainer = TrainerConfig(
        max_epochs=10, batch_size=32, accelerator="cpu", early_stopping=None, checkpoints=None, load_best=False,
        progress_bar="none", trainer_kwargs={"limit_train_batches": max(steps // 10, 1)},
        seed=1, **arguments,
    )  # fmt: skip
    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=names, num_workers=0),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="32-16", dropout=0.1),
        optimizer_config=OptimizerConfig(), trainer_config=trainer, verbose=False, suppress_lightning_logger=True,
    )  # fmt: skip
    run = Run()
    model.fit(train=frame, callbacks=[watch(run, pytorch_lightning), *callbacks], seed=1)
    return run


CLIENTS = {"pytorch-tabular: CategoryEmbeddingModel": category_embedding}
