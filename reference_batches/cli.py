"""`evalkit reference`: published reference batches, and those made of your own images."""

from __future__ import annotations

import click

__all__ = ["reference"]


@click.group()
def reference() -> None:
    """Fetch, build and look at reference batches."""
