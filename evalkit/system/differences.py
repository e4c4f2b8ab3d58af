"""List differences between the settings of earlier work and those of this run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

__all__ = ["differences"]


def differences(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One phrase for each entry that differs, at any depth: ``"size was 64 and is now 256"``.

    Args:
        there: Settings of the earlier work, as read from JSON.
        here: Settings of this run.
        prefix: Prefix of every key.
    """
    found = []
    for key in sorted({*there, *here}, key=lambda name: ("sha256" in name, name)):  # digests last
        old, new = there.get(key), here.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {json.dumps(old)} and is now {json.dumps(new)}")
    return found
