# SPDX-License-Identifier: Apache-2.0
"""The optimizer that every rule of this package is: one walk over the parameters for the rule and all its stages."""

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import check_callable, check_int, check_one_of
from lightning_optkit._native import warn_once_if_missing
from lightning_optkit.step.accepted import AcceptedGroups
from lightning_optkit.step.arguments import (
    check_group,
    check_params,
    check_stages,
    listed,
    with_listed_params,
)
from lightning_optkit.step.engine import StepEngine
from lightning_optkit.step.explain import Explanation, explain
from lightning_optkit.step.hooks import hooked
from lightning_optkit.step.loading import load
from lightning_optkit.step.progress import Progress
from lightning_optkit.step.rule import Average, Group, Rule, StatefulClip
from lightning_optkit.step.rule_identity import rule_of
from lightning_optkit.step.segments import ReferenceSegment, why_no_units, why_not_compiled
from lightning_optkit.step.shards import local
from lightning_optkit.step.stages import STATE_DTYPES, Stages, completed, group_stages, written_out
from lightning_optkit.step.statistics import TensorStatistics

__all__ = ["OnePassOptimizer"]


class OnePassOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose step unscales, clips, decays, updates, averages and counts in one pass.

    A rule subclasses it once and says three things: `_rule` (which compiled rule a group uses), `_held` (which state it
    keeps), and its own argument checks in `_check_group`. See `lightning_optkit.optimizers.adamw`.

    A rule that torch has too derives from torch's class as well, behind this one: who asks `isinstance(optimizer,
    torch.optim.SGD)` gets the same answer of both. None of torch's rule is run: what this class leaves to torch is
    called on `Optimizer` by name.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`; all on one device.
        defaults: The rule's own group entries, under torch's names.
        **stages: As in `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, an empty parameter list, a parameter given twice, or two devices.
    """

    __signature__: ClassVar[inspect.Signature]

    torch_class: ClassVar[type[Optimizer] | None] = None
    """The torch.optim class with the same rule, a base of this one, whose state dicts are exchangeable."""

    kept_entries: ClassVar[frozenset[str]] = frozenset({"rounding_seed"})
    """Group entries that nobody may schedule: what the rule learns or starts from, and counts."""

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        **stages: Unpack[Stages],
    ) -> None:
        given = completed(self._owner, stages)
        self.clip, self.average, self.state_dtype = given["clip"], given["average"], given["state_dtype"]
        self.record_statistics = given["statistics"]
        check_stages(self._owner, self.clip, self.average, self.record_statistics)
        check_one_of(self._owner, "state_dtype", self.state_dtype, STATE_DTYPES)
        defaults = {**defaults, **group_stages(given)}
        self._check_all(defaults)
        warn_once_if_missing()
        self._engine, self._accepted = StepEngine(), AcceptedGroups()
        Optimizer.__init__(self, listed(self._owner, params), defaults)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Shows the stages in the signature and the docstring of a class that takes them as `**stages`."""
        super().__init_subclass__(**kwargs)
        cls.__signature__, cls.__doc__ = written_out(cls)

    # --- what a rule says of itself ---

    def _rule(self, group: Group) -> Rule:
        """The rule of a group."""
        raise NotImplementedError

    def _check_group(self, group: Group) -> None:
        """Raises for a rule's own entry that is out of range."""
        raise NotImplementedError

    def _learn(self, observed: Tensor) -> None:
        """For a rule with an estimate: makes the next one of its sums over all parameters; shape (2,), fp64.

        On CUDA they are zero in a step that was skipped, and must not be waited for.
        """
        raise NotImplementedError

    def _check_together(self, groups: Sequence[Group]) -> None:
        """Raises for groups that do not go together."""

    def _check_learned(self, group: Group) -> None:
        """Raises for an entry of a loaded group that the rule cannot have written."""

    def _completed(self, saved: Group, group: Group) -> Group:
        """A saved group with the entries of the rule that torch's class lacks; raises if it cannot become `group`."""
        return saved

    _learned: ClassVar[tuple[str, ...]] = ()  # entries of a group that the rule writes itself
    _carried: ClassVar[tuple[str, ...]] = ()  # state besides the rule's, in the dtype of the parameter

    # --- checks ---

    def _forget_steps(self) -> None:
        self._engine.forget()

    _decay_flag: ClassVar[str] = "decoupled_weight_decay"
    """What its constructor calls this entry."""

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _check_all(self, group: Group) -> None:
        check_group(self._owner, group, self._decay_flag)
        self._check_group(group)

    def _check_changed(self, numbers: Iterable[int] | None = None) -> None:
        """Raises for an entry that was set to what the constructor refuses, in all groups or in these."""
        self._accepted.check(self, numbers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; nothing is changed if it does not fit."""
        param_group = with_listed_params(f"{self._owner}.add_param_group", "param_group", param_group)
        self._check_all({**self.defaults, **param_group})
        check_params(self._owner, self.param_groups, param_group["params"])
        with self._engine.lock:
            try:
                Optimizer.add_param_group(self, param_group)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self._owner}(params=...): {error}.") from None
            self._engine.plan = None

    # --- the step ---

    profile_hook_step = staticmethod(hooked)  # what torch wraps every `step` in

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient. Gradients are read, never written.

        A `torch.amp.GradScaler` hands over its scale and its verdict by the attributes `grad_scale` and `found_inf`.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            try:
                with torch.enable_grad():
                    loss = closure()
            except TypeError:
                check_callable(f"{self._owner}.step", "closure", closure, "closure()")
                raise
        self._engine.step(self)
        return loss

    def progress(self) -> Progress:
        """Norms of the last step and counts of all. On CUDA this waits for the device."""
        return self._engine.progress()

    @property
    def grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradients, unscaled, before clipping; None without a clip by norm."""
        return self.progress().grad_norm

    @property
    def grad_norm_clipped(self) -> float | None:
        """The same after clipping."""
        return self.progress().grad_norm_clipped

    @property
    def num_steps(self) -> int:
        """Steps that updated the parameters."""
        return self.progress().num_steps

    @property
    def num_clipped(self) -> int:
        """Steps whose gradients were scaled down, in whole or in part."""
        return self.progress().num_clipped

    @property
    def num_skipped(self) -> int:
        """Steps left out because a gradient was not finite."""
        return self.progress().num_skipped

    def statistics(self) -> list[TensorStatistics | None]:
        """Per parameter, in the order of the groups: what the last step counted; None where there was no gradient.

        Raises:
            RuntimeError: if the optimizer was built without `statistics=True`.
        """
        if not self.record_statistics:
            raise RuntimeError(f"{self._owner}.statistics(): build the optimizer with statistics=True.")
        counted = self._engine.statistics()
        return [counted.get(i) for i in range(sum(len(group["params"]) for group in self.param_groups))]

    def keep_average(self, average: Average | None) -> None:
        """Starts, replaces or stops the average that the step keeps."""
        check_stages(f"{self._owner}.keep_average", None, average, False)
        self.average = average
        for group in [self.defaults, *self.param_groups]:
            if average is not None:
                group["average_decay"] = average.decay
            else:
                group.pop("average_decay", None)
        self._engine.plan = None

    def resume_counting(self, steps: int) -> None:
        """Makes `steps` the least that a parameter was updated; a rule of torch that counts no steps leaves it out."""
        check_int(f"{self._owner}.resume_counting", "steps", steps, minimum=0)
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if float(state.get("step", 0.0)) < steps and not self._rule(group).counts_steps:
                    state["step"] = torch.full((), float(steps), dtype=torch.float32, device=param.device)
        self._engine.plan = None

    def explain(self) -> Explanation:
        """Per group: rule, stages, dtypes, path and bytes moved. Print it."""
        return explain(self)

    # --- the plan ---

    def _reference_segment(self, rule: Rule) -> type[ReferenceSegment]:
        """What steps the parameters of `rule` that take the reference path."""
        return ReferenceSegment

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        """The reason why a parameter takes the reference path, or None."""
        if group["fused"] is False:
            return "fused=False"
        treats_units = group["centralize"] or (self.clip is not None and math.isfinite(self.clip.bounds.unit_ratio))
        param = local(param)
        return why_not_compiled(param) or (why_no_units(param) if treats_units else None)

    # --- saving ---

    def state_dict(self) -> dict[str, Any]:
        """As in torch; "rule" besides, and under "clip" what a clip learned of the gradients that it saw."""
        state_dict = {**Optimizer.state_dict(self), "rule": rule_of(self)}
        return {**state_dict, "clip": self.clip.state_dict()} if isinstance(self.clip, StatefulClip) else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's class of the same rule.

        As in torch, a group has the entries of the loaded one, and no others; what torch's class does not have is kept.

        Raises:
            TypeError: if an entry is of a wrong kind; nothing is changed then.
            ValueError: if it belongs to another rule or other groups, or holds what cannot be; nothing is changed then.
        """
        with self._engine.lock:
            load(self, state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: no plan, since it holds addresses."""
        kept = ("clip", "average", "state_dtype", "record_statistics")
        counted = {"_counted": self.progress().counts()}
        return {**Optimizer.__getstate__(self), **{name: getattr(self, name) for name in kept}, **counted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what was kept; the plan is built at the next step."""
        kept = dict(state)
        self._engine, self._accepted = StepEngine(kept.pop("_counted", None)), AcceptedGroups()
        Optimizer.__setstate__(self, kept)
