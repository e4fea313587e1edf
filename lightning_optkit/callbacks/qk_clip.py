# SPDX-License-Identifier: Apache-2.0
"""Keeps the attention logits of chosen modules below a threshold, after every optimizer step."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_optkit._checks import check_in, check_int, check_pattern, check_text
from lightning_optkit.callbacks.seams.fit_callback import FitCallback
from lightning_optkit.callbacks.seams.lightning_packages import is_a
from lightning_optkit.callbacks.seams.lightning_private import key_of_state
from lightning_optkit.callbacks.seams.named_modules import first_tensor, modules_named
from lightning_optkit.callbacks.seams.refusals import refuse_all_but_dtensors, refuse_listed_twice
from lightning_optkit.callbacks.seams.steps import StepListener, refuse_folded_average, was_updated, watch_steps
from lightning_optkit.regularization.qk_clip import count_key_heads, max_logits, qk_clip_
from lightning_optkit.step.gathering import gathered, scatter_
from lightning_optkit.step.shards import local, sharding_groups

__all__ = ["QKClip"]


class QKClip(FitCallback):
    r"""After every optimizer step, shrinks the query and key weights of each head whose largest logit was too large.

    .. math:: \gamma_h = \min(1, \tau / S^h_{\max}), \quad W_q^h \leftarrow \sqrt{\gamma_h}\, W_q^h, \quad
        W_k^h \leftarrow \sqrt{\gamma_h}\, W_k^h

    where :math:`S^h_{\max}` is the largest logit of head h over the batches of the step, and biases are scaled like
    weights. Together with `Muon` this is MuonClip, but it works with any optimizer. Every head is clipped by itself;
    keys that several heads share stay, and their queries take the whole factor. Under DDP and FSDP2 the logits of all
    processes count.

    `torch.nn.MultiheadAttention` is found by itself. Other modules are named: their children `q` and `k` are watched,
    and their outputs are the queries and keys. What happens between them and the product is not seen: a norm of queries
    and keys (which makes this callback needless), or a rotary embedding, with which the logits are those without it.
    Masks are not applied. An attention of which a query or key projection is frozen is left as it is.

    Args:
        threshold: tau, in (0, inf); 100 in the report.
        names: Shell pattern of the attention modules, e.g. "blocks.*.attention"; `*` does not match a dot. Default:
            every `torch.nn.MultiheadAttention`.
        q: Name of the query projection in a module that is no `MultiheadAttention`.
        k: Name of its key projection.
        num_heads: Number of heads of such a module. Default: its attribute `num_heads`. Another one than that of a
            `MultiheadAttention` is refused.
        scale: Factor of the logits, in (0, inf). Default: 1 / sqrt(size of a head).

    Raises:
        ValueError: for an argument out of range; when the fit starts, if there is no such module, projection or number,
            for a strategy other than a single device, DDP and FSDP2, for tensor parallelism, or if a one-pass step
            would average before the clip.

    Cost: the projections and logits of an attention a second time, without the gradient; for other modules the logits.

    Source: Kimi Team 2025, arXiv:2507.20534, Section 2.1 and Algorithm 1.

    Example:
        >>> trainer = pl.Trainer(callbacks=[QKClip(100.0)], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        threshold: float = 100.0,
        names: str | None = None,
        *,
        q: str = "q_proj",
        k: str = "k_proj",
        num_heads: int | None = None,
        scale: float | None = None,
    ) -> None:
        owner = type(self).__name__
        self.threshold = check_in(owner, "threshold", threshold, "(0, inf)")
        self.names = None if names is None else check_pattern(owner, "names", names)
        self.q = check_text(owner, "q", q, 'the name of a projection, such as "q_proj"')
        self.k = check_text(owner, "k", k, 'the name of a projection, such as "k_proj"')
        if self.q == self.k:
            raise ValueError(f"{owner}(k={k!r}): k must be another projection than q; one of both is not supported.")
        self.num_heads = None if num_heads is None else check_int(owner, "num_heads", num_heads, minimum=1)
        self.scale = None if scale is None else check_in(owner, "scale", scale, "(0, inf)")
        self.max_logits: dict[str, Tensor] = {}
        """The largest logits of the last step: name of the module -> (num_heads,)."""
        self._seen: dict[str, Tensor] = {}

    @property
    def state_key(self) -> str:
        """Separate states, since several may be used for different modules."""
        return key_of_state(self, names=self.names)

    # --- hooks, in the order Lightning calls them ---

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            refuse_listed_twice(self, trainer)
            refuse_all_but_dtensors(self, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if is_a(trainer.strategy, ModelParallelStrategy) and trainer.strategy.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"{type(self).__name__}(...): tensor parallelism splits the heads of an attention over processes; each "
                "must see all of them, as with tensor_parallel_size=1."
            )
        attentions = self._attentions(pl_module)
        for name, module in attentions.items():
            if isinstance(module, nn.MultiheadAttention):
                hook = module.register_forward_pre_hook(self._watch_whole(name), with_kwargs=True)
                self._at_end(hook.remove)
            else:
                self._watch_parts(name, module)
        clip = partial(self._clip, attentions)
        self._at_end(watch_steps(trainer, StepListener(type(self).__name__, after=clip)).remove)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen.clear()  # a sanity check or a finder may have run the module
        for optimizer in trainer.optimizers:
            refuse_folded_average(type(self).__name__, optimizer, "leave out Fuse, or the average")

    # --- implementation ---

    def _attentions(self, pl_module: pl.LightningModule) -> dict[str, nn.Module]:
        owner = type(self).__name__
        if self.names is not None:
            found = modules_named(owner, "names", pl_module, self.names)
        else:
            named = pl_module.named_modules()
            found = {name: each for name, each in named if isinstance(each, nn.MultiheadAttention)}
        if not found:
            raise ValueError(
                f"{owner}(names=None): the module has no MultiheadAttention; give the names of its attention."
            )
        for name, module in found.items():
            if isinstance(module, nn.MultiheadAttention):
                if self.num_heads not in (None, module.num_heads):
                    raise ValueError(f"{owner}(num_heads={self.num_heads}): {name} has {module.num_heads} heads.")
            else:
                num_heads = self._heads_of(name, module)
                for part in (self.q, self.k):
                    if not isinstance(getattr(getattr(module, part, None), "weight", None), Tensor):
                        children = ", ".join(child for child, _ in module.named_children()) or "none"
                        raise ValueError(
                            f"{owner}(names={self.names!r}): {name} must have a projection {part!r} with a weight; its "
                            f"children are {children}."
                        )
                self._check_heads(name, module, num_heads)
        return found

    def _check_heads(self, name: str, module: nn.Module, num_heads: int) -> None:
        """Raises if the projections cannot have so many; lazy ones have no size yet, and frozen ones may be packed."""
        q, k = (getattr(module, part).weight for part in (self.q, self.k))
        if all(weight.requires_grad and not is_lazy(weight) for weight in (q, k)):
            given, names = (
                f"{type(self).__name__}(num_heads={self.num_heads})",
                (f"{name}.{self.q}", f"{name}.{self.k}"),
            )
            count_key_heads(given, len(q), len(k), num_heads, names)

    def _heads_of(self, name: str, module: nn.Module) -> int:
        given = getattr(module, "num_heads", None) if self.num_heads is None else self.num_heads
        if not isinstance(given, int):
            raise ValueError(f"{type(self).__name__}(num_heads=None): {name} has no num_heads; give their number.")
        return given

    def _watch_whole(self, name: str) -> Callable[..., None]:
        """A MultiheadAttention projects inside of one function, so its projections are computed here."""

        def hook(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not module.training or not torch.is_grad_enabled():
                return
            query, key = (
                kwargs[part] if part in kwargs else args[place] for place, part in enumerate(("query", "key"))
            )
            with torch.no_grad():
                (q_weight, q_bias), (k_weight, k_bias) = _projections(module)
                q, k = F.linear(query, q_weight, q_bias), F.linear(key, k_weight, k_bias)
                if q.dim() == 3 and not module.batch_first:
                    q, k = q.transpose(0, 1), k.transpose(0, 1)
                if module.bias_k is not None:
                    k = torch.cat(
                        [k, module.bias_k.view(*[1] * (k.dim() - 1), -1).expand(*k.shape[:-2], 1, -1)], dim=-2
                    )
                self._see(name, q, k, module.num_heads)

        return hook

    def _watch_parts(self, name: str, module: nn.Module) -> None:
        waiting: dict[str, Tensor] = {}

        def hook(part: str, projection: nn.Module, inputs: Any, output: Any) -> None:
            if not projection.training or not torch.is_grad_enabled():
                return
            waiting[part] = first_tensor(type(self).__name__, f"{name}.{part}", output).detach()
            if len(waiting) == 2:
                self._see(name, waiting.pop(self.q), waiting.pop(self.k), self._heads_of(name, module))

        for part in (self.q, self.k):
            self._at_end(getattr(module, part).register_forward_hook(partial(hook, part)).remove)

    def _see(self, name: str, q: Tensor, k: Tensor, num_heads: int) -> None:
        largest = max_logits(q, k, num_heads, self.scale)
        self._seen[name] = torch.maximum(self._seen[name], largest) if name in self._seen else largest

    def _clip(self, attentions: dict[str, nn.Module], optimizer: Optimizer, place: int) -> None:
        owned = {param for group in optimizer.param_groups for param in group["params"]}
        for name, module in attentions.items():
            params = self._whole_params(module)
            if not all(param.requires_grad for param in params):
                continue  # both projections share a factor
            trained = [param for param in params if param in owned and was_updated(optimizer, param)]
            if not trained:
                continue
            largest = self._seen.pop(name, None)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                largest = _largest_of_all(largest, self._num_heads(name, module), trained[0])
            if largest is None:
                continue
            self.max_logits[name] = largest
            sharded = [param for param in params if sharding_groups(param)]
            copies = dict(zip(sharded, gathered([local(param) for param in sharded], sharded), strict=True))
            queries, keys = self._params(module, copies)
            qk_clip_(queries, keys, largest, self.threshold)
            for param, whole in copies.items():
                scatter_(local(param.detach()), whole, param)

    def _num_heads(self, name: str, module: nn.Module) -> int:
        return module.num_heads if isinstance(module, nn.MultiheadAttention) else self._heads_of(name, module)

    def _whole_params(self, module: nn.Module) -> list[Tensor]:
        """The parameters that hold the projections."""
        if isinstance(module, nn.MultiheadAttention):
            weights = [module.in_proj_weight]
            if module.in_proj_weight is None:
                weights = [module.q_proj_weight, module.k_proj_weight]
            held = [*weights, module.in_proj_bias, module.bias_k]
        else:
            projections = getattr(module, self.q), getattr(module, self.k)
            held = [tensor for each in projections for tensor in (each.weight, getattr(each, "bias", None))]
        return [param for param in held if param is not None]

    def _params(self, module: nn.Module, copies: Mapping[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weight and bias of the projections, or parts of their copies; parts of a packed weight are views."""
        if isinstance(module, nn.MultiheadAttention):
            (q_weight, q_bias), (k_weight, k_bias) = _projections(module, copies)
            bias_k = None if module.bias_k is None else _of(module.bias_k, copies).view(-1)
            of_queries, of_keys = [q_weight, q_bias], [k_weight, k_bias, bias_k]
        else:
            projections = getattr(module, self.q), getattr(module, self.k)
            held = ([each.weight, getattr(each, "bias", None)] for each in projections)
            of_queries, of_keys = ([None if p is None else _of(p, copies) for p in params] for params in held)
        return [p for p in of_queries if p is not None], [p for p in of_keys if p is not None]

    def _forget(self) -> None:
        self._seen = {}


_Projection = tuple[Tensor, Tensor | None]


def _of(param: Tensor, copies: Mapping[Tensor, Tensor]) -> Tensor:
    return copies[param] if param in copies else param.detach()


def _projections(
    module: nn.MultiheadAttention, copies: Mapping[Tensor, Tensor] = MappingProxyType({})
) -> tuple[_Projection, _Projection]:
    """(weight, bias) of queries and keys, or of the whole copies of sharded ones."""
    size = module.embed_dim
    biases: list[Tensor | None] = [None, None]
    if module.in_proj_bias is not None:
        packed = _of(module.in_proj_bias, copies)
        biases = [packed[:size], packed[size : 2 * size]]
    if module.in_proj_weight is not None:
        packed = _of(module.in_proj_weight, copies)
        weights = packed[:size], packed[size : 2 * size]
    else:
        weights = _of(module.q_proj_weight, copies), _of(module.k_proj_weight, copies)
    return (weights[0], biases[0]), (weights[1], biases[1])


def _largest_of_all(largest: Tensor | None, num_heads: int, param: Tensor) -> Tensor | None:
    """The largest logits of all processes, of which some may have seen none."""
    dtype = torch.promote_types(param.dtype, torch.float32)  # the same on all of them
    ours = torch.full((num_heads,), -torch.inf, dtype=dtype, device=param.device)
    if largest is not None:
        ours = torch.maximum(ours, largest.to(dtype))
    torch.distributed.all_reduce(ours, torch.distributed.ReduceOp.MAX)
    return None if bool((ours == -torch.inf).all()) else ours
