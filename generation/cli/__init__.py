"""The verbs of `evalkit` that this package adds, a file each; `evalkit.cli.root` lists them."""
