# SPDX-License-Identifier: Apache-2.0
"""Calls the norms of a CUDA library through its C interface (csrc/cuda/api.h), on host tensors."""

import ctypes
from dataclasses import dataclass, field

import torch

from lightning_optkit.layers._reference import _splitmix64, norm_backward_reference, survival

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
EPS = 1e-5


class _Dropout(ctypes.Structure):
    _fields_ = [
        ("key_low", ctypes.c_uint32),
        ("key_high", ctypes.c_uint32),
        ("keep_below", ctypes.c_uint32),
        ("scale", ctypes.c_float),
        ("on", ctypes.c_int32),
    ]


def _structure(pointers, integers, types, rest):
    fields = [(name, ctypes.c_void_p) for name in pointers]
    fields += [(name, ctypes.c_int64) for name in integers] + [(name, ctypes.c_int32) for name in types]
    return type("_Arguments", (ctypes.Structure,), {"_fields_": [*fields, ("dropout", _Dropout), *rest]})


_Forward = _structure(
    ["x", "residual", "sum", "y", "mean", "rstd", "weight", "bias"],
    ["rows", "size", "x_stride"],
    ["x_type", "residual_type", "type", "weight_type"],
    [("eps", ctypes.c_double)],
)
_Backward = _structure(
    ["dy", "d_sum", "x", "mean", "rstd", "weight", "dx", "d_input"],
    ["rows", "size", "x_stride"],
    ["type", "weight_type"],
    [("wants_weight", ctypes.c_int32), ("wants_bias", ctypes.c_int32)],
)
_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64


class _Api(ctypes.Structure):
    _fields_ = [
        ("version", _I),
        ("on_host", _I),
        *((name, _P) for name in ("create", "destroy", "layout", "norm", "step")),
        ("forward", ctypes.CFUNCTYPE(ctypes.c_char_p, _I, _P, _I, _P)),
        ("parts", ctypes.CFUNCTYPE(ctypes.c_char_p, _I, _P, _I, _P)),
        ("backward", ctypes.CFUNCTYPE(ctypes.c_char_p, _I, _P, _P, _P, _L, _P, _I, _P)),
        ("architectures", ctypes.c_char_p),
    ]


def _dropout(p, seed):
    if p <= 0:
        return _Dropout(0, 0, 0, 1.0, 0)
    key = _splitmix64(_splitmix64(_splitmix64(seed)))
    keep_below, scale = min(int((1.0 - p) * 2**32), 2**32 - 1), 1.0 / (1.0 - p) if p < 1 else 0.0
    return _Dropout(key & 0xFFFFFFFF, key >> 32, keep_below, scale, 1)


@dataclass
class Case:
    """One call: what to normalize, and how it lies in memory."""

    rows: int
    size: int
    dtype: torch.dtype
    centered: bool = True
    adds: bool = False
    dropout: float = 0.0
    weight_dtype: torch.dtype | None = None
    residual_dtype: torch.dtype | None = None
    gap: int = 0
    """Elements between the rows of x."""
    offset: int = 0
    """Elements before the first number of every tensor."""
    affine: bool = True
    seed: int = 5
    rooms: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def tensor(self, values, *, gap=0):
        """`values` inside a larger buffer of 7s, which must not be written."""
        rows, size = values.shape if values.dim() == 2 else (1, values.numel())
        room = torch.full((self.offset + rows * (size + gap) + 64,), 7.0, dtype=values.dtype)
        view = room[self.offset :].as_strided((rows, size), (size + gap, 1))
        view.copy_(values.view(rows, size))
        outside = torch.ones_like(room, dtype=torch.bool)
        outside[self.offset :].as_strided((rows, size), (size + gap, 1)).zero_()
        self.rooms.append((room, outside))
        return view

    def untouched(self):
        """Whether the surrounding 7s are unchanged."""
        return all(bool((room[outside] == 7.0).all()) for room, outside in self.rooms)


def run(library, case):
    """Outputs and gradients by name, and the same by the formula in fp64, from the same stored inputs."""
    api = _api(library)
    c, wide = case, torch.float64 if case.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(c.rows * 7919 + c.size)

    def normal(rows, dtype, scale=1.0, shift=0.0):
        return (torch.randn(rows, c.size, generator=generator, dtype=torch.float64) * scale + shift).to(dtype)

    residual_dtype = c.residual_dtype or c.dtype
    out_dtype = torch.promote_types(c.dtype, residual_dtype) if c.adds else c.dtype
    weight_dtype = c.weight_dtype or out_dtype
    x = c.tensor(normal(c.rows, c.dtype, 2.0, 0.5), gap=c.gap)
    residual = c.tensor(normal(c.rows, residual_dtype)) if c.adds else None
    weight = c.tensor(normal(1, weight_dtype)) if c.affine else None
    bias = c.tensor(normal(1, weight_dtype)) if c.affine else None
    dy, d_sum = c.tensor(normal(c.rows, out_dtype)), c.tensor(normal(c.rows, out_dtype)) if c.adds else None
    zeros = torch.zeros(c.rows, c.size)
    y, total = c.tensor(zeros.to(out_dtype)), c.tensor(zeros.to(out_dtype)) if c.adds else None
    dx, d_input = c.tensor(zeros.to(out_dtype)), c.tensor(zeros.to(out_dtype)) if c.dropout else None
    d_weight, d_bias = c.tensor(zeros[:1].to(weight_dtype)), c.tensor(zeros[:1].to(weight_dtype))
    mean, rstd = torch.zeros(c.rows, dtype=wide), torch.zeros(c.rows, dtype=wide)
    dropout = _dropout(c.dropout, c.seed)

    def at(t):
        return None if t is None else t.data_ptr()

    forward = _Forward(
        at(x), at(residual), at(total), at(y), at(mean) if c.centered else None, at(rstd), at(weight), at(bias),
        c.rows, c.size, c.size + c.gap, TYPES[c.dtype], TYPES[residual_dtype], TYPES[out_dtype], TYPES[weight_dtype],
        dropout, EPS,
    )  # fmt: skip
    check(api.forward(c.centered, ctypes.addressof(forward), 0, None))
    normalized = total if c.adds else x
    backward = _Backward(
        at(dy), at(d_sum), at(normalized), at(mean) if c.centered else None, at(rstd), at(weight), at(dx), at(d_input),
        c.rows, c.size, c.size if c.adds else c.size + c.gap, TYPES[out_dtype], TYPES[weight_dtype], dropout, 1, 1,
    )  # fmt: skip
    parts = ctypes.c_int64(0)
    check(api.parts(c.centered, ctypes.addressof(backward), 0, ctypes.addressof(parts)))
    space = torch.full((2 * parts.value * c.size + 64,), 7.0, dtype=wide)
    check(
        api.backward(c.centered, ctypes.addressof(backward), at(d_weight), at(d_bias), parts.value, at(space), 0, None)
    )
    assert (space[-64:] == 7.0).all()
    found = dict(y=y, total=total, dx=dx, d_input=d_input, d_weight=d_weight, d_bias=d_bias)
    return {name: t for name, t in found.items() if t is not None}, _exact(
        c, x, residual, weight, bias, dy, d_sum, total
    )


def _api(library):
    library.optkit_cuda_api.restype = ctypes.POINTER(_Api)
    return library.optkit_cuda_api().contents


def check(error):
    assert error is None, error.decode()


def _exact(c, x, residual, weight, bias, dy, d_sum, total):
    def wide(t):
        return None if t is None else t.double()

    alive = survival(x, c.dropout, torch.tensor(c.seed)).double() if c.dropout else None
    exact = {}
    if c.adds:
        exact["total"] = (wide(x) if alive is None else wide(x) * alive) + wide(residual)
    stored = wide(total if c.adds else x)  # what is normalized is the rounded sum
    mean = stored.mean(-1, keepdim=True) if c.centered else 0.0
    normalized = (stored - mean) * ((stored - mean).square().mean(-1, keepdim=True) + EPS).rsqrt()
    exact["y"] = normalized * (1.0 if weight is None else wide(weight)) + (0.0 if bias is None else wide(bias))
    flat = None if weight is None else wide(weight).view(-1)
    dx, d_input, d_weight, d_bias = norm_backward_reference(
        c.centered, wide(dy), wide(d_sum), stored, flat, 1, EPS, alive
    )
    exact |= dict(dx=dx, d_weight=d_weight.view(1, -1), d_bias=d_bias.view(1, -1))
    return exact | (dict(d_input=d_input) if c.dropout else {})
