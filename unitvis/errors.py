"""Exceptions raised to users, and helpers that build their messages."""

import difflib
import unicodedata
from collections.abc import Iterable
from numbers import Integral

_INT64 = 2**63 - 1  # the largest number that 64 bits hold, with a sign


class UnitvisError(Exception):
    """An error that the user can fix: the message says what is wrong, with the value, and what to do, in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))  # it may hold names that come from files


def printable(text: str) -> str:
    """Text in which line breaks and characters that steer a terminal or turn the direction of writing are escaped."""
    return "".join(
        character.encode("unicode_escape").decode() if _steers(character) else character for character in text
    )


def _steers(character: str) -> bool:
    """Whether a character is a control, format or surrogate character, or separates lines or paragraphs."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


class ImageError(UnitvisError):
    """An image that cannot be used; the message is the reason that the manifest lists."""


class Interrupted(KeyboardInterrupt):
    """A signal ended a scan or a pack; the message says how to resume. `code`: exit code, 128 + signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.code = 128 + signal


def first_line(error: BaseException) -> str:
    """First line of an exception's message, or "no message"."""
    return (str(error).strip() or "no message").split("\n")[0]


def error_text(error: BaseException) -> str:
    """Type and first line of an exception's message, as in "ValueError: no message"."""
    return f"{type(error).__name__}: {first_line(error)}"


def closest_names(name: str, names: Iterable[str]) -> str:
    """End of an error message about an unknown name: the three most similar names, or else the names that exist."""
    known = list(names)
    if close := difflib.get_close_matches(name, known, n=3, cutoff=0.4):
        return f"the closest are {', '.join(close)}"
    return f"there are {abridged(known)}"


def abridged(names: list[str]) -> str:
    """The first eight names, separated by commas, and the number of the others."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def whole_number(name: str, value: object, least: int, most: int = _INT64) -> int:
    """The value of an option as an int; UnitvisError unless it is a whole number, also one of NumPy, in this range."""
    if isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= most:
        return int(value)
    too_large = isinstance(value, Integral) and not isinstance(value, bool) and int(value) > most
    wanted = f"of at most {most:,}" if too_large else f"of at least {least:,}"
    raise UnitvisError(f"{name} must be a whole number {wanted}, not {value!r}")


def check_unit(layer: str, unit: int, units: int) -> None:
    """Raise UnitvisError unless 0 <= unit < units, the number of units in the layer."""
    if not 0 <= unit < units:
        raise UnitvisError(f"layer {layer!r} has no unit {unit}; it has {units}, from 0")
