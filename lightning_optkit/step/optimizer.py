# SPDX-License-Identifier: Apache-2.0
"""The optimizer that every rule of this package is: one walk over the parameters for the rule and all its stages."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_optkit._checks import check_one_of
from lightning_optkit._native import warn_once_if_missing
from lightning_optkit.step.arguments import check_group, check_params, check_stages, listed, with_listed_params
from lightning_optkit.step.cuda import CudaSegment, DeviceControl
from lightning_optkit.step.explain import Explanation, explain
from lightning_optkit.step.loading import check_state_dict, complete_groups, restore_state
from lightning_optkit.step.numbers import STATE_DTYPES, GroupNumbers, is_due, read_group
from lightning_optkit.step.planning import Segment, StepPlan
from lightning_optkit.step.progress import Progress
from lightning_optkit.step.rule import Average, Clip, Group, LearningClip, Rule
from lightning_optkit.step.segments import PlanOutdated, why_no_units, why_not_compiled
from lightning_optkit.step.shards import local, reduce_sum_
from lightning_optkit.step.state import StateLayout
from lightning_optkit.step.statistics import TensorStatistics

__all__ = ["OnePassOptimizer"]


class OnePassOptimizer(Optimizer):
    """A `torch.optim.Optimizer` whose step unscales, clips, decays, updates, averages and counts in one pass.

    A rule subclasses it once and says three things: `_rule` (which compiled rule a group uses), `_held` (which state it
    keeps), and its own argument checks in `_check_group`. See `lightning_optkit.optimizers.adamw`.

    Args:
        params: Parameters or parameter groups, as in `torch.optim`; all on one device.
        defaults: The rule's own group entries, under torch's names.
        clip: A clip from `lightning_optkit.clipping`, or None.
        average: An average from `lightning_optkit.averaging`, or None.
        l1: Weight of the L1 proximal step, in [0, inf); the threshold is `lr * l1`, and zeros are exact.
        cautious: Decoupled decay acts only where the update does not point away from zero.
        centralize: Take the mean of each unit (row of the first dimension) off its gradient, for parameters of at
            least two dimensions.
        rounding: How 16-bit parameters are stored: "nearest", "stochastic", or "kahan" (one more 16-bit number per
            element that keeps what was cut off). With fp32 parameters stochastic is nearest.
        state_dtype: torch.float32, torch.bfloat16, or "int8": one byte per number, see `lightning_optkit.step.codes`.
            The state of fp64 parameters is fp64.
        statistics: Count norms and lost updates per tensor in the same pass; read them by `statistics()`.

    Raises:
        ValueError: for an argument out of range, an empty parameter list, a parameter given twice, or two devices.
    """

    torch_class: ClassVar[type[Optimizer] | None] = None
    """The torch.optim class with the same rule, whose state dicts are exchangeable."""

    kept_entries: ClassVar[frozenset[str]] = frozenset({"rounding_seed"})
    """Group entries that nobody may schedule: what the rule learns or starts from, and counts."""

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        *,
        clip: Clip | None,
        average: Average | None,
        l1: float,
        cautious: bool,
        centralize: bool,
        rounding: str,
        state_dtype: torch.dtype | Literal["int8"],
        statistics: bool,
    ) -> None:
        self.clip, self.average, self.state_dtype = clip, average, state_dtype
        self.record_statistics = statistics
        check_stages(self._owner, clip, average, statistics)
        check_one_of(self._owner, "state_dtype", state_dtype, STATE_DTYPES)
        defaults = {
            **defaults,
            "l1": l1,
            "cautious": cautious,
            "centralize": centralize,
            "rounding": rounding,
            "rounding_seed": 0,
        }
        if average is not None:
            defaults["average_decay"] = average.decay
        self._check_all(defaults)
        warn_once_if_missing()
        self._plan: StepPlan | None = None
        self._stepped: list[Segment] = []
        self._counted = Progress()
        self._control: DeviceControl | None = None
        super().__init__(listed(self._owner, params), defaults)

    # --- what a rule says of itself ---

    def _rule(self, group: Group) -> Rule:
        """The rule of a group."""
        raise NotImplementedError

    def _held(self, group: Group) -> tuple[str, ...]:
        """Names of the state a group keeps for its rule."""
        return self._rule(group).states

    def _owns_decay(self, group: Group) -> bool:
        """Whether weight decay is part of the rule, and no stage around it."""
        return False

    def _check_group(self, group: Group) -> None:
        """Raises for a rule's own entry that is out of range."""
        raise NotImplementedError

    def _learn(self, observed: Tensor) -> None:
        """For a rule with an estimate: makes the next one of its sums over all parameters; shape (2,), fp64.

        On CUDA they are zero in a step that was skipped, and must not be waited for.
        """
        raise NotImplementedError

    # --- checks ---

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _check_all(self, group: Group) -> None:
        check_group(self._owner, group)
        self._check_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; nothing is changed if it does not fit."""
        if isinstance(param_group, dict):
            self._check_all({**self.defaults, **param_group})
            param_group = with_listed_params(param_group)
            check_params(self._owner, self.param_groups, param_group["params"])
        super().add_param_group(param_group)
        self._plan = None

    # --- the step ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient. Gradients are read, never written.

        A `torch.amp.GradScaler` hands over its scale and its verdict by the attributes `grad_scale` and `found_inf`.

        Args:
            closure: Reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._stepped = []
            bound = self._bind()
            if bound and all(isinstance(segment, CudaSegment) for segment in bound):
                self._step_on_device(cast("list[CudaSegment]", bound))
            elif bound:
                self._step_on_host(bound)
        return loss

    def _step_on_host(self, bound: list[Segment]) -> None:
        found_inf, loss_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) != 0:
            self._counted = self._counted.skipped(None)
            return
        scale = 1.0 if loss_scale is None else 1.0 / float(loss_scale)
        norm, coefficient = None, 1.0
        if self.clip is not None and self.clip.needs_norm:
            norm = _global_norm(bound, scale)
            if math.isnan(norm):
                self._counted = self._counted.skipped(norm)
                return
            coefficient = min(1.0, float(self.clip.norm_bound(torch.tensor(norm, dtype=torch.float64))) / (norm + 1e-6))
            scale *= coefficient
        assert self._plan is not None
        numbers = self._numbers(self._plan.clock + 1)
        parts = [segment.step(self.param_groups, numbers, scale, self.record_statistics) for segment in bound]
        self._finish(bound, numbers)
        norm_clipped, num_parts = None if norm is None else norm * coefficient, sum(part.num for part in parts)
        if num_parts:
            norm_clipped = scale * math.sqrt(sum(part.grad_sq for part in parts))
        self._counted = self._counted.stepped(norm, norm_clipped, clipped=coefficient < 1 or num_parts > 0)

    def _step_on_device(self, bound: "list[CudaSegment]") -> None:
        """The same without asking the device anything."""
        if self._control is None:
            self._control = DeviceControl(bound[0].entries[0].param.device)
        control = self._control
        control.found_inf, control.loss_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        control.norm = control.max_norm = None
        if self.clip is not None and self.clip.needs_norm:
            norms = [reduce_sum_(segment.norm_on_device(), segment.process_groups) for segment in bound]
            control.norm = norms[0] if len(norms) == 1 else torch.stack(norms).sum(0)
            control.bound_norm_by(self.clip)
            if self.clip.bounds.limits_parts:
                control.clipped.zero_()
        assert self._plan is not None
        numbers = self._numbers(self._plan.clock + 1, control.report.device)
        for segment in bound:
            is_last = segment is bound[-1]
            segment.step_on_device(
                self.param_groups, numbers, control, is_last=is_last, statistics=self.record_statistics
            )
        self._finish(bound, numbers)

    def _finish(self, stepped: Sequence[Segment], numbers: list[GroupNumbers]) -> None:
        self._stepped = list(stepped)
        if any(segment.rule.estimate is not None for segment in stepped):
            device = stepped[0].entries[0].param.device
            sums = [reduce_sum_(segment.observed().to(device), segment.process_groups) for segment in stepped]
            self._learn(torch.stack(sums).sum(0))
        assert self._plan is not None
        self._plan.clock += 1
        if self.average is not None:
            self._plan.average_idle(numbers)

    def _numbers(self, clock: int, device: torch.device | None = None) -> list[GroupNumbers]:
        """What the groups mean for optimizer step `clock`, from 1; rates that live on `device` stay there."""
        due = is_due(self.average, clock)
        return [
            read_group(
                group,
                self.clip,
                self.average,
                average_is_due=due,
                owns_decay=self._owns_decay(group),
                device=device,
            )
            for group in self.param_groups
        ]

    def progress(self) -> Progress:
        """Norms of the last step and counts of all. On CUDA this waits for the device."""
        if self._control is None:
            return self._counted
        norm, norm_clipped, steps, clipped, skipped = self._control.report.tolist()
        has_norm, before = self._control.norm is not None, self._counted
        return Progress(
            norm if has_norm else None,
            norm_clipped if has_norm else None,
            before.num_steps + int(steps),
            before.num_clipped + int(clipped),
            before.num_skipped + int(skipped),
        )

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
        counted: dict[int, TensorStatistics] = {}
        for segment in self._stepped:
            counted |= segment.statistics()
        return [counted.get(i) for i in range(sum(len(group["params"]) for group in self.param_groups))]

    def keep_average(self, average: Average | None) -> None:
        """Starts, replaces or stops the average that the step keeps."""
        self.average = average
        for group in [self.defaults, *self.param_groups]:
            if average is not None:
                group["average_decay"] = average.decay
            else:
                group.pop("average_decay", None)
        self._plan = None

    def resume_counting(self, steps: int) -> None:
        """Makes `steps` the least that a parameter was updated; a rule of torch that counts no steps leaves it out."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if float(state.get("step", 0.0)) < steps and not self._rule(group).counts_steps:
                    state["step"] = torch.full((), float(steps), dtype=torch.float32, device=param.device)
        self._plan = None

    def explain(self) -> Explanation:
        """Per group: rule, stages, dtypes, path and bytes moved. Print it."""
        return explain(self)

    # --- the plan ---

    def _bind(self) -> list[Segment]:
        """The segments with gradients, pointed at them; plans anew when the plan is missing or outdated."""
        if self._plan is None or self._plan.is_outdated():
            self._plan = StepPlan(self)
        try:
            return self._plan.bind()
        except PlanOutdated:
            self._plan = StepPlan(self)
            return self._plan.bind()

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        """The reason why a parameter takes the reference path, or None."""
        if group["fused"] is False:
            return "fused=False"
        treats_units = group["centralize"] or (self.clip is not None and math.isfinite(self.clip.bounds.unit_ratio))
        param = local(param)
        return why_not_compiled(param) or (why_no_units(param) if treats_units else None)

    # --- saving ---

    def state_dict(self) -> dict[str, Any]:
        """As in torch; a clip that learns from the gradients it sees is under "clip"."""
        state_dict = super().state_dict()
        return {**state_dict, "clip": self.clip.state_dict()} if isinstance(self.clip, LearningClip) else state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's class of the same rule.

        Raises:
            ValueError: if it belongs to another rule or other groups; nothing is changed then.
        """
        pre_hooks, post_hooks = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = state_dict.copy()
        for pre_hook in pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        check_state_dict(self, state_dict)
        defaults = [dict(group) for group in self.param_groups]
        # The hooks are ours to call: before the check, and after the state has its own dtypes again.
        self._optimizer_load_state_dict_pre_hooks = OrderedDict()
        self._optimizer_load_state_dict_post_hooks = OrderedDict()
        try:
            super().load_state_dict(state_dict)
        finally:
            self._optimizer_load_state_dict_pre_hooks = pre_hooks
            self._optimizer_load_state_dict_post_hooks = post_hooks
        complete_groups(self, defaults)
        restore_state(self, state_dict, StateLayout(self.average, self.state_dtype))
        if isinstance(self.clip, LearningClip) and "clip" in state_dict:
            self.clip.load_state_dict(state_dict["clip"])
        self._plan = None
        for post_hook in post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: no plan, since it holds addresses."""
        kept = ("clip", "average", "state_dtype", "record_statistics")
        counted = {"_counted": self.progress().counts()}
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}, **counted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what was kept; the plan is built at the next step."""
        super().__setstate__(state)
        self._plan = self._control = None
        self._stepped = []


def _global_norm(bound: Sequence[Segment], scale: float) -> float:
    """L2 norm of all gradients, times `scale`; NaN if an element is not finite."""
    squares = nonfinite = 0.0
    for segment in bound:
        sums: Sequence[float] = segment.norm()
        if segment.process_groups:
            here = torch.tensor(sums, dtype=torch.float64, device=segment.entries[0].param.device)
            sums = reduce_sum_(here, segment.process_groups).tolist()
        squares, nonfinite = squares + sums[0], nonfinite + sums[1]
    return float("nan") if nonfinite > 0 else float(scale * squares**0.5)
