"""``python -m evalkit`` is the command ``evalkit``."""

from evalkit.cli import main

main()
