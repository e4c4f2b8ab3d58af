"""The arithmetic of a network: as published, or fast.

======================  ==============================================================================
``reference``           float32 throughout, no TF32: what other arithmetic is measured against
``reference-fp16``      as the published sampling commands: convolutions and attention of a UNet's blocks
                        in float16, all else and the classifier in float32; the 512x512 model, which those
                        run with ``--use_fp16 False``, all in float32
``fast``                convolutions and attention in half precision, normalisation and embeddings in
                        float32, channels-last; on CUDA compiled, so that norm, scale-shift and SiLU are
                        one kernel. Half precision is float16 where the published commands use it, and
                        else bfloat16, which has the range of float32
======================  ==============================================================================

Every mode chooses deterministic kernels: the same numbers, batch size and device give the same bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from evalkit.errors import InputError
from generation.networks.classifier import Classifier
from generation.networks.unet import Trunk

__all__ = ["MODES", "Mode", "Prepared", "arithmetic", "prepare"]

Mode: TypeAlias = Literal["reference", "reference-fp16", "fast"]
MODES: tuple[str, ...] = get_args(Mode)


class Prepared:
    """A network on its device and in its arithmetic; called like the network.

    Call it, and take gradients through it, within :func:`arithmetic` of the same mode.

    Attributes:
        network: The network.
        description: Its arithmetic in words, for a run's record.
    """

    def __init__(self, network: Trunk, *, channels_last: bool, compiled: bool):
        self.network = network
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._call: Any = torch.compile(network, dynamic=False) if compiled else network
        words = (
            f"{str(network.dtype).removeprefix('torch.')} convolutions",
            *(["channels-last"] if channels_last else []),
            *(["compiled"] if compiled else []),
        )
        self.description = ", ".join(words)

    def __call__(self, x: Tensor, t: Tensor, *args: Tensor | None, **inputs: Tensor | None) -> Tensor:
        """As the network's ``forward``; images float32 in any layout."""
        output: Tensor = self._call(x.contiguous(memory_format=self._layout), t, *args, **inputs)
        return output


def prepare(
    network: Trunk,
    mode: str,
    device: str | torch.device,
    published: Literal["float16", "float32"] = "float16",
) -> Prepared:
    """Put a network on a device and into the arithmetic of a mode.

    Args:
        network: Taken over: its parameters are moved and rounded.
        mode: One of ``MODES``.
        device: Where it goes.
        published: In what the published commands run a UNet, see :class:`generation.presets.ModelPreset`.

    Raises:
        InputError: An unknown mode, or ``fast`` on CUDA without Triton, which compiles the kernels.
    """
    device = torch.device(device)
    fast = _known(mode) == "fast"
    compiled = fast and device.type == "cuda"
    if compiled and not _has_triton():
        raise InputError(
            "Mode fast compiles its kernels on CUDA and needs Triton, which is not installed or does not "
            "know this GPU. Install it with `pip install triton`, or use --mode reference-fp16."
        )
    network.to(device)
    _round_convolutions(network, _type_of(network, mode, device, published))
    # What the published scripts use on a GPU is contiguous; a CPU is faster the other way.
    channels_last = fast or device.type == "cpu"
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Prepared(network, channels_last=channels_last, compiled=compiled)


@contextlib.contextmanager
def arithmetic(mode: str) -> Iterator[None]:
    """The settings of torch that ``mode`` wants; forward and backward passes belong inside.

    Raises:
        InputError: An unknown mode.
    """
    tf32 = _known(mode) == "fast"
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=tf32):
            yield
    finally:
        matmul.allow_tf32 = before


def _known(mode: str) -> str:
    if mode not in MODES:
        raise InputError(f"Unknown mode {mode!r}. Give one of {', '.join(MODES)}.")
    return mode


def _type_of(network: Trunk, mode: str, device: torch.device, published: str) -> torch.dtype:
    """Of the convolutions."""
    # A classifier's gradients would leave float16's range at the pixels, and so may a UNet that was never
    # run in it.
    float16 = published == "float16" and not isinstance(network, Classifier)
    if mode == "reference-fp16":
        return torch.float16 if float16 else torch.float32
    if mode == "reference":
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if _cpu_multiplies_bfloat16() else torch.float32
    return torch.float16 if float16 else torch.bfloat16


def _round_convolutions(network: Trunk, dtype: torch.dtype) -> None:
    for name in ("input_blocks", "middle_block", "output_blocks"):
        for module in getattr(network, name, nn.Identity()).modules():
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                module.to(dtype)


def _cpu_multiplies_bfloat16() -> bool:
    """Whether the processor itself does, so that bfloat16 is the faster type."""
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())
