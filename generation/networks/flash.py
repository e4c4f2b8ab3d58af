"""Attention by the flash kernels of PyTorch, forward and backward, in an order of sums that does not change.

The forward always repeats its bytes. The backward does so in PyTorch's deterministic mode, and only flash
attention has both: the memory-efficient kernels are slower, and cuDNN's are refused in that mode.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from generation.networks.layers import attend

__all__ = ["attention", "attention_backward"]


def _flash(q: Tensor) -> bool:
    """Whether the flash kernels take heads like these; otherwise attention is by plain products."""
    fits = q.is_cuda and q.dtype != torch.float32 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return fits and _has_flash(q.device)


@functools.cache
def _has_flash(device: torch.device) -> bool:
    """Whether this build of torch and this GPU have the flash kernels."""
    return torch.backends.cuda.is_flash_attention_available() and (
        torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``softmax(q k^T / sqrt(d)) v``, and what the backward pass needs beside it.

    Args:
        q: Queries, (b, heads, n, d); each row of d numbers contiguous, the other strides do not matter.
        k: Keys, the same.
        v: Values, the same.

    Returns:
        (b, heads, n, d), contiguous as (b, n, heads, d), and tensors for :func:`attention_backward`.
    """
    if not _flash(q):
        return attend(q, k, v, repeatable=True), ()
    out, log_sum, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    return out, (log_sum, seed, offset)


def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The gradients at q, k and v, from the one at the output ``out`` of :func:`attention`."""
    if not _flash(q):
        with torch.enable_grad():
            inputs = tuple(each.detach().requires_grad_() for each in (q, k, v))
            return torch.autograd.grad(attend(*inputs, repeatable=True), inputs, gradient)
    log_sum, seed, offset = saved
    n = q.shape[2]
    with _fixed_order():
        gradients: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, out, log_sum, None, None, n, n, 0.0, False, seed, offset
        )
    return gradients


@contextlib.contextmanager
def _fixed_order() -> Iterator[None]:
    """PyTorch's deterministic mode, without its filling of new memory: the backward else adds by atomics."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
