# SPDX-License-Identifier: Apache-2.0
"""The first number that is infinite or NaN: exact."""

from lightning_optkit.diagnostics._observations import RunSeen
from lightning_optkit.diagnostics.rules.lower_rate import likely_rate
from lightning_optkit.diagnostics.rules.rates import REPLACED, first_change
from lightning_optkit.diagnostics.verdict import Verdict

__all__ = ["nonfinite"]


def nonfinite(run: RunSeen) -> Verdict | None:
    """Names what became infinite or NaN first, in time and in the order of the forward pass."""
    seen = run.nonfinite
    if seen is None:
        return None
    cause, remedy = {
        "batch": (
            "the batch itself holds infinite or NaN values",
            "torch.nan_to_num(x), or ok.Preprocess(ok.data.Impute()) for features",
        ),
        "forward": (
            "the module gives infinite or NaN values for finite inputs and finite weights",
            "bound what it divides by or takes the logarithm or exponential of: x.clamp_min(1e-6)",
        ),
        "before": (
            "what is computed before this module gives infinite or NaN values, although no module before it does",
            "bound what is divided by or taken the logarithm or root of before it: x.clamp_min(1e-6)",
        ),
        "loss": (
            "all modules give finite values, but the loss made of them is not",
            "a loss of logits, F.cross_entropy or F.binary_cross_entropy_with_logits, or clamp_min(1e-6) before a log",
        ),
        "gradient": (
            "a step gave the weights infinite or NaN values although the loss was finite: its gradient was not",
            "ok.GradientClipping(ok.ClipNorm(1.0)), which skips such a step; and x.clamp_min(1e-6) before sqrt or norm",
        ),
        "process": (
            "a step gave the weights infinite or NaN values although the loss of this process was finite: its gradient "
            "was not, or the batch or loss of another process",
            "ok.GradientClipping(ok.ClipNorm(1.0)), which skips such a step; and look at the data of all processes",
        ),
    }[seen.where]
    change, step = first_change(run)
    if seen.where != "batch" and change > REPLACED and step < seen.step:
        cause = f"training diverged: step {step} changed the median matrix by {change:.0%} of its norm"
        likely = likely_rate(run)
        lower = f"lr={likely:.1g}" if likely > 0 else "a tenth of the learning rate"
        remedy = f"{lower}, a warm-up, or ok.GradientClipping(ok.ClipNorm(1.0))"
    elif seen.rise > 10:
        cause = f"training diverged: the loss had grown {_times(seen.rise)} times before it"
        remedy = "a tenth of the learning rate, a warm-up, or ok.GradientClipping(ok.ClipNorm(1.0))"
    return Verdict("nonfinite", seen.layer, cause, seen.detail, remedy, seen.step, 1.0)


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}" if ratio < 1e6 else f"{ratio:.1e}"
