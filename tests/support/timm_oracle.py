"""timm where it is installed, without torchvision: it imports that, and tests need nothing of it."""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any, ClassVar

import pytest

__all__ = ["timm_without_torchvision"]


class _Module(types.ModuleType):
    """Has every name: modes of interpolation, and else empty classes."""

    __path__: ClassVar[list[str]] = []
    __version__ = "0.30"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            modes = ("NEAREST", "NEAREST_EXACT", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
            made: Any = enum.Enum(name, [(mode, mode.lower()) for mode in modes])
        else:
            made = type(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return (
            ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def timm_without_torchvision() -> Iterator[Any]:
    """The module; without it, the test that asks is skipped and says what to install."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("torchvision") is None:
            patch.setattr(sys, "meta_path", [*sys.meta_path, _Finder()])
        before = set(sys.modules)
        try:
            yield pytest.importorskip("timm", reason="needs timm: pip install --no-deps timm")
        finally:
            # What was made with the stand-in is not to be found by others.
            for name in set(sys.modules) - before:
                if name.split(".")[0] in ("timm", "torchvision"):
                    del sys.modules[name]
