"""The command line: it translates options into calls."""

from typing import NoReturn

__all__ = ["main"]


def main() -> NoReturn:
    """Run ``evalkit``; see :func:`evalkit.cli.root.main`."""
    from evalkit.cli import root

    root.main()
