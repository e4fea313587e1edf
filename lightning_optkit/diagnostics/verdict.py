# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a run: one finding, with its place, cause and remedy."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_optkit._checks import check_in, check_int, check_one_of, check_state, check_text

__all__ = ["ONCE", "SYMPTOMS", "Verdict", "verdict_from"]

# Every symptom that a rule may name; docs/diagnosis.md says what each rests on.
SYMPTOMS = (
    "no_gradient", "not_optimized", "gradient_not_zeroed", "lost_updates", "nonfinite", "symmetric_init", "wrong_mode",
    "ranks_diverge", "duplicate_data", "schedule_fault", "average_not_ready", "loss_does_not_match_output",
    "unnormalized_input", "unscaled_target", "bad_init_scale", "saturated_units", "dead_units", "vanishing_gradient",
    "exploding_gradient", "loss_spike", "lr_too_high", "lr_too_low", "class_imbalance",
    "overfitting", "input_ignored", "label_shuffle",
)  # fmt: skip
ONCE = 0.9  # confidence in what was seen in the first step alone, and is said as long as every step shows it


@dataclass(frozen=True)
class Verdict:
    """One finding about a run.

    Args:
        symptom: One of `SYMPTOMS`.
        layer: Name of the module, parameter or optimizer where it shows, or None if it concerns the whole run.
        cause: What is wrong, in a sentence.
        evidence: The numbers it rests on, in a sentence.
        remedy: A line of code or an argument that mends it.
        onset_step: Optimizer step at which it began, from 0.
        confidence: 1 for an exact finding, less for one with a threshold, in (0, 1].

    Raises:
        ValueError: for an unknown symptom, an empty sentence, or a number out of range.

    Example:
        >>> verdict = Verdict("wrong_mode", "net", "it trains in eval mode", "dropout is off", "net.train()", 0, 1.0)
        >>> print(verdict)
        wrong_mode in net since step 0: it trains in eval mode. Seen: dropout is off. Try: net.train()
        >>> Verdict.from_dict(verdict.to_dict()) == verdict
        True
    """

    symptom: str
    layer: str | None
    cause: str
    evidence: str
    remedy: str
    onset_step: int
    confidence: float

    def __post_init__(self) -> None:
        check_one_of(type(self).__name__, "symptom", self.symptom, SYMPTOMS)
        for name in ("cause", "evidence", "remedy"):
            check_text(type(self).__name__, name, getattr(self, name), "a sentence")
        if self.layer is not None:
            check_text(type(self).__name__, "layer", self.layer, 'the name of a module, such as "net.0"')
        check_int(type(self).__name__, "onset_step", self.onset_step, minimum=0)
        check_in(type(self).__name__, "confidence", self.confidence, "(0, 1]")

    def __str__(self) -> str:
        where = f" in {self.layer}" if self.layer else ""
        return (
            f"{self.symptom}{where} since step {self.onset_step}: {self.cause}. Seen: {self.evidence}. "
            f"Try: {self.remedy}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The finding as strings and numbers."""
        return asdict(self)

    @staticmethod
    def from_dict(saved: Mapping[str, Any]) -> "Verdict":
        """The inverse of `to_dict`.

        Raises:
            TypeError: if a value has a wrong type.
            ValueError: if a value is missing or out of range.
        """
        return verdict_from(saved, "Verdict.from_dict(saved")


def verdict_from(saved: Mapping[str, Any], call: str) -> Verdict:
    """The same for the argument of another `call`; the message begins with `Owner.method(argument`."""
    texts: dict[str, Any] = dict.fromkeys(("symptom", "cause", "evidence", "remedy"), str)
    kinds: dict[str, Any] = {**texts, "layer": (str, type(None)), "onset_step": int, "confidence": float}
    checked = check_state(call, saved, **kinds)
    try:
        return Verdict(**{name: checked[name] for name in kinds})
    except (TypeError, ValueError) as error:
        raise type(error)(f"{call}=...): it must be what to_dict gave; {error}") from None
