"""Single values of a run folder's JSON files, changed or deleted."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DELETED = object()  # in place of a new value


def without_hashes(run: Path) -> Path:
    """Make a run one of an older version, or of somebody who changed the hashes as well."""
    manifest = read(run / "manifest.json")
    del manifest["files"]
    write(run / "manifest.json", manifest)
    return run


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to everything inside a JSON value."""
    if place:
        yield place
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*place, key))


def changed(value: Any, place: tuple[Any, ...], new: object) -> Any:
    value = at = copy.deepcopy(value)
    for key in place[:-1]:
        at = at[key]
    if new is DELETED:
        del at[place[-1]]
    else:
        at[place[-1]] = new
    return value


def read(path: Path) -> Any:
    text = path.read_text()
    return [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)


def write(path: Path, value: Any) -> None:
    lines = value if path.suffix == ".jsonl" else [value]
    path.write_text("\n".join(map(json.dumps, lines)))
