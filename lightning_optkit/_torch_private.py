# SPDX-License-Identifier: Apache-2.0
"""Every private name of torch that this package uses, under the name of what it gives; nowhere else is there one.

`tests/test_private_names.py` looks for others, and names those that an installed torch does not have. What is called in
every forward or step is an alias, or stands here whole, so that a name costs no call of Python.
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
from torch.utils import _pytree

_P = ParamSpec("_P")
_R = TypeVar("_R")

# --- modules ---

# torch names no class that all layers of a kind derive from, those of other packages and the lazy ones included.
AnyBatchNorm: TypeAlias = _BatchNorm
BatchOrInstanceNorm: TypeAlias = _NormBase
AnyConv: TypeAlias = _ConvNd
AnyConvTranspose: TypeAlias = _ConvTransposeNd
AnyDropout: TypeAlias = _DropoutNd
# What `torch.nn.utils.parametrizations.weight_norm` and `spectral_norm` register.
WeightNormParametrization: TypeAlias = parametrizations._WeightNorm
SpectralNormParametrization: TypeAlias = parametrizations._SpectralNorm

# What FSDP, `torch.compile` and activation checkpointing put into the names of a module that they wrap.
WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")

# Methods that a class of this package overrides, since torch has no hook there: when it runs, and what for.
OVERRIDDEN = {
    "_apply": "after `to`, `half` or `double` of a module, to keep statistics in float64",
    "_load_from_state_dict": "before a module's buffers are read, to give them the shape that they were saved in",
}


# Of a module itself, to read and to change; `named_parameters` and `named_buffers` leave out what is None.
own_parameters: Callable[[nn.Module], dict[str, nn.Parameter | None]] = attrgetter("_parameters")
own_buffers: Callable[[nn.Module], dict[str, Tensor | None]] = attrgetter("_buffers")


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """`getattr(module, name)`; an ordinary parameter without `Module.__getattr__`, which costs half a short kernel."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def replace_own_parameters(module: nn.Module, parameters: dict[str, Tensor | None]) -> None:
    """Gives a shallow copy of a module a table of its own, which may hold tensors that are no Parameters."""
    vars(module)["_parameters"] = parameters


def forward_pre_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Those of the module; torch registers hooks, and lists none."""
    return list(module._forward_pre_hooks.values())


def private_reset(module: nn.Module) -> Callable[[], object] | None:
    """What nn.MultiheadAttention and nn.Transformer have in place of a public `reset_parameters`."""
    return getattr(module, "_reset_parameters", None)


def flat_weights(layer: Any) -> tuple[list[Any], list[str]]:
    """The list that a recurrent layer reads its weights from, and their names; `functional_call` does not reach it."""
    return layer._flat_weights, layer._flat_weights_names


def convolve(layer: nn.Conv2d, input: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight, padded as it says; `F.conv2d` pads with zeros only."""
    return layer._conv_forward(input, weight, layer.bias)  # type: ignore[no-any-return]


# --- tensors ---

# In docs for some of their kind only.
foreach_copy_, foreach_lerp_ = torch._foreach_copy_, torch._foreach_lerp_
foreach_mul_, foreach_norm = torch._foreach_mul_, torch._foreach_norm
assert_async = torch._assert_async  # a condition inside a graph, which `assert` is not
tree_flatten, tree_unflatten = _pytree.tree_flatten, _pytree.tree_unflatten  # lists, dicts and tuples within others
legacy_reduction = _reduction.legacy_get_string  # what `size_average` and `reduce` mean
# Of a DTensor, sharing its memory; `to_local` records the call for the backward pass.
local_shard: Callable[[Tensor], Tensor] = attrgetter("_local_tensor")


# Of a sparse tensor, to be changed in place; `values()` and `indices()` refuse one that is not coalesced.
sparse_values: Callable[[Tensor], Tensor] = methodcaller("_values")
sparse_indices: Callable[[Tensor], Tensor] = methodcaller("_indices")


def is_fake(t: Tensor) -> bool:
    """Whether it is a tracer's, with a shape and no numbers; the class has no public name."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(t, fake.FakeTensor)


# --- optimizers and their schedulers ---


def unless_hooked(func: Callable[_P, _R], whole: Callable[_P, _R], is_observed: Callable[[], bool]) -> Callable[_P, _R]:
    """A `step` that is `func` while there is neither a hook nor an observer, and otherwise `whole`, which serves them.

    torch registers hooks of a step, and tells nobody whether there are any. Here is no call per step for a name.
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


# By the number of their handle; torch adds at the end, and shows none.
step_post_hooks: Callable[[Optimizer], OrderedDict[int, Any]] = attrgetter("_optimizer_step_post_hooks")
load_pre_hooks: Callable[[Any], OrderedDict[int, Any]] = attrgetter("_optimizer_load_state_dict_pre_hooks")
load_post_hooks: Callable[[Any], OrderedDict[int, Any]] = attrgetter("_optimizer_load_state_dict_post_hooks")
LAST_LRS = "_last_lr"  # what a scheduler returns by get_last_lr(); there is no way to set it


def patch_step(optimizer: Optimizer) -> None:
    """Wraps the `step` of a class as `Optimizer.__init__` does, once it is another class than that was called for."""
    optimizer._patch_step_function()


def supports_amp_scaling(optimizer: object) -> bool:
    """Whether its step unscales the gradients itself, which `GradScaler` asks by this attribute, with no other name."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def instance_amp_scaling(optimizer: Optimizer) -> bool | None:
    """What this instance says about it, apart from its class; None: nothing."""
    return vars(optimizer).get("_step_supports_amp_scaling")


def set_amp_scaling(optimizer: Optimizer, supports: bool | None) -> None:
    """Lets this instance say whether its step unscales the gradients itself; None: nothing."""
    vars(optimizer).pop("_step_supports_amp_scaling", None)
    if supports is not None:
        vars(optimizer)["_step_supports_amp_scaling"] = supports


def is_watched_by_scheduler(optimizer: Optimizer) -> bool:
    """Whether a scheduler has wrapped its `step`, to warn when it is stepped first itself."""
    return hasattr(optimizer.step, "_wrapped_by_lr_sched")


def watch_step(optimizer: Optimizer) -> None:
    """Wraps its `step` as a scheduler does; it does so only when it is made."""
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
    """Those that `SequentialLR` or `ChainedScheduler` goes through; neither shows them."""
    return list(getattr(scheduler, "_schedulers", ()))


# --- data ---


def kept_iterator(loader: object) -> object:
    """The iterator that a DataLoader with persistent workers keeps between two epochs, or None."""
    return getattr(loader, "_iterator", None)


def forget_iterator(loader: object) -> None:
    """Lets a copy of a DataLoader make an iterator of its own."""
    vars(loader)["_iterator"] = None


def num_yielded(iterator: object) -> int:
    """Batches that an iterator of a DataLoader has given; of another kind, 0."""
    return int(getattr(iterator, "_num_yielded", 0))


# --- what is around a call: transforms of torch.func, compilers, modes ---

innermost_transform = torch._C._functorch.peek_interpreter_stack  # None outside of torch.func
is_batched = torch._C._functorch.is_batchedtensor  # by a vmap
num_dispatch_modes = torch._C._len_torch_dispatch_stack  # how many TorchDispatchModes are active


def is_transformed() -> bool:
    """Inside torch.func, or a level of forward-mode derivatives: both know torch's operators only."""
    return forward_ad._current_level >= 0 or innermost_transform() is not None


def is_vmapped() -> bool:
    """Whether a vmap is among the transforms around this call; a tensor of an inner `grad` does not show it."""
    if torch.compiler.is_compiling() or innermost_transform() is None:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def is_exporting() -> bool:
    """As `torch.compiler.is_exporting()`, which an older torch takes for true in every compiled call."""
    return torch.compiler._is_exporting_flag


def mark_constant(function: Callable[[], object]) -> None:
    """Makes `function()` a constant to torch's compiler: `torch.compiler.assume_constant_result` imports that."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def apply_without_transforms(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, but without looking for transforms first, which costs as much as the kernel of a short row."""
    return torch._C._FunctionBase.__dict__["apply"].__get__(None, function)  # type: ignore[no-any-return]


@functools.cache
def has_bf16_products() -> bool:
    """Whether this CPU multiplies bf16 matrices by more than plain loops."""
    has_mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return has_mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
