"""What a peer imports and these tests and benchmarks do not use."""

from __future__ import annotations

import types
from typing import ClassVar


class _Anything(types.ModuleType):
    """A module that has every name, each of them an empty class."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def torchvision_modules() -> dict[str, types.ModuleType]:
    """For ``sys.modules``: torch-fidelity imports torchvision, which has no build for every torch."""
    names = [f"torchvision{part}" for part in ("", ".datasets", ".transforms", ".transforms.functional")]
    modules = {name: _Anything(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    return modules
