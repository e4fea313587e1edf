# SPDX-License-Identifier: Apache-2.0
"""Ways to move a tensor's memory in place, keeping its values."""

import torch

FLOATS = (torch.float32, torch.float64)


def by_data(t):
    t.data = t.data.clone()


def by_set(t):
    if t.is_neg():
        return  # set_ keeps the bit, and would change the value
    with torch.no_grad():
        t.set_(t.clone())


def by_swap(t):
    other = t.detach().clone()
    torch.utils.swap_tensors(t, torch.nn.Parameter(other) if isinstance(t, torch.nn.Parameter) else other)


def by_sharing(t):
    t.share_memory_()


def can_be_resized(t):
    """torch 2.13 by itself crashes on memory that is shared, between processes or by copy on write."""
    t.data_ptr()  # what was shared by copy on write becomes the tensor's own
    return not t.is_shared()


def by_resizing(t):
    if not can_be_resized(t):
        return
    values = t.detach().clone()
    t.data.resize_(t.numel() + 5000)
    t.data.resize_(values.shape)
    t.data.copy_(values)


def by_storage(t):
    if not can_be_resized(t):
        return
    values, storage = t.detach().clone(), t.untyped_storage()
    size = storage.nbytes()
    if size != values.numel() * values.element_size():
        return  # other tensors lie there too
    storage.resize_(0)
    storage.resize_(size + 8000)
    t.data.copy_(values)


def by_dtype(t):
    if t.dtype in FLOATS and not isinstance(t, torch.nn.Parameter):
        t.data = t.data.double()


def by_transposing(t):
    if t.dim() == 2:
        t.data = t.data.t().contiguous().t()


def by_copy_on_write(t):
    if t.is_shared():
        return  # torch 2.13 cannot
    t.data = torch._lazy_clone(t.data)


def by_negating_twice(t):
    if t.dtype in FLOATS:
        t.data = torch._neg_view(-t.data)


MOVES = [by_data, by_set, by_swap, by_sharing, by_resizing, by_storage, by_dtype, by_transposing, by_copy_on_write]
MOVES += [by_negating_twice]


class Subclass(torch.Tensor):
    """A class of a user's own, over plain memory."""

    def __deepcopy__(self, memo):
        return self.detach().as_subclass(torch.Tensor).clone().as_subclass(Subclass)


REPLACEMENTS = {
    "a clone": lambda t: t.clone(),
    "another dtype": lambda t: t.double() if t.dtype in FLOATS else t.clone(),
    "another layout": lambda t: t.t().contiguous().t() if t.dim() == 2 else t.clone(),
    "expanded": lambda t: t.clone().expand(t.shape),
    "gapped": lambda t: torch.stack([t, t], -1)[..., 0],
    "negated lazily": lambda t: torch._neg_view(-t) if t.dtype in FLOATS else t.clone(),
    "with an offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
    "requiring gradients": lambda t: t.clone().requires_grad_() if t.dtype in FLOATS else t.clone(),
    "a subclass": lambda t: t.clone().as_subclass(Subclass),
}
"""Tensors of the same values to put in the place of a state tensor."""
