"""The command line. It translates options into calls; :func:`evalkit.cli.root.main` is its entry."""
