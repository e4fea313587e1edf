# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that this package uses, under a name of its own; no other file uses one.

`tests/test_private_names.py` looks for others, and names those that an installed torch lacks. Names used in every
forward or step are plain aliases or complete copies, so that they add no Python call.
"""

import functools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from operator import attrgetter, methodcaller
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import _reduction
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrizations
from torch.optim import Optimizer
from torch.optim import optimizer as optimizer_module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

_P = ParamSpec("_P")
_R = TypeVar("_R")

# --- modules ---

# torch has no public base class for all layers of a kind, including lazy ones and those of other packages.
AnyBatchNorm: TypeAlias = _BatchNorm
BatchOrInstanceNorm: TypeAlias = _NormBase
AnyConv: TypeAlias = _ConvNd
AnyConvTranspose: TypeAlias = _ConvTransposeNd
AnyDropout: TypeAlias = _DropoutNd
# The classes that `torch.nn.utils.parametrizations.weight_norm` and `spectral_norm` register.
WeightNormParametrization: TypeAlias = parametrizations._WeightNorm
SpectralNormParametrization: TypeAlias = parametrizations._SpectralNorm

# What FSDP, `torch.compile` and activation checkpointing insert into the names of wrapped modules.
WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")

# Methods that classes of this package override, since torch has no hook there: when each runs, and the purpose.
OVERRIDDEN = {
    "_apply": "after `to`, `half` or `double` of a module, to keep statistics in float64",
    "_load_from_state_dict": "before a module's buffers are read, to give them the shape that they were saved in",
}


# The module's own tables, writable; `named_parameters` and `named_buffers` leave out None.
own_parameters: Callable[[nn.Module], dict[str, nn.Parameter | None]] = attrgetter("_parameters")
own_buffers: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_buffers")


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """`getattr(module, name)`; for a plain parameter without `Module.__getattr__`, which costs half a short kernel."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def replace_own_parameters(module: nn.Module, parameters: dict[str, Tensor | None]) -> None:
    """Gives a shallow copy of a module its own parameter table, whose tensors need not be Parameters."""
    vars(module)["_parameters"] = parameters


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks of the module; torch can register hooks, but not list them."""
    return list(module._forward_pre_hooks.values())


def is_compiled_part(module: nn.Module) -> bool:
    """Whether torch.compile wraps the module, or its `compile()` was called."""
    return "_orig_mod" in vars(module).get("_modules", {}) or vars(module).get("_compiled_call_impl") is not None


def private_reset(module: nn.Module) -> Callable[[], object] | None:
    """The private substitute for `reset_parameters` in nn.MultiheadAttention and nn.Transformer."""
    return getattr(module, "_reset_parameters", None)


def flat_weights(layer: Any) -> tuple[list[Any], list[str]]:
    """The list from which a recurrent layer reads its weights (`functional_call` ignores it), and their names."""
    return layer._flat_weights, layer._flat_weights_names


def convolve(layer: nn.Conv2d, input: Tensor, weight: Tensor) -> Tensor:
    """Runs the layer with another weight and its own padding mode; `F.conv2d` supports only zero padding."""
    return layer._conv_forward(input, weight, layer.bias)  # type: ignore[no-any-return]


# --- tensors ---

version_of: Callable[[Tensor], int] = attrgetter("_version")
"""How often a tensor was written in place; torch shows it only to autograd."""

# Only partly documented.
foreach_copy_, foreach_lerp_ = torch._foreach_copy_, torch._foreach_lerp_
foreach_mul_, foreach_norm = torch._foreach_mul_, torch._foreach_norm
assert_async = torch._assert_async  # an assertion inside a graph
tree_flatten, tree_unflatten = _pytree.tree_flatten, _pytree.tree_unflatten  # for nested lists, dicts and tuples
legacy_reduction = _reduction.legacy_get_string  # the meaning of `size_average` and `reduce`
# The local shard of a DTensor, sharing its memory; `to_local` would record the call for autograd.
local_shard: Callable[[Tensor], Tensor] = attrgetter("_local_tensor")


# The values of a sparse tensor, to be changed in place; `values()` and `indices()` refuse uncoalesced tensors.
sparse_values: Callable[[Tensor], Tensor] = methodcaller("_values")
sparse_indices: Callable[[Tensor], Tensor] = methodcaller("_indices")


def is_fake(t: Tensor) -> bool:
    """Whether it is a FakeTensor, with a shape and no memory; the class has no public name."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(t, fake.FakeTensor)


def default_store() -> Any:
    """Where the processes of a run meet: keys and values that any of them reads without the others."""
    return torch.distributed.distributed_c10d._get_default_store()


# --- optimizers and their schedulers ---


def unless_hooked(func: Callable[_P, _R], whole: Callable[_P, _R], is_observed: Callable[[], bool]) -> Callable[_P, _R]:
    """A `step` that calls `func` without hooks and observers, and otherwise `whole`, which supports them.

    torch has no public way to ask whether a step has hooks. The names are bound once, so that a step adds no call.
    """

    @functools.wraps(func)
    def step(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        optimizer: Any = args[0]
        if (
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or optimizer_module._global_optimizer_pre_hooks
            or optimizer_module._global_optimizer_post_hooks
            or is_observed()
        ):
            return whole(*args, **kwargs)
        return func(*args, **kwargs)

    return step


# Hooks by the number of their handle; torch appends new ones, and does not list them.
step_post_hooks: Callable[[Optimizer], OrderedDict[int, Any]] = attrgetter("_optimizer_step_post_hooks")
load_pre_hooks: Callable[[Any], OrderedDict[int, Any]] = attrgetter("_optimizer_load_state_dict_pre_hooks")
load_post_hooks: Callable[[Any], OrderedDict[int, Any]] = attrgetter("_optimizer_load_state_dict_post_hooks")
LAST_LRS = "_last_lr"  # the result of a scheduler's get_last_lr(), which has no setter
INNER_SCHEDULERS = "_schedulers"  # in the state dicts of `SequentialLR` and `ChainedScheduler`


def patch_step(optimizer: Optimizer) -> None:
    """Wraps the `step` of the class as `Optimizer.__init__` does, after the class of an optimizer has changed."""
    optimizer._patch_step_function()


def supports_amp_scaling(optimizer: object) -> bool:
    """Whether its step unscales the gradients itself; `GradScaler` reads this attribute only."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def instance_amp_scaling(optimizer: Optimizer) -> bool | None:
    """The instance's own value of this attribute, regardless of its class; None: not set."""
    return vars(optimizer).get("_step_supports_amp_scaling")


def set_amp_scaling(optimizer: Optimizer, supports: bool | None) -> None:
    """Sets the instance's own value of this attribute; None: removes it."""
    vars(optimizer).pop("_step_supports_amp_scaling", None)
    if supports is not None:
        vars(optimizer)["_step_supports_amp_scaling"] = supports


def is_watched_by_scheduler(optimizer: Optimizer) -> bool:
    """Whether a scheduler has wrapped its `step`, to warn about a wrong order of calls."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


def watch_step(optimizer: Optimizer) -> None:
    """Wraps its `step` as a scheduler does in its constructor."""
    reference = weakref.ref(optimizer)
    step: Callable[..., Any] = type(optimizer).step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        owner = reference()
        owner._opt_called = True  # type: ignore[union-attr]
        return step(owner, *args, **kwargs)

    watched._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = watched  # type: ignore[method-assign]


def schedulers_within(scheduler: object) -> list[Any]:
    """The schedulers inside `SequentialLR` or `ChainedScheduler`, which are not public."""
    return list(getattr(scheduler, "_schedulers", ()))


# --- data ---


def kept_iterator(loader: object) -> object:
    """The iterator that a DataLoader with persistent workers keeps between epochs, or None."""
    return getattr(loader, "_iterator", None)


def forget_iterator(loader: object) -> None:
    """Makes a copy of a DataLoader create its own iterator."""
    vars(loader)["_iterator"] = None


def set_kept_iterator(loader: object, iterator: object) -> None:
    """Sets what `kept_iterator` returns."""
    vars(loader)["_iterator"] = iterator


def num_yielded(iterator: object) -> int:
    """Number of batches that a DataLoader's iterator has returned; 0 for other iterators."""
    return int(getattr(iterator, "_num_yielded", 0))


# --- around a call: transforms of torch.func, compilers, modes ---

set_grad_enabled = torch._C._set_grad_enabled  # `torch.no_grad()` takes 3 us, a tenth of a step of few tensors
innermost_transform = torch._C._functorch.peek_interpreter_stack  # None outside of torch.func
is_batched = torch._C._functorch.is_batchedtensor  # by vmap
num_dispatch_modes = torch._C._len_torch_dispatch_stack  # number of active TorchDispatchModes
# The TorchFunctionModes of this thread, the innermost last; to leave that one, and to enter one.
entered_function_modes: Callable[[], list[TorchFunctionMode]] = _get_current_function_mode_stack
pop_function_mode: Callable[[], TorchFunctionMode] = _pop_mode
push_function_mode: Callable[[TorchFunctionMode], None] = _push_mode


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active: both support only torch's ops."""
    return forward_ad._current_level >= 0 or innermost_transform() is not None


def is_vmapped() -> bool:
    """Whether vmap is among the active transforms; a tensor of an inner `grad` does not show it."""
    if torch.compiler.is_compiling() or innermost_transform() is None:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


class BeforeWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context manager: inside, `before_write` is called with each tensor that an operation is about to write.

    That is below autograd, so that `p.data.mul_()` and a write within a layer are seen too, as no version counter does.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """A compiled function runs as it is: with a mode, torch.compile refuses `fullgraph=True` and flex attention."""
        return True

    def __init__(self, before_write: Callable[[Tensor], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._before_write = before_write

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, name in _written_by(func):
            value = kwargs.get(name) if name in kwargs else args[place] if place < len(args) else None
            for t in value if isinstance(value, list | tuple) else (value,):
                if isinstance(t, Tensor):
                    self._before_write(t)
        return func(*args, **kwargs)


@functools.cache
def _written_by(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operation writes; none for one of a higher order."""
    schema = getattr(func, "_schema", None)
    arguments = () if schema is None else schema.arguments
    aliases = [(place, each.name, each.alias_info) for place, each in enumerate(arguments)]
    return tuple((place, name) for place, name, alias in aliases if alias is not None and alias.is_write)


def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, which in older versions is true in every compiled call."""
    return torch.compiler._is_exporting_flag


def mark_constant(function: Callable[[], object]) -> None:
    """Makes `function()` a constant for torch's compiler, without importing the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def apply_without_transforms(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without the check for transforms, which costs as much as the kernel of a short row."""
    return torch._C._FunctionBase.__dict__["apply"].__get__(None, function)  # type: ignore[no-any-return]


@functools.cache
def has_bf16_products() -> bool:
    """Whether this CPU has fast bf16 matrix products."""
    has_mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
