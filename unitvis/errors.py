"""The exceptions that users meet, and their words."""

import difflib
from collections.abc import Iterable


class UnitvisError(Exception):
    """Something the user can mend: the message says what is wrong, with the value, and what to do."""


class ImageError(UnitvisError):
    """One image cannot be used; the message is the reason that the manifest lists."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a scan; the message says how to go on with it, and `code` is the exit code of a shell."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.code = 128 + signal


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or "no message").split("\n")[0]


def named(error: BaseException) -> str:
    """An exception in one line, with its type."""
    return f"{type(error).__name__}: {first_line(error)}"


def closest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that is not there: the names most like it, or some of what there is."""
    known = list(names)
    if close := difflib.get_close_matches(name, known, n=3, cutoff=0.4):
        return f"the closest are {', '.join(close)}"
    return f"there are {some(known)}"


def some(names: list[str]) -> str:
    """A list that stays readable."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def check_unit(layer: str, unit: int, units: int) -> None:
    """UnitvisError unless the layer, which has so many, has this unit."""
    if not 0 <= unit < units:
        raise UnitvisError(f"layer {layer!r} has no unit {unit}; it has {units}, from 0")
