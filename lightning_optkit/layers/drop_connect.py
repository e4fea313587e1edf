# SPDX-License-Identifier: Apache-2.0
"""Dropout of weights instead of activations.

Source: Wan, Zeiler, Zhang, LeCun & Fergus 2013, "Regularization of Neural Networks using DropConnect" (ICML); on the
recurrent weights of an LSTM: Merity, Keskar & Socher 2018 (arXiv 1708.02182). As in the latter, kept weights are scaled
up and evaluation uses the mean weights; Wan et al. sample at inference.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lightning_optkit._checks import check_in, check_listed, check_module, check_text, shown
from lightning_optkit._torch_private import flat_weights

__all__ = ["DropConnect"]


class DropConnect(nn.Module):
    """Runs `module` with random elements of its named weights zeroed, drawn anew in every training call.

    A recurrent layer uses the same mask at all time steps. Parametrized weights (`weight_norm`, `spectral_norm`) are
    dropped after their parametrization. In evaluation mode, and for `p=0`, it behaves like `module`.

    Args:
        module: Any module; available as `.module`.
        weights: Names of its parameters, e.g. "weight", "weight_hh_l0" or "rnn.weight_hh_l0".
        p: Probability that a weight is zeroed, in [0, 1]; kept weights are scaled up. May be changed at any time.

    Raises:
        TypeError: if `p` is not a number.
        ValueError: if `p` is out of range, or a name is not a parameter of `module`.

    Example:
        >>> import torch
        >>> layer = DropConnect(nn.LSTM(4, 8), weights=["weight_hh_l0"], p=0.5)
        >>> output, state = layer(torch.ones(5, 2, 4))
        >>> output.shape
        torch.Size([5, 2, 8])
    """

    def __init__(self, module: nn.Module, weights: Sequence[str] = ("weight",), p: float = 0.5) -> None:
        super().__init__()
        self.p = check_in(
            type(self).__name__, "p", p, "[0, 1]"
        )  # checked here: nn.Module would register a module passed by mistake
        check_module(type(self).__name__, "module", module)
        such_as = 'names of parameters, such as ["weight"]'
        listed = (
            [weights]
            if isinstance(weights, str)
            else check_listed(type(self).__name__, "weights", weights, such_as, member=" parameter")
        )
        names = tuple(check_text(type(self).__name__, "weights", name, such_as) for name in listed)
        self.weights = names
        self._plain: list[str] = []
        self._recurrent: list[str] = []
        self._parametrized: list[str] = []
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for name in names:
            path, _, last = name.rpartition(".")
            prefix = f"{path}.parametrizations.{last}.".lstrip(".")
            if any(key.startswith(prefix) for key in parameters):
                self._parametrized.append(name)
            elif name not in parameters:
                known = ", ".join([*parameters][:12]) + (", ..." if len(parameters) > 12 else "") or "none"
                raise ValueError(
                    f"{type(self).__name__}(weights={shown(name)}): must name a parameter of the module, one of "
                    f"{known}."
                )
            elif isinstance(module.get_submodule(path), nn.RNNBase):
                self._recurrent.append(name)
            else:
                self._plain.append(name)
        self.module = module
        for name in self._parametrized:
            path, _, last = name.rpartition(".")
            owner = module.get_submodule(path)
            if isinstance(owner, nn.RNNBase):
                raise ValueError(
                    f"{type(self).__name__}(weights={shown(name)}): torch's recurrent layers do not see "
                    "parametrizations; remove it from this weight."
                )
            parametrize.register_parametrization(owner, last, _Drop(self), unsafe=True)

    @property
    def p(self) -> float:
        """Probability that a weight is zeroed."""
        return self._p

    @p.setter
    def p(self, value: float) -> None:
        self._p = check_in(type(self).__name__, "p", value, "[0, 1]")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the result of `module`."""
        if not self.training or self._p == 0.0:
            return self.module(*args, **kwargs)
        dropped = {name: F.dropout(self._weight(name), self._p) for name in self._plain}
        with self._dropped_recurrent(), parametrize.cached():
            if not dropped:
                return self.module(*args, **kwargs)
            return functional_call(self.module, dropped, args, kwargs)

    def _weight(self, name: str) -> Tensor:
        """The parameter, or the tensor that `torch.func.functional_call` has substituted for it."""
        path, _, last = name.rpartition(".")
        weight: Tensor = getattr(self.module.get_submodule(path), last)
        return weight

    @contextmanager
    def _dropped_recurrent(self) -> Iterator[None]:
        """Recurrent layers read their weights from a list of their own, which functional_call does not replace."""
        undo: list[tuple[list[Any], int, Any]] = []
        try:
            for name in self._recurrent:
                path, _, last = name.rpartition(".")
                owner: Any = self.module.get_submodule(path)
                flat, names = flat_weights(owner)
                place = names.index(last)
                undo.append((flat, place, flat[place]))
                flat[place] = F.dropout(self._weight(name), self._p)
            yield
        finally:
            for flat, place, weight in undo:
                flat[place] = weight

    def extra_repr(self) -> str:
        """The arguments, for `repr`."""
        return f"weights={list(self.weights)}, p={self._p}"


class _Drop(nn.Module):
    """The last parametrization of an already parametrized weight. It adds nothing to the state dict."""

    def __init__(self, owner: DropConnect) -> None:
        super().__init__()
        self._owner = (owner,)  # in a tuple: a plain attribute would register a child, and so a cycle of modules

    def forward(self, weight: Tensor) -> Tensor:
        owner = self._owner[0]
        return F.dropout(weight, owner._p) if owner.training and owner._p > 0.0 else weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight
