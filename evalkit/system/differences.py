"""One wording for work that was begun with other settings than are asked for now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["differences"]


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A phrase for every entry, at any depth, in which a folder's work differs from what is asked for now.

    Args:
        there: What the folder was begun with, as JSON holds it.
        here: The same of now.
        prefix: What stands before every key.
    """
    found = []
    for key in sorted({*there, *here}, key=lambda name: ("sha256" in name, name)):  # digests last
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {json.dumps(old)} and is now {json.dumps(new)}")
    return found
