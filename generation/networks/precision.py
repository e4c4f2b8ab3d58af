"""The arithmetic of a network: as published, or fast.

======================  ==============================================================================
``reference``           float32 throughout, no TF32: what other arithmetic is measured against
``published``           as the published sampling commands: convolutions and attention of a UNet's blocks
                        in float16, all else and the classifier in float32; the 512x512 model, which those
                        run with ``--use_fp16 False``, all in float32
``fast``                convolutions and attention in half precision, normalisation and embeddings in
                        float32, channels-last; on CUDA with kernels that fuse norm, scale-shift and SiLU,
                        launched as CUDA graphs. Half precision is float16 where the published commands
                        use it, and else bfloat16, which has the range of float32
======================  ==============================================================================

Every one chooses deterministic kernels: the same numbers, batch size and device give the same bytes. The
default is ``published`` on CUDA, and ``reference`` elsewhere, where half precision is no faster.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from evalkit.errors import InputError, brief
from evalkit.system.devices import float32_arithmetic, has_triton
from generation.networks.classifier import Classifier
from generation.networks.graphs import Graphs
from generation.networks.unet import Trunk

__all__ = ["PRECISIONS", "Precision", "Prepared", "arithmetic", "default_precision", "prepare"]

Precision: TypeAlias = Literal["reference", "published", "fast"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


class Prepared:
    """A network on its device and in its arithmetic; called like the network.

    Call it, and take gradients through it, within :func:`arithmetic` of the same precision.

    Attributes:
        network: The network.
        description: Its arithmetic in words, for a run's record.
        graphs: Calls it through CUDA graphs; None calls it directly.
    """

    def __init__(self, network: Trunk, *, channels_last: bool, graphs: Graphs | None = None):
        self.network = network
        self.graphs = graphs
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        words = (
            f"{str(network.dtype).removeprefix('torch.')} convolutions",
            *(["channels-last"] if channels_last else []),
            *(["fused kernels"] if graphs else []),
        )
        self.description = ", ".join(words)

    def __call__(self, x: Tensor, t: Tensor, *args: Tensor | None, **inputs: Tensor | None) -> Tensor:
        """As the network's ``forward``; images float32 in any layout."""
        if x.requires_grad and torch.is_grad_enabled():  # which no graph follows; see `run`
            return self._direct(x, t, *args, **inputs)
        return self.run(_predict, x, t, *args, **inputs)

    def run(
        self,
        function: Callable[..., Tensor],
        *inputs: Tensor | float | None,
        **named: Tensor | float | None,
    ) -> Tensor:
        """``function(network, *inputs, **named)``, in CUDA graphs as a whole: see :class:`Graphs`."""
        if self.graphs is None:
            return function(self._direct, *inputs, **named)
        return self.graphs(function, self._direct, *inputs, **named)

    def _direct(self, x: Tensor, t: Tensor, *args: Tensor | None, **inputs: Tensor | None) -> Tensor:
        output: Tensor = self.network(x.contiguous(memory_format=self._layout), t, *args, **inputs)
        return output


def _predict(network: Callable[..., Tensor], *inputs: Tensor, **named: Tensor) -> Tensor:
    return network(*inputs, **named)


def default_precision(device: torch.device) -> Precision:
    """The precision of a device where none is asked for."""
    return "published" if device.type == "cuda" else "reference"


def prepare(
    network: Trunk,
    precision: str,
    device: str | torch.device,
    published: Literal["float16", "float32"] = "float16",
    graphs: Graphs | None = None,
) -> Prepared:
    """Put a network on a device and into a precision.

    Args:
        network: Modified in place: its parameters are moved and rounded.
        precision: One of ``PRECISIONS``.
        device: The device to put it on.
        published: Type in which the published commands run a UNet, see
            :class:`generation.presets.ModelPreset`.
        graphs: What calls the network where a precision uses CUDA graphs; networks that share it share the
            memory of their graphs. None: graphs of its own.

    Raises:
        InputError: An unknown precision, or ``fast`` on CUDA without Triton, which compiles the kernels.
    """
    device = torch.device(device)
    fast = _known(precision) == "fast"
    fused = fast and device.type == "cuda"
    if fused and not has_triton(device):
        raise InputError(
            "Precision fast compiles its kernels on CUDA and needs Triton 3.3, a C compiler, and a GPU of "
            "compute capability 8.0; one of them is missing. Install them, or use --precision published."
        )
    network.kernels = None  # they may be of a precision before
    network.to(device)
    _round_convolutions(network, _convolution_type(network, precision, device, published))
    # What the published scripts use on a GPU is contiguous; a CPU is faster the other way.
    channels_last = fast or device.type == "cpu"
    if channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if fused:
        from generation.networks.kernels import use_kernels

        use_kernels(network)
    return Prepared(network, channels_last=channels_last, graphs=(graphs or Graphs()) if fused else None)


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
    if precision == "published":
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
