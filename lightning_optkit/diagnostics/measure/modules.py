# SPDX-License-Identifier: Apache-2.0
"""Which modules a step calls, in which mode, and which of them is the first to give a number that is not finite."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_optkit._torch_private import is_transformed
from lightning_optkit.diagnostics._guard import Guarding, unguarded
from lightning_optkit.diagnostics._observations import ModuleSeen
from lightning_optkit.diagnostics.measure.batches import counted_nonfinite, tensors_of
from lightning_optkit.diagnostics.measure.module_calls import ModuleCalls
from lightning_optkit.diagnostics.measure.parameters import plain_name

__all__ = ["CalledModules", "FirstNonfinite", "drops"]

_DROPOUTS = (
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def drops(module: nn.Module) -> bool:
    """Whether it is a dropout with a rate above 0."""
    return isinstance(module, _DROPOUTS) and module.p > 0


class CalledModules:
    """Watches the calls of modules until `close`.

    Args:
        modules: Modules by name, as of `named_modules()`; the root, of name "", is left out.
        guard: What stands around what is done in them.
    """

    def __init__(self, modules: Mapping[str, nn.Module], guard: Guarding = unguarded) -> None:
        self.guard, self._modules = guard, modules
        self.calls: dict[str, ModuleSeen] = {}
        self.without_grad: set[str] = set()
        self._watch = ModuleCalls(modules, before=self._guarded)

    def close(self) -> None:
        """Watches no longer; no-op the second time."""
        self._watch.close()

    def called(self, name: str, module: nn.Module) -> None:
        """A call of `module`; of several, the first counts."""
        plain = plain_name(name)
        if plain in self.calls:
            return
        if not torch.is_grad_enabled():
            self.without_grad.add(plain)
        kind, acts, is_fresh = _kind(module)
        parent = self._modules.get(name.rpartition(".")[0], module)
        is_trained = kind == "other" or any(p.requires_grad for p in parent.parameters())
        self.calls[plain] = ModuleSeen(plain, kind, module.training, acts, is_trained, is_fresh)

    def _guarded(self, name: str, module: nn.Module, args: Any) -> None:
        with self.guard("the look at modes"):
            self.called(name, module)


def _kind(module: nn.Module) -> tuple[Literal["dropout", "batch norm", "other"], bool, bool]:
    if isinstance(module, _DROPOUTS):
        return "dropout", drops(module), False
    if isinstance(module, _BATCH_NORMS) and module.running_mean is not None and module.running_var is not None:
        is_fresh = (
            not module.training
            and not is_transformed()
            and bool((module.running_mean == 0).all() & (module.running_var == 1).all())
        )
        return "batch norm", True, is_fresh
    return "other", False, False


class FirstNonfinite:
    """Finds the first module below `root` with an output that is not finite, until `close`.

    If its input is not finite either, and no module gave that, it comes from what is computed before it (`is_before`).
    Masks of attention hold minus infinity, so outputs of nothing else are passed over.
    """

    def __init__(self, root: nn.Module) -> None:
        self.name: str | None = None
        self.is_before = False
        self.detail = ""
        self._watch = ModuleCalls(dict(root.named_modules()), after=self._finished)

    def close(self) -> None:
        """Watches no longer; no-op the second time."""
        self._watch.close()

    def _finished(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self.name is not None or all(map(_is_good, tensors_of(output))):
            return
        given = [t for t in tensors_of(args) if t.is_floating_point() and not bool(t.isfinite().all())]
        self.name, self.is_before = plain_name(name), bool(given)
        bad = given or [t for t in tensors_of(output) if not _is_good(t)]
        what, of = "input" if given else "output", f"{self.name} ({type(module).__name__})"
        self.detail = f"infinite or NaN: {counted_nonfinite(bad[0])} of the {what} of {of}"


def _is_good(t: Tensor) -> bool:
    return not t.is_floating_point() or bool((t.isfinite() | (t == -torch.inf)).all())
