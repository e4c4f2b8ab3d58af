"""Files of weights of ADM networks: what they hold. Nothing in them is ever run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from evalkit.errors import InputError, brief, listing
from evalkit.system.tensor_files import read_tensors
from generation.presets import ModelPreset

__all__ = ["FIRST_CONVOLUTION", "PRESET_KEY", "Content", "StateDictFile", "read_state_dict"]

Content: TypeAlias = Literal[
    "network", "averaged network (EMA)", "tensors and other things", "optimiser state", "no named tensors"
]
"""What a file of weights may hold."""

FIRST_CONVOLUTION = "input_blocks.0.0.weight"
"""The tensor by which an ADM network is recognised."""

PRESET_KEY = "evalkit_preset"
"""Key of the preset in the metadata of safetensors."""

TRAINING_FILES = "ema_*.pt holds averaged weights, model*.pt the last ones, opt*.pt the optimiser's state"


@dataclass(frozen=True)
class StateDictFile:
    """A file of weights as read: its tensors by name, or anything else.

    Attributes:
        path: The file.
        container: How it was written.
        content: What it holds, as Python reads it.
        preset: The preset in its metadata; None without one.
    """

    path: Path
    container: Literal["PyTorch", "safetensors"]
    content: Any
    preset: ModelPreset | None

    @cached_property
    def prefix(self) -> str:
        """What precedes every name of an ADM network.

        Such as ``module.`` of DistributedDataParallel or ``_orig_mod.`` of torch.compile.
        """
        names = _named_tensors(self.content)
        first = next((name for name in names if name.endswith(f".{FIRST_CONVOLUTION}")), "")
        prefix = first.removesuffix(FIRST_CONVOLUTION)
        return prefix if all(name.startswith(prefix) for name in names) else ""

    @cached_property
    def named(self) -> dict[str, Tensor]:
        """The named tensors at the top level, without the prefix; other entries are left out."""
        found = _named_tensors(self.content)
        return {name.removeprefix(self.prefix): tensor for name, tensor in found.items()}

    @property
    def problem(self) -> str | None:
        """Why the file does not hold the named tensors of a network; None if it does."""
        content = self.content
        if self.named and len(self.named) == len(content):
            return None
        if self.named:
            others = [
                f"{brief(key, 40)} ({type(value).__name__})"
                for key, value in content.items()
                if not (isinstance(key, str) and isinstance(value, Tensor))
            ]
            return (
                f"{self.path} holds, beside {len(self.named):,} named tensors, {listing(others)}. Save the "
                "tensors alone, as a network's state_dict() has them."
            )
        within = {}
        if isinstance(content, dict) and not _is_optimiser(content):
            within = {key: len(_named_tensors(value)) for key, value in content.items()}
        holding = [f"{brief(key, 40)} ({count:,} tensors)" for key, count in within.items() if count]
        nested = (
            f" Tensors are under the keys {listing(holding)}: save those of one key alone, with "
            "torch.save(torch.load(FILE)[KEY], NEW)."
            if holding
            else ""
        )
        return (
            f"{self.path} holds {_describe(content)}, not the named tensors of a network.{nested} Among the "
            f"files of a training run, {TRAINING_FILES}."
        )

    def tensors(self) -> dict[str, Tensor]:
        """The named tensors, without the prefix.

        Raises:
            InputError: It holds something else.
        """
        if self.problem:
            raise InputError(self.problem)
        return self.named

    @property
    def kind_of_content(self) -> Content:
        """What the file seems to hold; that weights are an average (EMA) only the file's name can say."""
        if _is_optimiser(self.content):
            return "optimiser state"
        if not self.named:
            return "no named tensors"
        if self.problem:
            return "tensors and other things"
        return "averaged network (EMA)" if self.path.name.startswith("ema") else "network"


def read_state_dict(path: Path) -> StateDictFile:
    """Recognise the container by its content and map it into memory.

    Raises:
        InputError: There is no such file, or it cannot be read.
    """
    file = read_tensors(path, "download a published checkpoint with `evalkit checkpoint fetch`")
    stated = file.metadata.get(PRESET_KEY)
    try:
        preset = ModelPreset.from_json(stated) if stated else None
    except InputError as error:
        raise InputError(f"{path}, {PRESET_KEY} in its metadata: {error}") from error
    return StateDictFile(path, file.container, file.content, preset)


def _named_tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict):
        return {}
    return {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }


def _is_optimiser(content: Any) -> bool:
    return isinstance(content, dict) and {"state", "param_groups"} <= set(content)


def _describe(content: Any) -> str:
    if _is_optimiser(content):
        return "an optimiser's state"
    if isinstance(content, dict):
        return f"a dictionary with the keys {listing([brief(key, 40) for key in content]) or '(none)'}"
    return f"a {type(content).__name__}"
