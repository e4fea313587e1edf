# SPDX-License-Identifier: Apache-2.0
"""pytorch-forecasting, as its tutorials train it: a TimeSeriesDataSet, models made from it, gradient_clip_val."""

from typing import Any

from _client import fits
from pytorch_forecasting import DeepAR, NBeats, TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.encoders import GroupNormalizer
from pytorch_forecasting.data.examples import generate_ar_data
from pytorch_forecasting.metrics import QuantileLoss


def series(**arguments: Any) -> TimeSeriesDataSet:
    data = generate_ar_data(seasonality=10.0, timesteps=60, n_series=20, seed=0).astype({"series": str})
    return TimeSeriesDataSet(
        data, time_idx="time_idx", target="value", group_ids=["series"], max_encoder_length=20,
        max_prediction_length=5, time_varying_unknown_reals=["value"], **arguments,
    )  # fmt: skip


def transformer() -> tuple[Any, dict[str, Any]]:
    data = series(static_categoricals=["series"], time_varying_known_reals=["time_idx"],
                  categorical_encoders={}, target_normalizer=GroupNormalizer(groups=["series"]))  # fmt: skip
    model = TemporalFusionTransformer.from_dataset(
        data, learning_rate=0.03, hidden_size=16, attention_head_size=2, dropout=0.1, loss=QuantileLoss(),
        reduce_on_plateau_patience=4,
    )  # fmt: skip
    return model, {"train_dataloaders": data.to_dataloader(train=True, batch_size=16)}


def nbeats() -> tuple[Any, dict[str, Any]]:
    data = series()
    model = NBeats.from_dataset(data, learning_rate=3e-2, widths=[16, 32], backcast_loss_ratio=0.1)
    return model, {"train_dataloaders": data.to_dataloader(train=True, batch_size=16)}


def deep_ar() -> tuple[Any, dict[str, Any]]:
    data = series()
    model = DeepAR.from_dataset(data, learning_rate=0.01, hidden_size=16, optimizer="adamw")
    return model, {"train_dataloaders": data.to_dataloader(train=True, batch_size=16)}


CLIENTS = {
    "pytorch-forecasting: TemporalFusionTransformer, gradient_clip_val": fits(transformer, gradient_clip_val=0.1),
    "pytorch-forecasting: NBeats": fits(nbeats, gradient_clip_val=0.01),
    "pytorch-forecasting: DeepAR": fits(deep_ar),
}
