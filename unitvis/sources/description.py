"""What a source says of itself in the manifest of a run and in the JSON file of a pack: one schema checks both."""

from __future__ import annotations

from unitvis.decoding.options import SCHEMA as DECODING
from unitvis.errors import UnitvisError, whole_number
from unitvis.schema import COUNT, FLAG, NUMBER, TEXT, ByName, Is, Optional, Schema, either, whole

_FIRST_ENTRY = -(2**31)  # numbers of an item's entries may count from its end: -1 is the last one
_ENTRY = whole(_FIRST_ENTRY, 2**63 - 1)
SOURCE: dict[str, Schema] = {
    "kind": TEXT,
    "path?": Optional(either(TEXT, [TEXT])),
    "images?": Optional(COUNT),
    "names?": TEXT,
    "others?": COUNT,
    "other_endings?": ByName(COUNT),
    "images_ending?": [TEXT],
    "pillow?": ByName(Optional(either(NUMBER, FLAG))),
    "entry?": Is("text or the number of an entry", lambda v: TEXT.holds(v) or _ENTRY.holds(v)),
    "decoding?": DECODING,
}


def checked_entry(entry: object) -> str | int | None:
    """The key or number of an entry as JSON has it; UnitvisError for what no manifest can hold."""
    if entry is None:
        return None
    if isinstance(entry, str):
        return str.__str__(entry)
    try:
        return whole_number("entry", entry, _FIRST_ENTRY)
    except UnitvisError:
        raise UnitvisError(f"entry={entry!r}; the key of an entry (text) or its number is needed") from None
