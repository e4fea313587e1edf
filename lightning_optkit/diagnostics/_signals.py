# SPDX-License-Identifier: Apache-2.0
"""What was seen of the signal in one step: input, layers, activations, loss, and the loss along the update."""

import math
from dataclasses import dataclass

__all__ = ["ActivationSeen", "AssociationSeen", "DependenceSeen", "InputSeen", "LayerSeen", "LossSeen", "ProbeSeen"]


@dataclass(frozen=True)
class ActivationSeen:
    """One call of an activation function in a measured step.

    Args:
        layer: The module that called it; "" for the LightningModule itself.
        function: "relu", "tanh" or "sigmoid".
        closed: Share of the units that were closed for this batch, in [0, 1]: a ReLU that was 0 for every sample, a
            tanh or sigmoid whose mean slope was below a twentieth of its largest.
        closed_since: The same over the last four measured steps together.
        samples: Number of samples of those steps, counting every place of an image or a sequence.
        units: Number of its units.
    """

    layer: str
    function: str
    closed: float
    closed_since: float
    samples: int
    units: int = 1

    @property
    def place(self) -> str:
        """The module that called it, in words."""
        return self.layer or "the LightningModule"


@dataclass(frozen=True)
class LayerSeen:
    """One dense or convolutional layer in a measured step: root mean squares, and the gain of its weights.

    Args:
        name: Its name.
        in_rms: Of its input.
        out_rms: Of its output.
        grad_rms: Of the gradient with respect to its output; NaN if there was none.
        gain: Root mean square of the weights, times the root of the number of inputs of a unit: 1 keeps the scale of
            independent inputs.
        bias: Mean of the biases; 0 without.
        rows: Number of rows of the weights, whose norm is the gain times the root of it; 0 if unknown.
    """

    name: str
    in_rms: float
    out_rms: float
    grad_rms: float
    gain: float
    bias: float = 0.0
    rows: int = 0

    @property
    def weight_norm(self) -> float:
        """L2 norm of the weights before the step; 0 if unknown."""
        return self.gain * math.sqrt(self.rows)


@dataclass(frozen=True)
class InputSeen:
    """What the first layer with weights was given.

    Args:
        layer: Its name.
        rms: Root mean square.
        spread: Standard deviation of the features: that at 95 % of them by that at 25 %, constant ones left out.
        offset: Share of the features whose mean is more than ten standard deviations from 0.
        is_constant: Whether all samples were equal.
        feature_dim: Dimension of its features: 1 for images, -1 otherwise.
    """

    layer: str
    rms: float
    spread: float
    offset: float
    is_constant: bool
    feature_dim: int = -1


@dataclass(frozen=True)
class LossSeen:
    """One call of a loss function of torch.

    Args:
        function: Its name.
        behind: The activation whose result it was given unchanged, or None.
        classes: Number of columns of its input.
        is_log: For nll_loss, whether the rows were logarithms of probabilities.
        is_broadcast: For a regression, whether output and target had different shapes.
        shapes: Both, in words.
        outside: For a regression, the share of targets that the activation cannot give.
        target_mean: For a regression.
        target_std: For a regression.
        output_rms: Root mean square of its input.
        value: The loss.
        constant: The loss of the best constant prediction; NaN if unknown.
        is_summed: Whether it is the sum over the batch, and so is `constant`.
        common: The most frequent class of the batch; -1 unless the targets are classes, one per sample.
        num_common: Number of its samples.
        missed_common: How many of these are predicted to be of another class.
        num_others: Number of the other samples.
        missed_others: How many of these are predicted to be of a class that is not theirs.
        is_one: Whether all of its input is 1, and the result of a softmax: that of a single column.
        output_std: Standard deviation of its input, over all of its elements.
        floor: The least loss that any prediction could have: the entropy of targets that are shares, or smoothed.
        present: The classes of the batch, where each sample has one.
        samples: Number of targets along their first dimension.
    """

    function: str
    behind: str | None
    classes: int
    is_log: bool
    is_broadcast: bool
    shapes: str
    outside: float
    target_mean: float
    target_std: float
    output_rms: float
    value: float
    constant: float
    is_summed: bool = False
    common: int = -1
    num_common: int = 0
    missed_common: int = 0
    num_others: int = 0
    missed_others: int = 0
    is_one: bool = False
    output_std: float = math.nan
    floor: float = 0.0
    present: tuple[int, ...] = ()
    samples: int = 0


@dataclass(frozen=True)
class TargetsSeen:
    """The targets of a whole validation.

    Args:
        constant: The loss of the best constant prediction, without the bias of few samples.
        samples: Number of samples.
        is_squared: Whether the loss is the squared error; an entropy otherwise.
        counts: Number of samples of each class; empty for other targets.
    """

    constant: float
    samples: int
    is_squared: bool
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class DependenceSeen:
    """How well targets can be told from predictions, in whatever linear way.

    Args:
        strength: Sum of the squared canonical correlations, without what chance makes.
        deviates: The same in standard deviations of a normal variable, were they independent.
        columns: Products of independent columns: the mean of the sum by chance, times `free`.
        free: Number of samples less that of their batches.
        largest: The largest squared canonical correlation, above the largest that chance makes.
    """

    strength: float
    deviates: float
    columns: int
    free: int
    largest: float = 0.0


@dataclass(frozen=True)
class AssociationSeen:
    """How much less loss predictions have with their own targets than with those of other samples of their batch.

    Args:
        gain: The difference, in the mean over samples: negative if other targets fit better.
        error: Its standard deviation if targets were exchanged at random.
        samples: Number of samples.
        batches: Number of batches in which they differ.
        scatter: Mean square of the gains of these batches in standard deviations: about 1 by chance.
        dependence: How targets go with predictions in any way; None if unknown.
    """

    gain: float
    error: float
    samples: int
    batches: int = 1
    scatter: float = 1.0
    dependence: DependenceSeen | None = None


@dataclass(frozen=True)
class ProbeSeen:
    """The loss of one batch along the update that it led to, with the same random numbers.

    Args:
        rate: Learning rate of the step.
        before: Loss before the step.
        tenth: After a tenth of the update.
        full: After the update.
        ten: After ten times the update.
        thirty: After thirty times the update.
        permuted: Before the step, with the inputs exchanged among the samples; NaN if that could not be done.
        other_before: Loss of the batch of the probe before; NaN for the first.
        other_thirty: The same after thirty times the update.
    """

    rate: float
    before: float
    tenth: float
    full: float
    ten: float
    thirty: float
    permuted: float
    other_before: float
    other_thirty: float
