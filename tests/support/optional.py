"""Packages that some tests need and an installation may lack."""

from __future__ import annotations

from typing import Any

import pytest


def optional(module: str, extra: str) -> Any:
    """The module; without it, the test that asks is skipped and says what to install."""
    return pytest.importorskip(module, reason=f"needs {module}: pip install 'evalkit[{extra}]'")
