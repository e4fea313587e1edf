# SPDX-License-Identifier: Apache-2.0
"""Names that torch and Lightning have for what is called otherwise here; docs/migration.md has the arguments."""

__all__ = ["NAMES_ELSEWHERE"]

NAMES_ELSEWHERE = {
    "AveragedModel": "ok.EMA",
    "ChainedScheduler": "ok.schedules.join",
    "ConstantLR": "ok.schedules.constant",
    "CosineAnnealingLR": "ok.schedules.cosine",
    "CosineAnnealingWarmRestarts": "ok.schedules.sgdr",
    "CyclicLR": "ok.schedules.triangular",
    "EMAWeightAveraging": "ok.WeightAveraging",
    "EarlyStopping": "ok.EarlyStoppingCriterion",
    "ExponentialLR": "ok.schedules.exponential",
    "GradientAccumulationScheduler": "ok.BatchSizeSchedule",
    "LambdaLR": "ok.Schedule",
    "LearningRateFinder": "ok.LRFinder",
    "LinearLR": "ok.schedules.linear",
    "MultiStepLR": "ok.schedules.piecewise_constant",
    "OneCycleLR": "ok.schedules.one_cycle",
    "PolynomialLR": "ok.schedules.polynomial",
    "ReduceLROnPlateau": "ok.PlateauSchedule",
    "SWALR": "ok.schedules.join",
    "SequentialLR": "ok.schedules.join",
    "StepLR": "ok.schedules.piecewise_constant",
    "StochasticWeightAveraging": "ok.SWA",
    "clip_grad_norm_": "ok.ClipNorm",
    "clip_grad_value_": "ok.ClipValue",
    "update_bn": "ok.WeightAveraging",
}
