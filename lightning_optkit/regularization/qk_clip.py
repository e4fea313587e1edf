# SPDX-License-Identifier: Apache-2.0
"""QK-clip: the query and key projections of every attention head shrink until its logits stay below a threshold.

Source: Kimi Team 2025, "Kimi K2: Open Agentic Intelligence", arXiv:2507.20534, Section 2.1 (MuonClip), Algorithm 1.
"""

import math

import torch
from torch import Tensor

from lightning_optkit._checks import check_in, check_int, check_listed, check_tensor, check_tensors

__all__ = ["max_logits", "qk_clip_"]

_AT_ONCE = 2**22  # logits in memory


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    r"""The largest attention logit of every head, over all pairs of positions and all examples; masks are not applied.

    .. math:: S^h_{\max} = \max_{X \in B} \max_{i, j} \frac{1}{\sqrt{d}}\, q^h_i \cdot k^h_j

    Args:
        q: Projected queries, (..., L, num_heads * d).
        k: Projected keys, (..., S, num_key_heads * d); several heads may share one of the keys' (grouped queries).
        num_heads: Number of heads, at least 1.
        scale: Factor of the logits, in (0, inf). Default: 1 / sqrt(d).

    Returns:
        (num_heads,), in fp32 or wider; -inf for empty inputs.

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> max_logits(torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[1.0, 1.0]]), num_heads=2)
        tensor([2., 3.])
    """
    check_tensor("max_logits", "q", q, "floating", min_ndim=2)
    check_tensor("max_logits", "k", k, "floating", min_ndim=2)
    num_heads = check_int("max_logits", "num_heads", num_heads, minimum=1)
    num_key_heads = count_key_heads(
        f"max_logits(num_heads={num_heads})", q.shape[-1], k.shape[-1], num_heads, ("q", "k")
    )
    if q.shape[:-2] != k.shape[:-2]:
        raise ValueError(f"max_logits(k.shape={tuple(k.shape)}): k must have the batch of q, {tuple(q.shape[:-2])}.")
    width = q.shape[-1] // num_heads
    factor = 1 / math.sqrt(width) if scale is None else check_in("max_logits", "scale", scale, "(0, inf)")
    dtype = torch.promote_types(q.dtype, torch.float32)
    best = torch.full((num_heads,), -math.inf, dtype=dtype, device=q.device)
    if not q.numel() or not k.numel():
        return best
    queries = q.reshape(-1, q.shape[-2], num_heads, width).to(dtype).transpose(1, 2)
    keys = k.reshape(-1, k.shape[-2], num_key_heads, width).to(dtype).transpose(1, 2)
    keys = keys.repeat_interleave(num_heads // num_key_heads, dim=1)
    at_once = max(1, _AT_ONCE // (num_heads * q.shape[-2] * k.shape[-2]))
    for few_queries, few_keys in zip(torch.split(queries, at_once), torch.split(keys, at_once), strict=True):
        best = torch.maximum(best, (few_queries @ few_keys.mT).amax((0, 2, 3)))
    return best * factor


@torch.no_grad()
def qk_clip_(q_params: list[Tensor], k_params: list[Tensor], logits: Tensor, threshold: float = 100.0) -> None:
    r"""Scales the projections of each head h with :math:`S^h_{\max} > \tau` in place, so that its logits reach tau.

    .. math:: \gamma_h = \min(1, \tau / S^h_{\max}), \quad W_q^h \leftarrow \sqrt{\gamma_h}\, W_q^h, \quad
        W_k^h \leftarrow \sqrt{\gamma_h}\, W_k^h

    Keys that several heads share are left as they are, as the report does with the shared rotary key; the queries then
    take the whole factor.

    Args:
        q_params: Weight of the query projection, and its bias if there is one: (num_heads * d, ...).
        k_params: Those of the key projection: (num_key_heads * d, ...).
        logits: The largest logit of every head, (num_heads,), see `max_logits`.
        threshold: tau, in (0, inf).

    Raises:
        ValueError: if shapes do not fit.

    Example:
        >>> q, k = torch.ones(2, 1), torch.ones(2, 1)
        >>> qk_clip_([q], [k], logits=torch.tensor([400.0, 50.0]), threshold=100.0)
        >>> q.flatten()
        tensor([0.5000, 1.0000])
    """
    threshold = check_in("qk_clip_", "threshold", threshold, "(0, inf)")
    such_as = "a list of the weight, or of weight and bias"
    queries, keys = (
        check_tensors("qk_clip_", name, check_listed("qk_clip_", name, params, such_as), "floating")
        for name, params in (("q_params", q_params), ("k_params", k_params))
    )
    check_tensor("qk_clip_", "logits", logits, "floating", min_ndim=1)
    given = f"qk_clip_(logits.shape={tuple(logits.shape)})"
    if logits.dim() != 1 or not len(logits):
        raise ValueError(f"{given}: must be one number per head.")
    shares = count_key_heads(given, len(queries[0]), len(keys[0]), len(logits), ("q_params", "k_params")) < len(logits)
    # A run whose logits have overflowed is not helped by weights of 0.
    factor = torch.where((logits > threshold) & logits.isfinite(), threshold / logits, 1.0)
    for param in queries:
        _scale_(param, factor if shares else factor.sqrt())
    for param in keys if not shares else ():
        _scale_(param, factor.sqrt())


def _scale_(param: Tensor, factor: Tensor) -> None:
    wide = torch.promote_types(param.dtype, torch.float32)
    by_row = factor.to(param.device, wide).repeat_interleave(len(param) // len(factor))
    # A head that is not clipped keeps its bits.
    by_row = by_row.view(-1, *[1] * (param.dim() - 1))
    param.copy_(torch.where(by_row == 1, param, (param.to(wide) * by_row).to(param.dtype)))


def count_key_heads(given: str, q_size: int, k_size: int, num_heads: int, names: tuple[str, str]) -> int:
    """The number of heads of the keys.

    Args:
        given: The argument that says how many the queries have, for the message.
        q_size: Numbers of a query.
        k_size: Numbers of a key.
        num_heads: Heads of the queries.
        names: What the two are called, for the message.

    Raises:
        ValueError: if the sizes do not fit.
    """
    width = q_size // num_heads
    if not width or q_size % num_heads or k_size % width or not k_size or num_heads % (k_size // width):
        raise ValueError(
            f"{given}: the number of heads must divide the {q_size} numbers of a query of {names[0]}, and fit the "
            f"{k_size} of a key of {names[1]}."
        )
    return k_size // width
