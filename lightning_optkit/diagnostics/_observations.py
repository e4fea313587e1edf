# SPDX-License-Identifier: Apache-2.0
"""What was seen of a run: plain numbers and names, from which `diagnostics.rules` draw verdicts.

Nothing here refers to tensors, modules or Lightning, so a rule is tested on numbers that are written down. Steps are
optimizer steps that were taken, from 0: step 0 is the first one.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from lightning_optkit.diagnostics._signals import (
    ActivationSeen,
    AssociationSeen,
    InputSeen,
    LayerSeen,
    LossSeen,
    ProbeSeen,
    TargetsSeen,
)

__all__ = [
    "AverageSeen",
    "Check",
    "IdleSeen",
    "Losses",
    "ModuleSeen",
    "NonfiniteSeen",
    "ParameterSeen",
    "RanksSeen",
    "RowsSeen",
    "RunSeen",
    "ScheduleSeen",
    "SilentSeen",
]


@dataclass(frozen=True)
class ParameterSeen:
    """One parameter in one step.

    Args:
        name: Its name in the module.
        layer: Name of the module that owns it.
        numel: Number of elements.
        is_narrow: Whether it is stored in 16 bits.
        is_optimized: Whether it is in a group of an optimizer.
        has_gradient: Whether it had a gradient that is not zero everywhere.
        weight_norm: L2 norm after the step.
        grad_norm: L2 norm of the gradient that the step used; NaN if unknown.
        update_norm: L2 norm of the change by the step; NaN if unknown.
        lost: Share of the elements that did not change although their gradient (in the one-pass step: their update) was
            not zero, in [0, 1]; NaN if unknown.
    """

    name: str
    layer: str
    numel: int
    is_narrow: bool
    is_optimized: bool
    has_gradient: bool
    weight_norm: float
    grad_norm: float
    update_norm: float
    lost: float


@dataclass(frozen=True)
class RowsSeen:
    """A weight whose rows (the incoming weights of its units) were bitwise equal before the first step.

    Args:
        name: Its name.
        layer: Name of its module.
        num_units: Number of rows.
        moved: L2 distance of the first row from where it started.
        spread: Largest L2 distance of a row from the first one.
        has_gradient: Whether it has a gradient, be it zero.
    """

    name: str
    layer: str
    num_units: int
    moved: float
    spread: float
    has_gradient: bool


@dataclass(frozen=True)
class ModuleSeen:
    """A module that `training_step` called.

    Args:
        name: Its name.
        kind: "dropout", "batch norm" or "other".
        is_training: Its mode in the call.
        acts: Whether the mode matters: dropout with a rate above 0, a batch norm with running statistics.
        is_trained: Whether parameters of it, or of the module that contains it, are trained; not asked of others.
        is_fresh: For a batch norm: whether the running statistics are still 0 and 1.
    """

    name: str
    kind: Literal["dropout", "batch norm", "other"]
    is_training: bool
    acts: bool
    is_trained: bool
    is_fresh: bool


@dataclass(frozen=True)
class Check:
    """All that was measured in one step.

    Args:
        step: Number of the step.
        rate: Largest learning rate of the step; NaN if unknown.
        parameters: Those of the module that require a gradient.
        rows: Weights that started with equal rows.
        modules: Modules that were called, in the order of their first call.
        activations: Activation functions, in the order of their calls.
        layers: Dense and convolutional layers, in the order of their first call.
        first_input: What the first layer was given, unless that is an embedding or a norm, or the batch one sample.
        losses: Calls of loss functions.
        probe: The loss along the update, if it was measured.
        strays: Number of tensors in the optimizers that are no parameters of the module.
        hidden: Names of parameters with a gradient that are in no optimizer, and not found by torch, since their
            modules are kept in a list, tuple or dict.
        decay: Largest product of the rate and the weight decay of a group: the share by which it shrinks a weight.
        added: Largest weight decay of a group that is added to the gradient; 0 for one that acts beside it.
        is_in_gradient: Whether norms of gradients are with it, as one-pass optimizers count them.
        momentum: Largest momentum of a group; 0 for rules without, as Adam's, which has betas.
        rate_to_come: The rate that a scheduler started from or will rise to; 0 if unknown.
        returned: The loss of its batch as `training_step` returned it; NaN if unknown.
        of_drawn_weights: The same loss for weights of 0 and for some drawn at random, the largest; NaN unless it is 0
            and so is every gradient.
        is_undone: Whether the weights before this step were bitwise those before the step in front of it, which had
            changed them.
    """

    step: int
    rate: float
    parameters: tuple[ParameterSeen, ...] = ()
    rows: tuple[RowsSeen, ...] = ()
    modules: tuple[ModuleSeen, ...] = ()
    activations: tuple[ActivationSeen, ...] = ()
    layers: tuple[LayerSeen, ...] = ()
    first_input: InputSeen | None = None
    losses: tuple[LossSeen, ...] = ()
    probe: ProbeSeen | None = None
    strays: int = 0
    hidden: tuple[str, ...] = ()
    is_undone: bool = False
    decay: float = 0.0
    added: float = 0.0
    is_in_gradient: bool = False
    rate_to_come: float = 0.0
    momentum: float = 0.0
    returned: float = math.nan
    of_drawn_weights: float = math.nan


@dataclass
class Losses:
    """The training loss of each step: the first 64, and the last 2,048.

    Args:
        first: From the first step on.
        recent: The latest.
        num: Number of all so far.
    """

    first: list[float] = field(default_factory=list)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=2048))
    num: int = 0

    def append(self, loss: float) -> None:
        """Appends the loss of the next step."""
        if len(self.first) < 64:
            self.first.append(loss)
        self.recent.append(loss)
        self.num += 1

    def last(self, count: int) -> list[float]:
        """The last losses, at most so many."""
        return [self.recent[place] for place in range(-min(count, len(self.recent)), 0)]


@dataclass(frozen=True)
class SilentSeen:
    """A parameter that has had no gradient (None) in any step of its optimizer.

    Args:
        name: Its name.
        layer: Name of the module that owns it.
        steps: Number of those steps.
        is_called: Whether `training_step` called its module in every measured step; a branch that is not always taken
            is not.
        runs_without_grad: Whether that call ran under `torch.no_grad()`.
        is_whole: Whether no parameter of its optimizer has had one, while those of others have.
    """

    name: str
    layer: str
    steps: int
    is_called: bool
    runs_without_grad: bool
    is_whole: bool = False


@dataclass(frozen=True)
class IdleSeen:
    """Batches in a row with a backward pass, after which a step was due, and of which none changed a weight.

    Args:
        step: Number of steps before them.
        batches: Number of batches.
        params: Number of parameters in the optimizers.
        frozen: How many of them require no gradient.
        strays: How many of them are no parameters of the module.
        with_grad: How many of them have a gradient after the last of these batches.
        is_manual: Whether the module steps its optimizers by itself.
        own: Number of parameters of the module that require a gradient.
        arrived: How many of these a backward pass of these batches had a gradient for.
        outside: Names of those of them that are in no optimizer.
    """

    step: int
    batches: int
    params: int
    frozen: int
    strays: int
    with_grad: int
    is_manual: bool
    own: int
    arrived: int
    outside: tuple[str, ...] = ()


@dataclass(frozen=True)
class NonfiniteSeen:
    """The first number that is infinite or NaN.

    Args:
        step: The step.
        where: "batch", "forward" (a module), "before" (between modules, before this one), "loss" (after the last
            module), "gradient" (the weights are not finite, by the step before), or "process" (the same in several
            processes, of which another one's loss may not have been finite).
        layer: The module or parameter, if known.
        detail: What was found, in words.
        rise: Loss before it, divided by the smallest loss so far; 1 if there was none.
        is_scaled: Whether a loss scaler skips such steps.
    """

    step: int
    where: Literal["batch", "forward", "before", "loss", "gradient", "process"]
    layer: str | None
    detail: str
    rise: float
    is_scaled: bool


@dataclass(frozen=True)
class ScheduleSeen:
    """A torch scheduler of the run, or the rate of an optimizer without one.

    Args:
        name: Class of the scheduler, or "" for none.
        optimizer: Class of its optimizer.
        interval: "step" or "epoch", when Lightning steps it; "manual" if the module does.
        frequency: Lightning steps it at every such interval.
        length: Its own length, in its own steps (T_max, total_steps, total_iters), or None.
        returns: Whether it goes back up behind its length.
        calls: How often it was stepped in this fit.
        steps: Optimizer steps of this fit.
        epochs: Completed epochs of this fit.
        steps_planned: Optimizer steps of the whole run, or None.
        epochs_planned: Epochs of the whole run, or None.
        zero_first: Number of steps with a rate of 0 from the first step on.
        zero_last: Number of steps with a rate of 0 up to now, after others.
        follows_metric: Whether it is stepped by a metric (ReduceLROnPlateau).
        faded: Number of steps with a rate below a thousandth of the highest one so far, up to now.
        batches: Number of batches during which it was stepped.
        batches_twice: How many of them saw more than one of its steps.
    """

    name: str
    optimizer: str
    interval: Literal["step", "epoch", "manual"]
    frequency: int
    length: int | None
    returns: bool
    calls: int
    steps: int
    epochs: int
    steps_planned: int | None
    epochs_planned: int | None
    zero_first: int
    zero_last: int
    follows_metric: bool
    faded: int = 0
    batches: int = 0
    batches_twice: int = 0


@dataclass(frozen=True)
class AverageSeen:
    """An exponential average of the weights and the length of the run.

    Args:
        text: The average.
        reach: Steps over which it reaches back.
        steps: Steps that it will see.
        share_of_first: Weight of the first weights in its last value, in [0, 1].
        fitting: An average that fits the run.
    """

    text: str
    reach: float
    steps: int
    share_of_first: float
    fitting: str


@dataclass(frozen=True)
class RanksSeen:
    """What differs, or wrongly does not, among the processes.

    Args:
        step: The step.
        differing: Parameters that are not bitwise equal on all ranks, by name.
        same_batches: Ranks that were given the same batches, each pair one after another, or empty.
        num_batches: Number of compared batches, which differ among each other.
    """

    step: int
    differing: tuple[str, ...] = ()
    same_batches: tuple[int, ...] = ()
    num_batches: int = 0


@dataclass
class RunSeen:
    """Everything seen so far.

    Args:
        steps: Optimizer steps of this fit.
        steps_planned: Those of the whole fit, or None.
        is_over: Whether the fit has ended.
        losses: Training loss of each step.
        validations: Loss of each validation, if one was logged under such a name.
        trained: Mean training loss of the steps before each of them, since the one before; NaN if unknown.
        monitor: The name under which it was logged.
        validated: The targets of the first validation, if its loss function and they could be seen.
        fresh: How predictions go with training targets before the first validation, in batches not trained on before.
        held: The same in that validation.
        began_in_training: Whether a dropout layer was in training mode when the fit began, before hooks of the module.
        clip: The norm to which the trainer cuts gradients, or None.
        checks: Measured steps, in order.
        silent: Parameters without any gradient so far.
        not_zeroed: Step of the first gradient that was not cleared after a step, by class of the optimizer.
        nonfinite: The first number that is not finite.
        schedules: Schedulers, or rates, as they are now.
        averages: Averages that are longer than the run.
        ranks: What differs among processes.
        idle: Batches that changed nothing.
        vain: Steps that the module has taken itself without any backward pass, gradient or change of a weight so far.
        repeated_batches: How many batches in a row were bitwise equal from the first one on, where the loader has more.
    """

    steps: int = 0
    steps_planned: int | None = None
    is_over: bool = False
    validations: list[float] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)
    monitor: str = "val_loss"
    validated: TargetsSeen | None = None
    fresh: AssociationSeen | None = None
    held: AssociationSeen | None = None
    began_in_training: bool = False
    clip: float | None = None
    losses: Losses = field(default_factory=Losses)
    checks: list[Check] = field(default_factory=list)
    silent: list[SilentSeen] = field(default_factory=list)
    not_zeroed: dict[str, int] = field(default_factory=dict)
    nonfinite: NonfiniteSeen | None = None
    schedules: list[ScheduleSeen] = field(default_factory=list)
    averages: list[AverageSeen] = field(default_factory=list)
    ranks: list[RanksSeen] = field(default_factory=list)
    idle: IdleSeen | None = None
    vain: int = 0
    repeated_batches: int = 0

    def take(self, check: Check) -> None:
        """Adds a check; of a long run, the first 16 and the last 64 are kept."""
        self.checks.append(check)
        del self.checks[16:-64]
