# SPDX-License-Identifier: Apache-2.0
"""Writes values into the parameters of a module: plain, tied, reparametrized, or sharded (DTensor)."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_optkit._checks import check_generator, check_module
from lightning_optkit._torch_private import SpectralNormParametrization, WeightNormParametrization, own_parameters
from lightning_optkit.init._layout import normalizing_hooks, parameter_names, role

__all__ = [
    "check_same_random_state",
    "check_writable_model",
    "current",
    "draw",
    "is_sharded",
    "parameter",
    "parameter_uses",
    "scale",
    "why_not_writable",
    "write",
]

_POWER_ITERATIONS = 15  # as many as torch's newer spectral_norm starts with


def parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The Parameter behind `module.name`: the first original of a parametrization; the input of a normalizing hook."""
    hook = normalizing_hooks(module).get(name)
    if hook is not None:
        return module.get_parameter(f"{name}_{'v' if isinstance(hook, WeightNorm) else 'orig'}")
    if name in own_parameters(module):
        return own_parameters(module)[name]  # type: ignore[return-value]
    originals: Any = module.parametrizations[name]  # type: ignore[index]
    first: nn.Parameter = next(iter(originals.parameters(recurse=False)))
    return first


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor; does not import torch.distributed."""
    return hasattr(tensor, "device_mesh")


def parameter_uses(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """(module, name) of all uses of each parameter, by id; the first determines the rule: embeddings before layers."""
    uses: dict[int, list[tuple[int, str, str]]] = {}
    for module_name, module in model.named_modules():
        if ".parametrizations." not in f".{module_name}.":
            for name in parameter_names(module):
                rank = {"table": 0, "other": 2}.get(role(module, name), 1)
                uses.setdefault(id(parameter(module, name)), []).append((rank, module_name, name))
    return {key: [use[1:] for use in sorted(found, key=lambda use: use[0])] for key, found in uses.items()}


def why_not_writable(module: nn.Module, name: str) -> str | None:
    """Why a rule must not write `module.name`, in a few words; None if it may."""
    target = parameter(module, name)
    if not target.requires_grad:
        return "frozen"
    if not target.is_floating_point():
        return f"{target.dtype} is not floating-point"
    if target.numel() == 0:
        return "empty"
    if name not in own_parameters(module):
        if is_sharded(target):
            return "parametrized and sharded"
        steps: Any = () if name in normalizing_hooks(module) else module.parametrizations[name]  # type: ignore[index]
        if not all(hasattr(step, "right_inverse") for step in steps):
            return "its parametrization has no right_inverse"
    return None


def check_writable_model(owner: str, model: nn.Module, name: str = "model") -> None:
    """Raises unless every parameter of `model` has memory.

    Raises:
        TypeError: if it is not a module.
        ValueError: if a parameter is on the meta device or not materialized (lazy modules).
    """
    check_module(owner, name, model)
    for parameter_name, tensor in model.named_parameters():
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"{owner}(model with lazy parameter {parameter_name!r}): run one forward pass first, to give it a "
                "shape."
            )
        if tensor.is_meta:
            raise ValueError(
                f"{owner}(model with {parameter_name!r} on the meta device): parameters must have storage; call "
                "model.to_empty(device=...) first (after fully_shard, if you shard), and refill the buffers it leaves "
                "blank."
            )


def check_same_random_state(owner: str, model: nn.Module, generator: torch.Generator | None) -> None:
    """Raises unless all ranks of a sharded model would draw the same numbers. Costs one small collective per mesh axis.

    Raises:
        ValueError: if their generators differ.
    """
    check_generator(owner, generator)
    sharded = next((tensor for tensor in model.parameters() if is_sharded(tensor)), None)
    if sharded is None:
        return
    import torch.distributed as dist

    mesh: Any = sharded.device_mesh  # type: ignore[attr-defined]
    state = _random_state(sharded.device, generator)
    digest = hashlib.sha256(state.cpu().numpy().tobytes()).hexdigest()
    for axis in range(mesh.ndim):
        group = mesh.get_group(axis)
        digests: list[str | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(digests, digest, group=group)
        if len(set(digests)) > 1:
            raise ValueError(
                f"{owner}(generator={generator!r}): its state must be the same on every rank of a sharded model; pass "
                "generator=torch.Generator().manual_seed(seed) with one seed for all ranks."
            )


def draw(like: Tensor, fill: Callable[[Tensor], None], generator: torch.Generator | None) -> Tensor:
    """A full tensor of the (global) shape and dtype of `like`, filled on the device of `generator` if given."""
    device = like.device if generator is None else generator.device
    value = torch.empty(like.shape, dtype=like.dtype, device=device)
    with torch.no_grad():
        fill(value)
    return value


def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Stores the full tensor `value` as `module.name`; each rank keeps its shard, without communication."""
    with torch.no_grad():
        target = own_parameters(module).get(name)
        if target is None:
            _write_reparametrized(module, name, value.to(parameter(module, name).device))
            return
        if is_sharded(target):
            from torch.distributed.tensor import DTensor, Replicate

            sharded: Any = target
            mesh = sharded.device_mesh
            local = value.to(sharded.to_local().device)
            whole = DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
            value = whole.redistribute(placements=sharded.placements)
        target.copy_(value)


def _write_reparametrized(module: nn.Module, name: str, value: Tensor) -> None:
    hook = normalizing_hooks(module).get(name)
    halves = _norm_and_direction(module, name)
    if halves is not None:
        norm, direction, dim = halves
        size = torch.norm_except_dim(value, 2, dim)
        norm.copy_(size)
        direction.copy_(torch.where(size > 0, value, direction))  # unchanged for zeros: 0/0 is NaN
    elif hook is None:
        setattr(module, name, value)  # through the inverse of the parametrization
    else:
        parameter(module, name).copy_(value)
    _follow(module, name)


def _norm_and_direction(module: nn.Module, name: str) -> tuple[Tensor, Tensor, int] | None:
    """The two parameters of a weight under torch's weight_norm, of either kind, and its dimension."""
    hook = normalizing_hooks(module).get(name)
    if isinstance(hook, WeightNorm):
        return module.get_parameter(f"{name}_g"), module.get_parameter(f"{name}_v"), hook.dim
    if hook is not None:
        return None
    steps: Any = module.parametrizations[name]  # type: ignore[index]
    if len(steps) != 1 or not isinstance(steps[0], WeightNormParametrization):
        return None
    return steps.original0, steps.original1, steps[0].dim


def _follow(module: nn.Module, name: str) -> None:
    """Recomputes the weight of a hook, and updates the norm estimate of a spectral norm for the new values.

    The estimate is based on buffers of the old values, and could be close to 0 for the new ones.
    """
    hook = normalizing_hooks(module).get(name)
    if isinstance(hook, WeightNorm):
        hook(module, None)
    elif hook is not None:
        for _ in range(_POWER_ITERATIONS):
            weight = hook.compute_weight(module, do_power_iteration=True)
        setattr(module, name, weight)
    else:
        steps: Any = module.parametrizations[name]  # type: ignore[index]
        spectral = [step for step in steps if isinstance(step, SpectralNormParametrization)]
        with _in_training(steps, spectral):
            for _ in range(_POWER_ITERATIONS if spectral else 0):
                getattr(module, name)


@contextmanager
def _in_training(steps: nn.Module, chosen: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Sets only the chosen parametrizations to training mode; the others neither draw nor change a buffer."""
    modes = [(step, step.training) for step in steps.modules()]
    try:
        for step, _ in modes:
            step.training = step in chosen
        yield
    finally:
        for step, mode in modes:
            step.training = mode


def current(module: nn.Module, name: str) -> Tensor:
    """The current tensor `module.name`; parametrizations are evaluated in eval mode, which changes no buffer."""
    if name in own_parameters(module):
        return parameter(module, name)
    hook = normalizing_hooks(module).get(name)
    if hook is not None:
        with torch.no_grad():
            arguments = (module, False) if isinstance(hook, SpectralNorm) else (module,)
            return hook.compute_weight(*arguments)
    steps: Any = module.parametrizations[name]  # type: ignore[index]
    with _in_training(steps), torch.no_grad():
        value: Tensor = getattr(module, name)
        return value


def scale(module: nn.Module, name: str, factor: float) -> None:
    """Multiplies `module.name` by `factor`, shard by shard if it is sharded."""
    with torch.no_grad():
        if name in own_parameters(module):
            parameter(module, name).mul_(factor)
        else:
            write(module, name, current(module, name) * factor)


def _random_state(device: torch.device, generator: torch.Generator | None) -> Tensor:
    if generator is not None:
        return generator.get_state()
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
