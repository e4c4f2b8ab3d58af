"""A minimal Triton kernel, compiled and run to test whether Triton works."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["probe"]


def probe(device: torch.device) -> None:
    """Compile and launch a kernel.

    Raises:
        Exception: Any error of Triton, for example if there is no C compiler.
    """
    x = torch.zeros(16, dtype=torch.int32, device=device)
    with torch.cuda.device(device):
        _count[(1,)](x)
        torch.cuda.synchronize()


if importlib.util.find_spec("triton"):  # a dependency of torch for CUDA, but not for the CPU
    import triton  # type: ignore[import-not-found,unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found,unused-ignore]

    @triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
    def _count(x):  # type: ignore[no-untyped-def]
        lanes = tl.arange(0, 16)
        tl.store(x + lanes, lanes)
