"""The signature of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Progress"]

Progress: TypeAlias = Callable[[str, int, int], object]
"""Called with ``(stage, done, total)`` at the start of a stage and after every step of it.

``done`` and ``total`` count in one unit (images, bytes, rows, steps); ``total`` is 0 where it is not known.
Stages may alternate; a stage is over when ``done`` reaches ``total``.
"""
