# SPDX-License-Identifier: Apache-2.0
"""The optimizer that every rule of this package is: one walk over the parameters for the rule and all its stages."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_optkit._checks import check_in, check_one_of
from lightning_optkit._native import warn_once_if_missing
from lightning_optkit.step.explain import Explanation, explain
from lightning_optkit.step.loading import check_state_dict, complete_groups, restore_state
from lightning_optkit.step.numbers import ROUNDINGS, read_group
from lightning_optkit.step.rule import Average, Clip, Group, Rule
from lightning_optkit.step.segments import CompiledSegment, Entry, PlanOutdated, ReferenceSegment, why_not_compiled
from lightning_optkit.step.state import StateLayout, create_missing_state
from lightning_optkit.step.statistics import TensorStatistics

__all__ = ["OnePassOptimizer"]

Segment = CompiledSegment | ReferenceSegment


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
        rounding: How 16-bit parameters are stored: "nearest", "stochastic", or "kahan" (one more 16-bit number per
            element that keeps what was cut off). With fp32 parameters stochastic is nearest.
        state_dtype: torch.float32 or torch.bfloat16; the state of fp64 parameters is fp64.
        statistics: Count norms and lost updates per tensor in the same pass; read them by `statistics()`.

    Raises:
        ValueError: for an argument out of range, an empty parameter list, a parameter given twice, or two devices.
    """

    torch_class: ClassVar[type[Optimizer] | None] = None
    """The torch.optim class with the same rule, whose state dicts are exchangeable."""

    def __init__(
        self,
        params: ParamsT,
        defaults: Group,
        *,
        clip: Clip | None,
        average: Average | None,
        l1: float,
        cautious: bool,
        rounding: str,
        state_dtype: torch.dtype,
        statistics: bool,
    ) -> None:
        self.clip, self.average, self.state_dtype = clip, average, state_dtype
        self.record_statistics = statistics
        check_one_of(self._owner, "state_dtype", state_dtype, (torch.float32, torch.bfloat16))
        defaults = {
            **defaults,
            "l1": l1,
            "cautious": cautious,
            "rounding": rounding,
            "rounding_seed": 0,
        }
        if average is not None:
            defaults["average_decay"] = average.decay
        self._check_all(defaults)
        warn_once_if_missing()
        self._segments: list[Segment] | None = None
        self._planned_state: object = None
        self._norm: float | None = None
        self._coefficient = 1.0
        self.num_steps = self.num_clipped = self.num_skipped = 0
        super().__init__(self._listed(params), defaults)

    # --- what a rule says of itself ---

    def _rule(self, group: Group) -> Rule:
        """The rule of a group."""
        raise NotImplementedError

    def _held(self, group: Group) -> tuple[str, ...]:
        """Names of the state a group keeps for its rule."""
        return self._rule(group).states

    def _check_group(self, group: Group) -> None:
        """Raises for a rule's own entry that is out of range."""
        raise NotImplementedError

    # --- checks ---

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _check_all(self, group: Group) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{self._owner}(lr={list(lr.shape)} tensor): lr must be a number or a 1-element tensor.")
        check_in(self._owner, "lr", float(lr), "[0, inf)")
        check_in(self._owner, "weight_decay", float(group["weight_decay"]), "[0, inf)")
        check_in(self._owner, "l1", group["l1"], "[0, inf)")
        check_one_of(self._owner, "cautious", group["cautious"], (False, True))
        check_one_of(self._owner, "rounding", group["rounding"], ROUNDINGS)
        if group["differentiable"]:
            raise ValueError(f"{self._owner}(differentiable=True): must be False; the step writes in place.")
        if group["fused"] and group["foreach"]:
            raise RuntimeError(f"{self._owner}(fused=True, foreach=True): at most one of the two can be True.")
        self._check_group(group)

    def _listed(self, params: ParamsT) -> list[Any]:
        """`params` as a list, so that an empty one is found before anything is built."""
        if isinstance(params, Tensor):
            raise TypeError(f"{self._owner}(params=<Tensor>): params must be an iterable of parameters or of groups.")
        listed = list(params)
        if not listed:
            raise ValueError(f"{self._owner}(params=[]): params must hold at least one parameter.")
        return listed

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch; nothing is changed if it does not fit."""
        if isinstance(param_group, dict):
            self._check_all({**self.defaults, **param_group})
            given = param_group["params"]
            if not isinstance(given, Tensor | set):
                param_group = {**param_group, "params": list(given)}
            self._check_params(param_group["params"])
        super().add_param_group(param_group)
        self._segments = None

    def _check_params(self, params: Any) -> None:
        new = [p[1] if isinstance(p, tuple) else p for p in ([params] if isinstance(params, Tensor) else params)]
        known = [p for group in self.param_groups for p in group["params"]]
        tensors = [p for p in [*known, *new] if isinstance(p, Tensor)]
        if len({id(p) for p in tensors}) != len(tensors):
            raise ValueError(f"{self._owner}(params=...): a parameter is given twice; each belongs to one group, once.")
        devices = sorted({str(p.device) for p in tensors} - {"meta"})
        if len(devices) > 1:
            raise ValueError(f"{self._owner}(params=...): all parameters must be on one device, got {devices}.")

    # --- the step ---

    @torch.no_grad()
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
        bound = self._bind()
        if not bound:
            return loss
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:
            self.num_skipped += 1
            return loss
        loss_scale = getattr(self, "grad_scale", None)
        scale = 1.0 if loss_scale is None else 1.0 / float(loss_scale)
        if self.clip is not None and self.clip.needs_norm:
            clipped = self._clip_coefficient(bound, scale)
            if clipped is None:
                self.num_skipped += 1
                return loss
            scale *= clipped
        numbers = [read_group(group, self.clip, self.average) for group in self.param_groups]
        for segment in bound:
            segment.step(self.param_groups, numbers, scale, self.record_statistics)
        self.num_steps += 1
        return loss

    def _clip_coefficient(self, bound: list[Segment], scale: float) -> float | None:
        """The clip's factor; None if a gradient is not finite, and the step must be skipped."""
        assert self.clip is not None
        norms = [segment.norm() for segment in bound]
        self._norm = scale * sum(square for square, _ in norms) ** 0.5
        if sum(nonfinite for _, nonfinite in norms) > 0:
            self._norm = float("nan")
            return None
        self._coefficient = self.clip.coefficient(self._norm)
        self.num_clipped += self._coefficient < 1.0
        return self._coefficient

    @property
    def grad_norm(self) -> float | None:
        """Global L2 norm of the last step's gradients, unscaled, before clipping; None without a clip."""
        return self._norm

    @property
    def grad_norm_clipped(self) -> float | None:
        """The same after clipping."""
        return None if self._norm is None else self._norm * self._coefficient

    def statistics(self) -> list[TensorStatistics | None]:
        """Per parameter, in the order of the groups: what the last step counted; None where there was no gradient.

        Raises:
            RuntimeError: if the optimizer was built without `statistics=True`.
        """
        if not self.record_statistics:
            raise RuntimeError(f"{self._owner}.statistics(): build the optimizer with statistics=True.")
        counted: dict[int, TensorStatistics] = {}
        for segment in self._segments or []:
            counted |= segment.statistics()
        return [counted.get(i) for i in range(sum(len(group["params"]) for group in self.param_groups))]

    def keep_average(self, average: Average | None) -> None:
        """Starts, replaces or stops the average that the step keeps."""
        self.average = average
        for group in [self.defaults, *self.param_groups]:
            if average is not None:
                group["average_decay"] = average.decay
        self._segments = None

    def explain(self) -> Explanation:
        """Per group: rule, stages, dtypes, path and bytes moved. Print it."""
        return explain(self)

    # --- the plan ---

    def _bind(self) -> list[Segment]:
        """The segments with gradients, pointed at them; builds the plan when it is missing or outdated."""
        if self._is_outdated():
            self._build()
        try:
            return self._bind_segments()
        except PlanOutdated:
            self._build()
            return self._bind_segments()

    def _bind_segments(self) -> list[Segment]:
        return [segment for segment in self._segments or [] if segment.bind()]

    def _is_outdated(self) -> bool:
        if self._segments is None or self._planned_state is not self.state:
            return True
        if any(p.grad is not None for p in self._dormant):
            return True
        # Bulk replacements of the state (a move to another device and back) replace every entry: two tell.
        return any(self.state.get(p) is not state for p, state in self._sample)

    def _build(self) -> None:
        layout = StateLayout(self.average, self.state_dtype)
        entries: list[tuple[Entry, Group]] = []
        self._dormant: list[Tensor] = []
        for group_index, group in enumerate(self.param_groups):
            for param in group["params"]:
                if param.grad is None and not self.state.get(param):
                    self._dormant.append(param)
                else:
                    index = len(entries) + len(self._dormant)
                    entries.append((Entry(param, self.state[param], group_index, index), group))
        create_missing_state([(entry, group, self._held(group)) for entry, group in entries], layout)
        self._segments = self._segmented(entries, layout.average_name)
        self._planned_state = self.state
        self._sample = [(e.param, e.state) for e, _ in (entries[:1] + entries[-1:])]

    def _segmented(self, entries: Iterable[tuple[Entry, Group]], average_name: str | None) -> list[Segment]:
        compiled: dict[tuple[str, bool], tuple[Rule, list[Entry]]] = {}
        reference: dict[str, tuple[Rule, list[Entry]]] = {}
        for entry, group in entries:
            rule = self._rule(group)
            if self._why_reference(entry.param, group) is None:
                key = (rule.name, entry.param.dtype == torch.float64)
                compiled.setdefault(key, (rule, []))[1].append(entry)
            else:
                reference.setdefault(rule.name, (rule, []))[1].append(entry)
        segments: list[Segment] = [
            CompiledSegment(rule, members, average_name, self._owner) for rule, members in compiled.values()
        ]
        segments += [ReferenceSegment(rule, members, average_name) for rule, members in reference.values()]
        return segments

    def _why_reference(self, param: Tensor, group: Group) -> str | None:
        return "fused=False" if group["fused"] is False else why_not_compiled(param)

    # --- saving ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of torch's class of the same rule.

        Raises:
            ValueError: if it belongs to another rule or other groups; nothing is changed then.
        """
        check_state_dict(self, state_dict)
        defaults = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        complete_groups(self, defaults)
        restore_state(self, state_dict, StateLayout(self.average, self.state_dtype))
        self._segments = None

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep: no plan, since it holds addresses."""
        kept = ("clip", "average", "state_dtype", "record_statistics", "num_steps", "num_clipped", "num_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what was kept; the plan is built at the next step."""
        super().__setstate__(state)
        self._segments = None
        self._norm, self._coefficient = None, 1.0
