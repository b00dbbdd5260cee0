"""The command line."""

from unitvis.cli.codes import DONE, SKIPPED, USAGE, WRONG
from unitvis.cli.main import main

__all__ = ["DONE", "SKIPPED", "USAGE", "WRONG", "main"]
