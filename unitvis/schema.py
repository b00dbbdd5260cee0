"""Schemas: what JSON from a file must look like, so that no other code meets a value that it does not expect.

A schema is a predicate with words (`Is`), a dict of schemas by key (of a key that ends in "?" the value may be absent),
`ByName` (any keys), a list of one schema (any number of such items), a tuple of schemas (as many items, one each), or
`Optional`. Keys that a schema does not name are left alone: a newer version may have written them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

Schema = Any  # Is | dict[str, Schema] | ByName | list[Schema] | tuple[Schema, ...] | Optional


class Is(NamedTuple):
    """A predicate on a value, and what it says in words."""

    words: str
    holds: Callable[[Any], bool]


class ByName(NamedTuple):
    """An object whose values, under any names, fit a schema."""

    schema: Schema


class Optional(NamedTuple):
    """A schema, or null."""

    schema: Schema


def whole(least: int, most: int) -> Is:
    """A whole number in a range."""
    return Is(f"a whole number from {least} to {most}", lambda v: type(v) is int and least <= v <= most)


def choice(*values: str) -> Is:
    """One of some strings."""
    return Is(f"one of {', '.join(values)}", lambda v: isinstance(v, str) and v in values)


def either(*schemas: Schema) -> Is:
    """One of some schemas."""
    words = " or ".join(schema.words if isinstance(schema, Is) else f"a {type(schema).__name__}" for schema in schemas)
    return Is(words, lambda v: any(problem(v, schema) is None for schema in schemas))


# Characters that stand for bytes of a path that are not UTF-8, or for nothing: neither UTF-8 nor a page can hold them.
_SURROGATE = re.compile(r"[\ud800-\udfff]")
MAX_ID = 2**63 - 2  # of an image: one more is the end of a range, and an int64
ID = whole(0, MAX_ID)
COUNT = whole(0, 2**63 - 1)
MAX_K, MAX_BATCH_SIZE = 10**9, 2**40
BATCH_SIZE = whole(1, MAX_BATCH_SIZE)
NUMBER = Is("a finite number", lambda v: type(v) in (int, float) and abs(v) <= sys.float_info.max)
SECONDS = Is("a number of seconds", lambda v: type(v) in (int, float) and abs(v) <= 1e12)
TEXT = Is("text", lambda v: isinstance(v, str))  # with lone surrogates where it is a path
UNICODE = Is("text without lone surrogates", lambda v: isinstance(v, str) and not _SURROGATE.search(v))
FLAG = Is("true or false", lambda v: isinstance(v, bool))
OBJECT = Is("an object", lambda v: isinstance(v, dict))


def problem(value: Any, schema: Schema, place: str = "") -> str | None:
    """What does not fit, as in `layers.0.units is 'x', not a whole number from 0`; None if all does."""
    if isinstance(schema, Is):
        return None if schema.holds(value) else f"{place or 'it'} is {_shown(value)}, not {schema.words}"
    if isinstance(schema, Optional):
        return None if value is None else problem(value, schema.schema, place)
    if isinstance(schema, ByName):
        if not isinstance(value, dict):
            return f"{place or 'it'} is {_shown(value)}, not an object"
        if wrong := next((name for name in value if not UNICODE.holds(name)), None):
            return f"{place or 'it'} has the name {_shown(wrong)}, which is not {UNICODE.words}"
        named = (problem(one, schema.schema, f"{place}.{name}") for name, one in value.items())
        return next((found for found in named if found), None)
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"{place or 'it'} is {_shown(value)}, not an object"
        for key, inner in schema.items():
            name = key.removesuffix("?")
            inside = f"{place}.{name}" if place else name
            if name in value:
                found = problem(value[name], inner, inside)
            else:
                found = None if key.endswith("?") else f"{inside} is missing"
            if found:
                return found
        return None
    if not isinstance(value, list) or (isinstance(schema, tuple) and len(value) != len(schema)):
        return f"{place or 'it'} is {_shown(value)}, not a list" + (f" of {len(schema)}" * isinstance(schema, tuple))
    each = schema if isinstance(schema, tuple) else schema * len(value)
    problems = (problem(one, inner, f"{place}[{i}]") for i, (one, inner) in enumerate(zip(value, each, strict=True)))
    return next((found for found in problems if found), None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
