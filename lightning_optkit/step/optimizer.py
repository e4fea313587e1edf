# SPDX-License-Identifier: Apache-2.0
"""The base class of every optimizer: one walk over the parameters for the rule and all stages."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import Unpack

from lightning_optkit._checks import check_callable, check_int, check_one_of
from lightning_optkit._native import warn_once_if_missing
from lightning_optkit.step.accepted import AcceptedGroups
from lightning_optkit.step.arguments import (
    base_rate,
    check_group,
    check_group_entries,
    check_params,
    check_stages,
    listed,
    with_listed_params,
)
from lightning_optkit.step.average import Average
from lightning_optkit.step.clip import StatefulClip
from lightning_optkit.step.engine import StepEngine
from lightning_optkit.step.explain import Explanation, explain
from lightning_optkit.step.full_precision import full_precision, full_precision_state_dict, load_full_precision
from lightning_optkit.step.hooks import hooked
from lightning_optkit.step.loading import load
from lightning_optkit.step.progress import Progress
from lightning_optkit.step.reference_segment import ReferenceSegment
from lightning_optkit.step.rule import Group, Rule
from lightning_optkit.step.rule_identity import rule_of
from lightning_optkit.step.saved_stages import stages_of
from lightning_optkit.step.segments import why_no_units, why_not_compiled
from lightning_optkit.step.shards import local, whole_statistics
from lightning_optkit.step.stages import STATE_DTYPES, Stages, completed, group_stages, written_out
from lightning_optkit.step.statistics import TensorStatistics

__all__ = ["OnePassOptimizer"]


class OnePassOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose step unscales, clips, decays, updates, averages and counts in one pass.

    Each rule is a subclass with two methods: `_rule` (the update rule of a group, with its states) and `_check_group`
    (checks of its own arguments). See `lightning_optkit.optimizers.adamw`.

    The class of a rule that torch has too also derives from torch's class, so that `isinstance(optimizer,
    torch.optim.SGD)` is true of both. No code of torch's rule runs: the methods left to torch are called on `Optimizer`
    by name.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`; all on one device.
        defaults: The rule's own group entries, with torch's names.
        **stages: See `lightning_optkit.step.Stages`.

    Raises:
        ValueError: for an argument out of range, an empty parameter list, a parameter given twice, or two devices.

    Example:
        >>> import torch
        >>> from lightning_optkit.optimizers import SGD
        >>> optimizer = SGD(torch.nn.Linear(2, 2).parameters(), lr=0.1)
        >>> isinstance(optimizer, OnePassOptimizer), isinstance(optimizer, torch.optim.SGD)
        (True, True)
    """

    __signature__: ClassVar[inspect.Signature]

    _torch_class: ClassVar[type[Optimizer] | None] = None
    """The torch.optim class of the same rule, which this class also derives from; state dicts are exchangeable."""

    kept_entries: ClassVar[frozenset[str]] = frozenset({"rounding_seed", "decay_lr"})
    """Group entries that cannot be scheduled: initial values, counters, and what the rule writes itself."""

    _learned: ClassVar[tuple[str, ...]] = ()
    """Group entries that the rule writes itself."""

    _carried: ClassVar[tuple[str, ...]] = ()
    """State of the optimizer class itself, in the dtype of the parameter."""

    _decay_flag: ClassVar[str] = "decoupled_weight_decay"
    """The constructor's name for this entry."""

    _shown: Mapping[Tensor, Tensor] = MappingProxyType({})
    """Averages that some parameters hold now, by parameter, in fp32 where the average is."""

    leaves_out: Callable[[], Set[Tensor]] | None = None
    """Returns the parameters that `clip` leaves out; asked when the step is planned, as after any change of groups."""

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
        # torch's own arguments, which rules that torch does not have do not take.
        defaults = {"foreach": None, "differentiable": False, **defaults, **group_stages(given)}
        self._check_all(defaults)
        defaults["decay_lr"] = base_rate(defaults)
        warn_once_if_missing()
        self._engine, self._accepted = StepEngine(), AcceptedGroups()
        Optimizer.__init__(self, listed(self._owner, params), defaults)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Adds the stages to the signature and the docstring of a class that takes `**stages`."""
        super().__init_subclass__(**kwargs)
        cls.__signature__, cls.__doc__ = written_out(cls)

    # --- overridden by each rule ---

    def _rule(self, group: Group) -> Rule:
        """The update rule of a group."""
        raise NotImplementedError

    def _check_group(self, group: Group) -> None:
        """Raises if an entry specific to the rule is out of range."""
        raise NotImplementedError

    def _learn(self, observed: Tensor) -> None:
        """For a rule with an estimate: computes the next one from its sums over all parameters, of shape (2,) and fp64.

        On CUDA the sums are zero in a skipped step, and must be used without synchronizing.
        """
        raise NotImplementedError

    def _check_together(self, groups: Sequence[Group]) -> None:
        """Raises for groups that are incompatible with each other."""

    def _check_learned(self, group: Group) -> None:
        """Raises for an entry of a loaded group that the rule cannot have written."""

    def _completed(self, saved: Group, group: Group) -> Group:
        """A saved group plus the entries that torch's class lacks; raises if `group` cannot load it."""
        return saved

    # --- checks ---

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _check_all(self, group: Group) -> None:
        check_group(self._owner, group, self._decay_flag)
        self._check_group(group)

    def _check_changed(self, numbers: Iterable[int] | None = None) -> None:
        """Raises if an entry of these groups (default: all) was set to a value that the constructor refuses."""
        self._accepted.check(self, numbers)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; an invalid group changes nothing."""
        param_group = with_listed_params(f"{self._owner}.add_param_group", "param_group", param_group)
        added = {**self.defaults, **param_group}
        added["decay_lr"] = param_group.get("decay_lr", base_rate(added))
        self._check_all(added)
        param_group = {**param_group, "decay_lr": float(added["decay_lr"])}
        check_params(self._owner, self.param_groups, param_group["params"])
        check_group_entries(self._owner, param_group, param_group.get("rounding", self.defaults["rounding"]))
        with self._engine.lock:
            try:
                Optimizer.add_param_group(self, param_group)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{self._owner}(params=...): {error}.") from None
            self._engine.plan = None

    # --- the step ---

    profile_hook_step = staticmethod(hooked)  # torch wraps every `step` with this

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter with a gradient. Never writes to gradients.

        A `torch.amp.GradScaler` passes its scale and its verdict as attributes `grad_scale` and `found_inf`.

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
        if self._shown:
            self._shown = MappingProxyType({})
        self._engine.step(self)
        return loss

    def progress(self) -> Progress:
        """Norms of the last step, and counts over all steps. Synchronizes on CUDA."""
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
        """Steps whose gradients were scaled down, at least partly."""
        return self.progress().num_clipped

    @property
    def num_skipped(self) -> int:
        """Steps skipped because a gradient was not finite."""
        return self.progress().num_skipped

    def statistics(self) -> list[TensorStatistics | None]:
        """The statistics of the last step, per parameter in the order of the groups; None for one without a gradient.

        Those of sharded parameters are of the whole parameter: every process must call this.

        Raises:
            RuntimeError: if the optimizer was built without `statistics=True`.
        """
        if not self.record_statistics:
            raise RuntimeError(f"{self._owner}.statistics(): build the optimizer with statistics=True.")
        params = [param for group in self.param_groups for param in group["params"]]
        counted = whole_statistics(params, self._engine.statistics())
        return [counted.get(number) for number in range(len(params))]

    def keep_average(self, average: Average | None) -> None:
        """Starts, replaces or stops the average of the parameters."""
        check_stages(f"{self._owner}.keep_average", None, average, False)
        self.average = average
        for group in [self.defaults, *self.param_groups]:
            if average is not None:
                group["average_decay"] = average.decay
            else:
                group.pop("average_decay", None)
        self._engine.plan = None
        if self._engine.early is not None:
            self._engine.early.recount()

    def resume_counting(self, steps: int) -> None:
        """Sets each step count to at least `steps`, for rules whose torch class saves none."""
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

    def _forget_steps(self) -> None:
        self._engine.forget()

    def _reference_segment(self, rule: Rule) -> type[ReferenceSegment]:
        """The class that steps the parameters of `rule` on the reference path."""
        return ReferenceSegment

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        """Why a parameter takes the reference path, or None."""
        if group["fused"] is False:
            return "fused=False"
        if group["caution"]:
            return "no kernel that counts where update and gradient agree"
        treats_units = group["centralize"] or (self.clip is not None and math.isfinite(self.clip.bounds.unit_ratio))
        param = local(param)
        return why_not_compiled(param) or (why_no_units(param) if treats_units else None)

    # --- saving ---

    def state_dict(self) -> dict[str, Any]:
        """As in torch, with "rule", with clip and average by name under "stages", and what the clip learned, "clip"."""
        state_dict = {**Optimizer.state_dict(self), "rule": rule_of(self), "stages": stages_of(self.clip, self.average)}
        return {**state_dict, "clip": self.clip.state_dict()} if isinstance(self.clip, StatefulClip) else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, or of torch's class of the same rule.

        As in torch, the entries of a loaded group replace those of the current one; entries that torch's class lacks
        are kept. `clip` and `average` stay as they were given: an average, and what a clip has learned, go on with the
        settings given here, and what is of another kind begins anew, with a warning each. A decay that was changed in
        the groups goes on, and `explain` shows it.

        Raises:
            TypeError: if an entry has a wrong type; nothing is changed then.
            ValueError: if it belongs to another rule or other groups, or an entry is invalid; nothing is changed then.
        """
        with self._engine.lock:
            load(self, state_dict)

    def full_precision_state_dict(self, model: nn.Module) -> dict[str, Any]:
        """`model.state_dict()` with the 16-bit parameters of this optimizer in fp32: exact under "split32".

        While the parameters hold an average (`WeightAveraging` in validation, a schedule-free rule after `eval()`), it
        is the average, in fp32.

        Raises:
            ValueError: if the model's state dict lacks a parameter, or the state of one is damaged.

        Example:
            >>> from lightning_optkit.optimizers import AdamW
            >>> model = torch.nn.Linear(2, 1).bfloat16()
            >>> optimizer = AdamW(model.parameters(), rounding="split32")
            >>> model(torch.ones(1, 2).bfloat16()).sum().backward()
            >>> optimizer.step()
            >>> optimizer.full_precision_state_dict(model)["weight"].dtype
            torch.float32
        """
        owner = f"{self._owner}.full_precision_state_dict"
        return full_precision_state_dict(owner, self.param_groups, model, self._full_precision_of)

    def load_full_precision_state_dict(self, model: nn.Module, state_dict: Mapping[str, Any]) -> None:
        """Loads fp32 weights into the parameters, and their low-order parts into the state: exactly under "split32".

        Warns if the rounding of a group keeps no low-order part of weights that have one.

        Raises:
            TypeError: if it is not a dict.
            ValueError: for missing or unknown names, other shapes or kinds of numbers, and while the parameters hold
                an average; nothing is changed then.
        """
        with self._engine.lock:
            load_full_precision(self, model, state_dict)

    def _full_precision_of(self, param: Tensor) -> Tensor:
        """The local part of a 16-bit parameter in fp32."""
        if param in self._shown:
            return local(self._shown[param].detach()).to(torch.float32)
        return full_precision(f"{self._owner}.full_precision_state_dict", param, self.state.get(param, {}))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: everything except the plan, which holds addresses."""
        kept = ("clip", "average", "state_dtype", "record_statistics")
        others: dict[str, Any] = {"_counted": self.progress().counts()}
        if self.leaves_out is not None:  # a copy has parameters of its own, and nobody to ask
            others["leaves_out"] = partial(frozenset, self.leaves_out())
        return {**Optimizer.__getstate__(self), **{name: getattr(self, name) for name in kept}, **others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state; the next step builds a new plan."""
        kept = dict(state)
        self._engine, self._accepted = StepEngine(kept.pop("_counted", None)), AcceptedGroups()
        Optimizer.__setstate__(self, kept)
