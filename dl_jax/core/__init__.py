"""The training loop and what it stands on. Importing the package loads nothing: `data/` reads `core.errors`."""
