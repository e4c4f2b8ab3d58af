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

Every one chooses deterministic kernels: the same numbers, batch size and device give the same bytes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from evalkit.errors import InputError, brief
from evalkit.system.devices import float32_arithmetic
from generation.networks.classifier import Classifier
from generation.networks.unet import Trunk

__all__ = ["PRECISIONS", "Precision", "Prepared", "arithmetic", "prepare"]

Precision: TypeAlias = Literal["reference", "reference-fp16", "fast"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


class Prepared:
    """A network on its device and in its arithmetic; called like the network.

    Call it, and take gradients through it, within :func:`arithmetic` of the same precision.

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
    precision: str,
    device: str | torch.device,
    published: Literal["float16", "float32"] = "float16",
) -> Prepared:
    """Put a network on a device and into a precision.

    Args:
        network: Modified in place: its parameters are moved and rounded.
        precision: One of ``PRECISIONS``.
        device: The device to put it on.
        published: Type in which the published commands run a UNet, see
            :class:`generation.presets.ModelPreset`.

    Raises:
        InputError: An unknown precision, or ``fast`` on CUDA without Triton, which compiles the kernels.
    """
    device = torch.device(device)
    fast = _known(precision) == "fast"
    compiled = fast and device.type == "cuda"
    if compiled and not _has_triton():
        raise InputError(
            "Precision fast compiles its kernels on CUDA and needs Triton, which is not installed or does "
            "not know this GPU. Install it with `pip install triton`, or use --precision reference-fp16."
        )
    network.to(device)
    _round_convolutions(network, _convolution_type(network, precision, device, published))
    # What the published scripts use on a GPU is contiguous; a CPU is faster the other way.
    channels_last = fast or device.type == "cpu"
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Prepared(network, channels_last=channels_last, compiled=compiled)


def arithmetic(precision: str) -> AbstractContextManager[None]:
    """The settings of torch for a precision; forward and backward passes belong inside.

    Raises:
        InputError: An unknown precision.
    """
    return float32_arithmetic(tf32=_known(precision) == "fast", deterministic=True)


def _known(precision: str) -> str:
    if precision not in PRECISIONS:
        raise InputError(f"Unknown precision {brief(precision)!r}. Give one of {', '.join(PRECISIONS)}.")
    return precision


def _convolution_type(network: Trunk, precision: str, device: torch.device, published: str) -> torch.dtype:
    # A classifier's gradients would leave float16's range at the pixels, and so may a UNet that was never
    # run in it.
    float16 = published == "float16" and not isinstance(network, Classifier)
    if precision == "reference-fp16":
        return torch.float16 if float16 else torch.float32
    if precision == "reference":
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
    """Whether the processor has instructions for it, so that bfloat16 is the faster type."""
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return bool(has_triton())
