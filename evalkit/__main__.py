"""``python -m evalkit`` is the command ``evalkit``."""

from evalkit.cli.root import main

main()
