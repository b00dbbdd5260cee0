"""Labels: the names of a classifier's classes, from a file, from a list, or as a library knows them of its weights."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from unitvis.errors import UnitvisError
from unitvis.files import open_regular
from unitvis.schema import Is, Optional, problem

_MAX_BYTES = 2**24  # of a file of labels; ImageNet's names of 21,841 classes take less than one of them
_MAX_NAME = 1000  # characters of a class's name
_NAME = Is(f"text of 1 to {_MAX_NAME:,} characters", lambda v: isinstance(v, str) and 0 < len(v) <= _MAX_NAME)
_ORIGIN = Is("text of at most 300 characters", lambda v: isinstance(v, str) and len(v) <= 300)  # a file's name fits
SCHEMA = {"names": [_NAME], "codes?": Optional([_NAME]), "from": _ORIGIN}
_FORMS = 'one name a line, or JSON: ["cat", "dog"], {"0": "cat"}, {"cat": 0} or {"0": ["n02123045", "cat"]}'


class Labels(NamedTuple):
    """The names of a classifier's classes, in the order of its units."""

    names: tuple[str, ...]
    origin: str  # where they come from, in words
    codes: tuple[str, ...] | None = None  # by which data sets name the classes' folders, such as n02123045, if known

    def to_json(self) -> dict[str, Any]:
        """The labels in plain texts and lists; `from_json` makes them again."""
        codes = {} if self.codes is None else {"codes": list(self.codes)}
        return {"names": list(self.names), **codes, "from": self.origin}

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The labels that `to_json` gave; ValueError, with what is wrong, for anything else."""
        if wrong := problem(value, SCHEMA):
            raise ValueError(wrong)
        names, codes = value["names"], value.get("codes")
        if not names:
            raise ValueError("names is empty")
        if codes is not None and len(codes) != len(names):
            raise ValueError(f"it has {len(names)} names and {len(codes)} codes")
        return cls(tuple(names), value["from"], None if codes is None else tuple(codes))


def labels_from(given: Labels | Sequence[str] | str | Path) -> Labels:
    """Labels that a user gives: the path of a file (see `read_labels`), or the names in the order of the units."""
    if isinstance(given, Labels):
        return given
    if isinstance(given, str | Path):
        return read_labels(Path(given))
    return _checked("labels", list(given), None, "a list of names")


def read_labels(path: Path) -> Labels:
    """Read a text file in UTF-8 with one class name a line, or a list or an object of names as JSON or as Python.

    An object maps numbers from 0 to names or to [code, name], as ImageNet's class index does, or names to numbers.
    UnitvisError for anything else.
    """
    try:
        with open_regular(path) as file:
            data = file.read(_MAX_BYTES + 1) or b""
    except OSError as error:
        raise UnitvisError(f"the labels {path} cannot be read: {error.strerror}; write {_FORMS}") from error
    if len(data) > _MAX_BYTES:
        raise UnitvisError(f"the labels {path} have more than {_MAX_BYTES:,} bytes; write {_FORMS}")
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UnitvisError(f"the labels {path} are no text in UTF-8 ({error.reason}); write {_FORMS}") from error
    entries: list[Any] = [line.strip() for line in text.split("\n")]
    if text[:1] in ("[", "{"):
        entries = _listed(path, _parsed(path, text))
    elif "" in entries:
        raise UnitvisError(f"line {entries.index('') + 1} of the labels {path} is empty; write {_FORMS}")
    codes = None
    if all(isinstance(entry, list | tuple) and len(entry) == 2 for entry in entries):
        codes, entries = [entry[0] for entry in entries], [entry[1] for entry in entries]
    return _checked(f"the labels {path}", entries, codes, f"the file {path.name}")


def _checked(what: str, names: list[Any], codes: list[Any] | None, origin: str) -> Labels:
    """Labels of these names; UnitvisError, starting with `what`, where one is no text."""
    try:
        return Labels.from_json({"names": names, "codes": codes, "from": origin})
    except ValueError as error:
        raise UnitvisError(f"{what} are no names of classes ({error}); write {_FORMS}") from error


def _parsed(path: Path, text: str) -> Any:
    """The value that JSON or a Python literal stands for: ImageNet's names are often passed on as a Python dict."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UnitvisError(f"the labels {path} begin as JSON and are none ({error}); write {_FORMS}") from None


def _listed(path: Path, value: Any) -> list[Any]:
    """The entries of a list, or those of an object in the order of their numbers, which must be 0, 1, 2 and so on."""
    if not isinstance(value, dict):
        return list(value) if isinstance(value, list | tuple) else [value]
    entries = [(key, entry) for key, entry in value.items()]
    if all(type(number) is int for number in value.values()):  # {"cat": 0}
        entries = [(number, name) for name, number in value.items()]
    numbered = {int(key): entry for key, entry in entries if str(key).isdecimal()}
    missing = [number for number in range(len(value)) if number not in numbered]
    if missing or not value:
        raise UnitvisError(
            f"the labels {path} name no class {missing[0] if missing else 0}: the numbers of {len(value)} classes are "
            f"0 to {len(value) - 1}; write {_FORMS}"
        )
    return [numbered[number] for number in range(len(value))]
