# SPDX-License-Identifier: Apache-2.0
"""Assigns parameters to groups: weight decay by module type, learning rate by depth, other entries by name pattern."""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optkit._checks import check_in, check_listed, check_mapping, check_text, shown
from lightning_optkit._torch_private import WRAPPERS, BatchOrInstanceNorm
from lightning_optkit.optimizers._depth import depths

__all__ = ["GroupRules", "Membership", "NoDecay", "gathered", "named_apart", "unwrapped"]

NoDecay: TypeAlias = Sequence[type[nn.Module] | Literal["norm", "bias", "embedding", "vector", "model"]]

_KINDS = ("norm", "bias", "embedding", "vector", "model")
_NORMS = (BatchOrInstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_WRAPPERS = re.compile(rf"({'|'.join(WRAPPERS)})\.")


@dataclass(frozen=True)
class Membership:
    """The group that a parameter belongs to.

    Args:
        decays: Whether weight decay acts on it.
        depth: Its layer, or None without layer-wise decay.
        scale: Factor of its learning rate.
        entries: Entries from patterns, as sorted (name, value) pairs.
        label: Those patterns as text.
    """

    decays: bool
    depth: int | None
    scale: float
    entries: tuple[tuple[str, Any], ...]
    label: str

    def name(self, width: int, says_decay: bool = True) -> str:
        """Name of the group: label, layer, decay."""
        layer = "" if self.depth is None else f"layer{self.depth:0{width}d}"
        decay = ("decay" if self.decays else "no_decay") if says_decay else ""
        return "_".join(filter(None, (self.label, layer, decay))) or "all"


class GroupRules:
    """The arguments of `parameter_groups`, checked.

    Args:
        owner: Function or callback named in error messages.
        weight_decay: See `parameter_groups`.
        no_decay: See `parameter_groups`.
        layer_decay: See `parameter_groups`.
        layers: See `parameter_groups`.
        overrides: See `parameter_groups`.
    """

    def __init__(
        self,
        owner: str,
        weight_decay: float | None,
        no_decay: NoDecay,
        layer_decay: float | None,
        layers: Sequence[str] | None,
        overrides: Mapping[str, Mapping[str, Any]] | None,
    ) -> None:
        if weight_decay is not None:
            check_in(owner, "weight_decay", weight_decay, "[0, inf)")
        if layer_decay is not None:
            check_in(owner, "layer_decay", layer_decay, "(0, 1]")
        exempt = _checked_kinds(owner, no_decay)
        self.owner, self.weight_decay, self.layer_decay = owner, weight_decay, layer_decay
        self.kinds = tuple(kind for kind in exempt if isinstance(kind, str))
        self.types = tuple(kind for kind in exempt if not isinstance(kind, str))
        self.layers = None if layers is None else _checked_layers(owner, layers, layer_decay)
        self.overrides = {} if overrides is None else _checked_overrides(owner, overrides)

    def __repr__(self) -> str:
        return repr((self.weight_decay, self.kinds, self.types, self.layer_decay, self.layers, self.overrides))

    def memberships(self, model: nn.Module) -> tuple[dict[Tensor, Membership], dict[Tensor, str], int]:
        """Membership and name of each distinct parameter, and the number of digits of a layer's number.

        Raises:
            ValueError: if a pattern matches nothing.
        """
        names: dict[Tensor, str] = {}
        places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for own, param in module.named_parameters(recurse=False, remove_duplicate=False):
                names.setdefault(param, unwrapped(f"{prefix}.{own}" if prefix else own))
                places.setdefault(param, []).append((module, own))
        listed = _listed_by_modules(self.owner, model) if "model" in self.kinds else frozenset()
        found, num_layers = ({}, 1) if self.layer_decay is None else depths(self.owner, model, names, self.layers)
        matched: set[str] = set()
        result = {
            param: self._membership(param, names, places, found, num_layers, matched, decays=param not in listed)
            for param in names
        }
        for pattern in self.overrides:
            if pattern not in matched:
                such_as = ", ".join(list(names.values())[:3])
                known = f"names are such as {such_as}" if names else f"{type(model).__name__} has none"
                raise ValueError(
                    f"{self.owner}(overrides={{{pattern!r}: ...}}): the pattern matches no parameter; {known}."
                )
        return result, names, len(str(max(num_layers - 1, 0)))

    def _membership(
        self,
        param: Tensor,
        names: dict[Tensor, str],
        places: dict[Tensor, list[tuple[nn.Module, str]]],
        found: dict[Tensor, int],
        num_layers: int,
        matched: set[str],
        *,
        decays: bool,
    ) -> Membership:
        entries: dict[str, Any] = {}
        labels: list[str] = []
        for pattern, given in self.overrides.items():
            if _matches(pattern, names[param]):
                matched.add(pattern)
                entries |= given
                labels.append(str(given.get("name", re.sub(r"[^\w.]+", "", pattern).strip("."))))
        entries.pop("name", None)
        depth = found.get(param)
        scale = 1.0 if depth is None or self.layer_decay is None else self.layer_decay ** (num_layers - 1 - depth)
        decays = decays and not any(self._exempts(module, own, param) for module, own in places[param])
        return Membership(decays, depth, scale, tuple(sorted(entries.items())), "_".join(filter(None, labels)))

    def _exempts(self, module: nn.Module, own: str, param: Tensor) -> bool:
        is_bias = own == "bias" or own.endswith("_bias") or own.startswith(("bias_ih_l", "bias_hh_l"))
        # The shape of a lazy parameter is unknown before its layer's first input; its layer and name are known.
        is_vector = is_bias or _is_norm(module) if is_lazy(param) else param.ndim < 2
        return (
            isinstance(module, self.types)
            or ("norm" in self.kinds and _is_norm(module))
            or ("bias" in self.kinds and is_bias)
            or ("embedding" in self.kinds and isinstance(module, _EMBEDDINGS))
            or ("vector" in self.kinds and is_vector)
        )


def _checked_kinds(owner: str, no_decay: NoDecay) -> list[Any]:
    such_as = f"a list of module classes and of {', '.join(map(repr, _KINDS))}"
    if isinstance(no_decay, str):
        raise ValueError(f"{owner}(no_decay={shown(no_decay)}): no_decay must be {such_as}.")
    kinds = check_listed(owner, "no_decay", no_decay, such_as, empty=True)
    for kind in kinds:
        is_type = isinstance(kind, type) and issubclass(kind, nn.Module)
        if not (is_type or (isinstance(kind, str) and kind in _KINDS)):
            raise ValueError(f"{owner}(no_decay={shown(kinds)}): no_decay must be {such_as}.")
    return kinds


def _checked_layers(owner: str, layers: Sequence[str], layer_decay: float | None) -> tuple[str, ...]:
    such_as = 'a list of patterns of names, such as ["stem.*", "head.*"]'
    patterns = check_listed(owner, "layers", layers, such_as)
    for pattern in patterns:
        check_text(owner, "layers", pattern, such_as)
    if layer_decay is None:
        raise ValueError(f"{owner}(layers={shown(patterns)}): layers needs layer_decay.")
    return tuple(patterns)


def _checked_overrides(owner: str, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    check_mapping(owner, "overrides", overrides, 'a dict such as {"head.*": {"lr": 1e-3}}')
    for pattern, entries in overrides.items():
        given = f"{owner}(overrides[{pattern!r}]={shown(entries)})"
        if not isinstance(entries, Mapping) or not all(isinstance(entry, str) for entry in entries):
            raise TypeError(f"{given}: it must be a mapping of group entries.")
        if "params" in entries:
            raise ValueError(f"{given}: it must not hold params.")
        if pattern.startswith("re:"):
            _check_expression(owner, pattern)
        for name in ("lr", "weight_decay"):
            if name in entries:
                check_in(owner, f"overrides[{pattern!r}][{name!r}]", entries[name], "[0, inf)")
    return {pattern: dict(entries) for pattern, entries in overrides.items()}


def unwrapped(name: str) -> str:
    """The name of a parameter without the parts that compiled, sharded or checkpointed modules add."""
    return _WRAPPERS.sub("", name)


def _listed_by_modules(owner: str, model: nn.Module) -> frozenset[Tensor]:
    """The parameters that modules list themselves, as models of timm and of Swin's authors do.

    `no_weight_decay()` returns names, relative to the module; `no_weight_decay_keywords()` returns parts of names.

    Raises:
        TypeError: if a module returns anything but strings.
    """
    listed: set[Tensor] = set()
    for module in model.modules():
        whole, parts = (_strings(owner, module, name) for name in ("no_weight_decay", "no_weight_decay_keywords"))
        for name, param in module.named_parameters(remove_duplicate=False) if whole or parts else ():
            plain = unwrapped(name)
            if plain in whole or any(part in plain for part in parts):
                listed.add(param)
    return frozenset(listed)


def _strings(owner: str, module: nn.Module, method: str) -> frozenset[str]:
    given = getattr(module, method, None)
    if not callable(given):
        return frozenset()
    names = given()
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{owner}(model={type(module).__name__}): its {method}() must return a set of names.")
    return frozenset(names)


def _is_norm(module: nn.Module) -> bool:
    """Norm layers of torch and of other libraries: LlamaRMSNorm, LayerNorm2d."""
    return isinstance(module, _NORMS) or re.search(r"Norm(\dd)?$", type(module).__name__) is not None


def _check_expression(owner: str, pattern: str) -> None:
    try:
        re.compile(pattern[3:])
    except re.error as error:
        raise ValueError(
            f"{owner}(overrides={{{pattern!r}: ...}}): what follows re: must be a regular expression, but has {error}."
        ) from None


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)


def gathered(
    memberships: Mapping[Tensor, Membership], params: Iterable[Tensor]
) -> list[tuple[Membership, list[Tensor]]]:
    """Parameters by membership, from input to output, decaying ones first."""
    groups: dict[str, tuple[Membership, list[Tensor]]] = {}
    for param in params:
        membership = memberships[param]
        groups.setdefault(repr(membership), (membership, []))[1].append(param)  # entries need not be hashable
    return sorted(groups.values(), key=lambda item: (item[0].depth or 0, not item[0].decays))


def named_apart(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Appends numbers to equal names, which LearningRateMonitor refuses."""
    seen: dict[str, int] = {}
    for group in groups:
        count = seen[group["name"]] = seen.get(group["name"], 0) + 1
        if count > 1:
            group["name"] = f"{group['name']}_{count}"
    return groups
