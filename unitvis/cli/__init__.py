"""The command line."""

from unitvis.cli.main import COMMANDS, DONE, SKIPPED, USAGE, WRONG, main

__all__ = ["COMMANDS", "DONE", "SKIPPED", "USAGE", "WRONG", "main"]
