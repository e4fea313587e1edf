# SPDX-License-Identifier: Apache-2.0
"""The storage of every fitted transform, and shared checks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_optkit._checks import check_bools, iterate, kind_shown
from lightning_optkit.data.merge_across_ranks import Mergeable, merge_across_ranks

__all__ = [
    "Statistics",
    "check_features",
    "check_mergeable",
    "feature_rows",
    "fit_batches",
    "output_dtype",
    "require_finite_fit",
    "require_fitted",
    "require_open",
    "to_feature_dim",
]


class Statistics(nn.Module):
    """Named float64 buffers, empty until first written; accessed like a dictionary.

    Unlike ordinary buffers they take their shapes from the state dict that is loaded, and stay in float64 when the
    module around them is cast (`.half()`, `.to(torch.bfloat16)`): a mean of 1e9 needs the precision.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_buffer(name, torch.empty(0, dtype=torch.float64))

    def __getitem__(self, name: str) -> Tensor:
        value = getattr(self, name)
        assert isinstance(value, Tensor)
        return value

    def __setitem__(self, name: str, value: Tensor) -> None:
        setattr(self, name, value.detach().to(self[name].device, torch.float64))

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Writes several buffers."""
        for name, value in values.items():
            self[name] = value

    def clear(self, *names: str) -> None:
        """Empties the named buffers, or all of them."""
        for name in names or tuple(self.named()):
            self[name] = self[name].new_empty(0)

    def named(self) -> dict[str, Tensor]:
        """All buffers by name."""
        return dict(self.named_buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Statistics":
        before = self.named()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, moved in self.named().items():
            exact = moved.double() if before[name].is_meta else before[name].to(moved.device)
            setattr(self, name, exact)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self.named().items():
            if isinstance(state_dict.get(prefix + name), Tensor):
                setattr(self, name, buffer.new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Fittable(Mergeable, Protocol):
    stats: Statistics

    @property
    def num_features(self) -> int: ...
    def extra_repr(self) -> str: ...
    def partial_fit(self, x: Tensor) -> object: ...
    def finalize(self) -> object: ...


def fit_batches(transform: _Fittable, batches: Tensor | Iterable[Tensor], across_ranks: bool) -> None:
    """Discards the old fit and fits in one pass over `batches` (a tensor is one batch).

    If that fails, the old fit is restored.
    """
    owner = f"{type(transform).__name__}.fit"
    check_bools(owner, across_ranks=across_ranks)
    such_as = "a tensor (N, D), or an iterable of them such as a DataLoader"
    reading = iter([batches]) if isinstance(batches, Tensor) else iterate(owner, "batches", batches, such_as)
    before = transform.stats.named()
    transform.stats.clear()
    try:
        for batch in reading:
            transform.partial_fit(batch)
        if across_ranks:
            merge_across_ranks(transform)
        transform.finalize()
    except BaseException:
        transform.stats.update(before)
        raise


def check_features(owner: str, x: Tensor, feature_dim: int, num_features: int) -> None:
    """Raises unless `x` is a real tensor with `num_features` (0: unknown) along `feature_dim`.

    Raises:
        TypeError: if it is not a real tensor.
        ValueError: if the dimension is missing, empty, or of another length.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{owner}(x={kind_shown(x)}): x must be a tensor; torch.as_tensor converts arrays, Vocabulary strings."
        )
    if x.layout != torch.strided:
        raise ValueError(f"{owner}(x=<{x.layout}>): x must be dense; use x.to_dense().")
    if x.is_complex():
        raise TypeError(f"{owner}(x.dtype={x.dtype}): x must be real.")
    if not -x.dim() <= feature_dim < x.dim():
        raise ValueError(f"{owner}(feature_dim={feature_dim}): x of shape {tuple(x.shape)} has no such dimension.")
    size = x.shape[feature_dim]
    if size == 0 or (num_features and size != num_features):
        wanted = f"{num_features} features, as in training," if num_features else "at least one feature"
        raise ValueError(f"{owner}(x.shape={tuple(x.shape)}): x must have {wanted} along dimension {feature_dim}.")


def feature_rows(owner: str, x: Tensor, *, feature_dim: int = -1, num_features: int = 0) -> Tensor:
    """A training batch as checked rows, shape (N, D), float64; NaN marks a missing value.

    Raises:
        TypeError: if `x` is not a real tensor.
        ValueError: if its shape does not fit, or a value is infinite.
    """
    check_features(owner, x, feature_dim, num_features)
    if x.dim() < 2:
        raise ValueError(
            f"{owner}(x.shape={tuple(x.shape)}): a training batch must be (N, D) or larger; use x[:, None] for one."
        )
    if x.is_meta:
        raise ValueError(f"{owner}(x=<tensor on meta>): x must hold numbers, not only a shape.")
    rows = x.detach().double().movedim(feature_dim, -1).flatten(0, -2)
    infinite = rows.isinf().any(dim=0)
    if infinite.any():
        column = int(infinite.nonzero()[0])
        raise ValueError(f"{owner}(x[..., {column}]=inf): training values must be finite; mark missing ones with NaN.")
    return rows


def to_feature_dim(statistic: Tensor, x: Tensor, feature_dim: int) -> Tensor:
    """A per-feature statistic (D,), shaped to broadcast against `x` along `feature_dim`."""
    shape = [1] * x.dim()
    shape[feature_dim] = -1
    return statistic.view(shape)


def output_dtype(x: Tensor) -> torch.dtype:
    """The dtype of `x` if it is floating, else the default dtype."""
    return x.dtype if x.is_floating_point() else torch.get_default_dtype()


def require_fitted(owner: str, learned: Tensor) -> None:
    """Raises RuntimeError while `learned`, which `finalize()` writes, is empty. Never synchronizes."""
    if learned.numel() == 0:
        raise RuntimeError(
            f"{owner}(fitted=False): call fit(batches), or partial_fit(batch) and finalize(), before applying it."
        )


def require_open(owner: str, learned: Tensor) -> None:
    """Raises RuntimeError once `learned` is written, for transforms that then discard the rows they need."""
    if learned.numel():
        raise RuntimeError(
            f"{owner}(fitted=True): the rows were forgotten by finalize(), so nothing can be added; call fit(batches)."
        )


def require_finite_fit(owner: str, count: Tensor, spread: Tensor | None = None) -> None:
    """Raises ValueError unless every feature had values and, if given, its `spread` is finite."""
    if count.numel() == 0:
        raise ValueError(f"{owner}(batches=[]): fitting needs at least one row.")
    unseen = (count == 0).nonzero().flatten().tolist()
    if unseen:
        raise ValueError(
            f"{owner}(x[..., {unseen[0]}]): features {unseen} have no value in the training set; drop them, or fill "
            "them by Impute(keep_empty_features=True)."
        )
    if spread is not None and not spread.isfinite().all():
        column = int((~spread.isfinite()).nonzero()[0])
        raise ValueError(f"{owner}(x[..., {column}]): the spread of this feature overflows float64; rescale it first.")


def check_mergeable(transform: _Fittable, other: _Fittable) -> None:
    """Raises unless `other` was fitted on the same kind of rows.

    Raises:
        TypeError: if it is another transform.
        ValueError: if it has another number of features.
    """
    owner = type(transform).__name__
    if type(other) is not type(transform):
        raise TypeError(f"{owner}.merge(other={kind_shown(other)}): other must be a {owner} too, such as {owner}().")
    if transform.extra_repr() != other.extra_repr():
        raise ValueError(f"{owner}.merge(other={owner}({other.extra_repr()})): needs {transform.extra_repr()}.")
    if transform.num_features and other.num_features not in (0, transform.num_features):
        raise ValueError(
            f"{owner}.merge(other={other.num_features} features): other must have {transform.num_features} features."
        )
