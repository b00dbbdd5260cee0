"""The command line."""

from unitvis.cli.main import DONE, SKIPPED, USAGE, WRONG, main

__all__ = ["DONE", "SKIPPED", "USAGE", "WRONG", "main"]
