"""A scan timed against what one would write without it."""
