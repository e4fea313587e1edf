# SPDX-License-Identifier: Apache-2.0
"""Clips gradients with any clip of this package, for any optimizer and precision.

In a one-pass optimizer the clip is part of the step. Otherwise it replaces Lightning's own clipping, where gradients
are unscaled, and synchronized between processes.
"""

import copy
import fnmatch
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from lightning_optkit._checks import check_like, check_listed, check_state, check_text, shown
from lightning_optkit._torch_private import set_amp_scaling, supports_amp_scaling
from lightning_optkit.callbacks.seams.callbacks_of import callbacks_of
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import is_overridden
from lightning_optkit.callbacks.seams.lightning_private import key_of_state
from lightning_optkit.callbacks.seams.resumed_clips import match_clips
from lightning_optkit.callbacks.seams.steps import StepListener, watch_steps
from lightning_optkit.clipping import AutoClip, ClipNorm, ClipPerTensor, ClipUnitwise, ClipValue, ZClip
from lightning_optkit.clipping._gradients import gradients, norm_of
from lightning_optkit.optimizers._group_rules import unwrapped
from lightning_optkit.step import OnePassOptimizer, StatefulClip

__all__ = ["GradientClipping"]

AnyClip = AutoClip | ClipNorm | ClipPerTensor | ClipUnitwise | ClipValue | ZClip


class GradientClipping(FitCallback):
    """Clips the gradients of an unchanged module before every optimizer step, and logs the effect.

    With `Fuse`, or an optimizer of this package, the clip is part of the step: no gradient is written. For any other
    optimizer it changes the gradients in place, where Lightning would clip, and says so. The results are the same, also
    of parameters sharded by FSDP2.

    Logged as `grad_norm`, `grad_norm_clipped` (global L2 norms) and `clip_fraction` (fraction of the steps of this fit,
    counted anew if it is resumed, whose gradients were scaled down, at least partly) at every `log_every_n_steps`-th
    step, if there is a logger. Outside of a one-pass step they are measured only at the logged steps. `ClipValue` in a
    one-pass step needs no norm, so nothing is logged for it.

    A non-finite gradient skips a one-pass step (except with `ClipValue`); any other optimizer applies it, as in torch.

    A batch without gradients (`training_step` returned None) or a step skipped by the loss scaler neither changes the
    state of a clip nor is logged.

    Args:
        clip: `ClipNorm`, `ClipValue`, `ClipUnitwise`, `ClipPerTensor`, `AutoClip` or `ZClip`. Each optimizer of the
            module gets a copy, which an optimizer that replaces it takes over; its state is saved in checkpoints.
        leave_out: fnmatch patterns of names of parameters that are not clipped, such as `["head.*"]`: the authors of
            `ClipUnitwise` leave out the last linear layer. Their gradients are not part of a norm, except to detect
            non-finite ones. Names are looked up when the step is planned, as after any change of the parameters.

    Raises:
        TypeError: if `clip` is not a clip, or `leave_out` not a list of patterns.
        ValueError: when the fit starts, for a pattern that matches no parameter, with
            `Trainer(gradient_clip_val=...)`, a module or an optimizer that clips itself, or a second
            `GradientClipping`; with manual optimization without a one-pass optimizer; and during a fit, if the module
            calls `clip_gradients`.

    Example:
        >>> from lightning_optkit.clipping import AutoClip
        >>> trainer = pl.Trainer(callbacks=[GradientClipping(AutoClip(10))], logger=False, enable_checkpointing=False)
    """

    def __init__(self, clip: AnyClip, leave_out: Sequence[str] = ()) -> None:
        check_like(type(self).__name__, "clip", clip, ("norm_bound", "bounds"), "a clip such as ClipNorm(1.0)")
        self.clip = clip
        such_as = 'a list of patterns of names, such as ["head.*"]'
        self.leave_out = tuple(check_listed(type(self).__name__, "leave_out", leave_out, such_as, empty=True))
        for pattern in self.leave_out:
            check_text(type(self).__name__, "leave_out", pattern, such_as)
        self._learned: list[dict[str, Any]] = []
        self._reset()

    def _reset(self) -> None:
        self._clips: dict[int, AnyClip] = {}  # by index in `trainer.optimizers`
        self._folded: dict[int, OnePassOptimizer] = {}  # whose step clips, by the same index
        self._called: dict[Optimizer, int] = {}  # whose clip is a pass of its own, with the same index
        self._scaled: list[tuple[Optimizer, type[Optimizer]]] = []  # of these, those that unscaled by themselves
        self._measuring: dict[Optimizer, tuple[Tensor, Tensor]] = {}  # norms of the step about to be taken
        self._measured: dict[str, Tensor | float] = {}
        self._num_measured = self._num_clipped = self._logged_step = 0

    @property
    def state_key(self) -> str:
        """Includes the clip, so that a second one is refused by our own error, not by Lightning's."""
        return key_of_state(self, clip=repr(self.clip))

    def state_dict(self) -> dict[str, Any]:
        """The state of the clips, one entry per optimizer; empty for stateless clips."""
        clips = [self._clips[place] for place in sorted(self._clips)]
        learned = [clip.state_dict() for clip in clips if isinstance(clip, StatefulClip)]
        return {"learned": learned or self._learned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the state, in the fit that is about to start or in the current one."""
        self._learned = list(check_state(type(self).__name__, state_dict, learned=list)["learned"])
        for learned in self._learned:  # tried on a copy, so that errors are raised now and not when the fit starts
            clip = copy.deepcopy(self.clip)
            if isinstance(clip, StatefulClip):
                self._try(clip, learned)
        for place, learned in enumerate(self._learned):  # a finder restores the previous state
            active = self._clips.get(place)
            if isinstance(active, StatefulClip):
                active.load_state_dict(learned)

    @property
    def clips(self) -> dict[int, AnyClip]:
        """The clips of the current fit, by the index of their optimizer in `trainer.optimizers`."""
        return dict(self._clips)

    def replace_clip(self, place: int, clip: AnyClip) -> None:
        """Replaces a clip; no-op after the fit."""
        if place in self._clips:
            self._clips[place] = clip
            folded = self._folded.get(place)
            if isinstance(folded, OnePassOptimizer):  # Fuse may have been undone already
                folded.clip = clip

    def _try(self, clip: StatefulClip, learned: Any) -> None:
        try:
            clip.load_state_dict(learned)
        except (TypeError, ValueError) as error:
            call = f"{type(self).__name__}.load_state_dict(state_dict['learned']=[..., {shown(learned)}])"
            raise type(error)(f"{call}: it must be what {type(clip).__name__} learned; {error}") from None

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._learned = []
        owner = f"{type(self).__name__}({self.clip!r})"
        others = callbacks_of(trainer, GradientClipping, but=self)
        if others:
            raise ValueError(f"{owner}: given twice, also as GradientClipping({others[0].clip!r}); keep one.")
        self._refuse_trainers(trainer.gradient_clip_val)
        if is_overridden("configure_gradient_clipping", pl_module):
            raise ValueError(f"{owner}: the module clips in configure_gradient_clipping; keep one.")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        learned = self._learned
        self._reset()
        self._learned = learned
        self._at_end(self._give_back)
        self._left_out(pl_module)  # a pattern that matches nothing is refused before the first step
        self._take_over(trainer, pl_module)
        joins, counts = partial(self._join, pl_module), self._count if trainer.loggers else None
        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, joins=joins, counts=counts)).remove)
        names = ", ".join(type(optimizer).__name__ for optimizer in self._called)
        if names:
            rank_zero_info(f"{type(self).__name__}({self.clip!r}): a pass of its own over the gradients of {names}.")

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if trainer.training:
            match_clips(checkpoint, type(self).__name__, self.state_key, self.clip)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._logged_step or not trainer.loggers or not self._is_log_step(trainer, step):
            return
        self._logged_step = step
        for index, optimizer in self._folded.items():
            suffix = f"/{index}" if len(self._folded) > 1 else ""
            self._measured |= {name + suffix: value for name, value in _values_of(optimizer).items()}
        pl_module.log_dict(self._measured, on_step=True, on_epoch=False)

    # --- implementation ---

    def _join(self, pl_module: pl.LightningModule, optimizer: Optimizer, place: int) -> None:
        self._check(pl_module, optimizer)
        clip = self._clips.get(place)
        if clip is None:
            clip = self._clips[place] = copy.deepcopy(self.clip)
            if isinstance(clip, StatefulClip) and place < len(self._learned):
                clip.load_state_dict(self._learned[place])
        self._called = {other: at for other, at in self._called.items() if at != place}
        self._let_go(self._folded.pop(place, None))
        if isinstance(optimizer, OnePassOptimizer):
            optimizer.clip = clip
            optimizer.leaves_out = partial(self._left_out, pl_module) if self.leave_out else None
            self._folded[place] = optimizer
            return
        self._called[optimizer] = place
        if supports_amp_scaling(optimizer):
            # A fused optimizer that unscales itself would pass scaled gradients to the clip.
            self._scaled.append((optimizer, type(optimizer)))
            set_amp_scaling(optimizer, False)

    def _check(self, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        name = type(optimizer).__name__
        if isinstance(optimizer, OnePassOptimizer) and optimizer.clip is not None:
            raise ValueError(
                f"{type(self).__name__}({self.clip!r}): {name}(clip={optimizer.clip!r}) clips too; keep one."
            )
        if not pl_module.automatic_optimization and not isinstance(optimizer, OnePassOptimizer):
            raise ValueError(
                f"{type(self).__name__}({self.clip!r}): under manual optimization {name} is out of reach; add "
                "Fuse(), or call the clip on the parameters before the step."
            )

    def _take_over(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def configure_gradient_clipping(
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            self._refuse_trainers(gradient_clip_val)  # it may have been set since
            if optimizer in self._called:
                self._clip(trainer, pl_module, optimizer)

        def clip_gradients(
            optimizer: Optimizer,
            gradient_clip_val: float | None = None,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            if gradient_clip_val:  # of manual optimization: else Lightning calls it from the hook above
                raise ValueError(
                    f"{type(self).__name__}({self.clip!r}): clip_gradients(gradient_clip_val={gradient_clip_val}) in "
                    "training_step clips too; keep one."
                )

        self._override(pl_module, "configure_gradient_clipping", configure_gradient_clipping)
        self._override(pl_module, "clip_gradients", clip_gradients)

    def _refuse_trainers(self, gradient_clip_val: float | None) -> None:
        if (gradient_clip_val or 0) > 0:
            name = type(self).__name__
            raise ValueError(
                f"{name}({self.clip!r}): Trainer(gradient_clip_val={gradient_clip_val}) clips too; keep one. Without "
                f"{name} the Trainer clips as before, and Fuse() makes that a part of the step."
            )

    def _left_out(self, pl_module: pl.LightningModule) -> set[Tensor]:
        """The parameters that are not clipped; names are looked up now, since modules may have been replaced."""
        found: set[Tensor] = set()
        named = [(unwrapped(name), p) for name, p in pl_module.named_parameters(remove_duplicate=False)]
        for pattern in self.leave_out:
            matches = {p for name, p in named if fnmatch.fnmatchcase(name, pattern)}
            if not matches:
                such_as = ", ".join(name for name, _ in named[:3])
                raise ValueError(
                    f"{type(self).__name__}(leave_out=[{pattern!r}]): the pattern matches no parameter; names are such "
                    f"as {such_as}."
                )
            found |= matches
        return found

    def _clip(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        left_out = self._left_out(pl_module) if self.leave_out else set()
        params = [p for p in params if p not in left_out]
        measures = bool(trainer.loggers) and self._is_log_step(trainer, trainer.global_step + 1)
        before = norm_of(gradients(type(self).__name__, params)) if measures else None
        self._clips[self._called[optimizer]](params)
        if before is not None:
            self._measuring[optimizer] = before, norm_of(gradients(type(self).__name__, params))

    def _count(self, optimizer: Optimizer, place: int) -> None:
        """Counts a measured step only now, since the loss scaler may have skipped it."""
        if optimizer in self._measuring:
            before, after = self._measuring.pop(optimizer)
            self._num_measured += 1
            self._num_clipped += bool(after < before * (1 - 1e-6))
            share = self._num_clipped / self._num_measured
            self._measured = {"grad_norm": before, "grad_norm_clipped": after, "clip_fraction": share}

    @staticmethod
    def _is_log_step(trainer: pl.Trainer, step: int) -> bool:
        # Not `logs_now`, which tells of the batch that runs: norms are measured right before a step and logged after
        # it, and a step may take several batches.
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step % max(every, 1) == 0

    def _give_back(self) -> None:
        for optimizer, kind in self._scaled:
            if type(optimizer) is kind:  # Fuse may have been undone already
                set_amp_scaling(optimizer, True)
        for folded in self._folded.values():
            self._let_go(folded)

    @staticmethod
    def _let_go(folded: OnePassOptimizer | None) -> None:
        if isinstance(folded, OnePassOptimizer):  # Fuse may have been undone already
            folded.clip = folded.leaves_out = None

    def _forget(self) -> None:
        self._learned = self.state_dict()["learned"]
        self._reset()


def _values_of(optimizer: OnePassOptimizer) -> dict[str, float]:
    progress = optimizer.progress()
    share = {"clip_fraction": progress.num_clipped / max(progress.num_steps, 1)}
    if progress.grad_norm is None or progress.grad_norm_clipped is None:
        return {}  # a clip by value needs no norm, and counts nothing
    return {"grad_norm": progress.grad_norm, "grad_norm_clipped": progress.grad_norm_clipped, **share}
