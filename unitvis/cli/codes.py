"""Exit codes of the command line."""

DONE = 0
WRONG = 1  # a check failed
USAGE = 2  # wrong usage, or no start
SKIPPED = 3  # images were skipped
