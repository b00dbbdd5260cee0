"""Which units are drawn: parsing a choice of units, and checking it against the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unitvis.errors import UnitvisError, abridged, check_unit

Units = Sequence[int] | Mapping[str, Sequence[int]] | None  # of every layer, or {layer: units}; None: by default
MAX_LISTED_UNITS = 100_000  # in one range of `parse_units`
_MAX_DIGITS = 100  # of a number in `parse_units`


def checked_units(layer: str, number: int, units: Sequence[int] | None) -> list[int]:
    """The given units of a layer that has so many, or all for None; UnitvisError for none at all or one it has not."""
    chosen = list(range(number) if units is None else map(int, units))
    for unit in chosen:
        check_unit(layer, unit, number)
    if not chosen:
        raise UnitvisError("no unit was named; name one (units=, --units)")
    return chosen


def units_by_layer(sizes: Mapping[str, int], units: Units) -> dict[str, list[int]]:
    """The chosen units of those layers for which some are chosen; raises UnitvisError as `checked_units` does.

    sizes: {layer: number of its units} of the layers that are drawn; units of another layer are refused.
    """
    if units is None:
        return {}
    if not isinstance(units, Mapping):
        return {layer: checked_units(layer, number, units) for layer, number in sizes.items()}
    if others := [layer for layer in units if layer not in sizes]:
        drawn = abridged(list(sizes))
        raise UnitvisError(f"units are chosen of layer {others[0]!r}, which is not drawn here; drawn are {drawn}")
    return {layer: checked_units(layer, number, units[layer]) for layer, number in sizes.items() if layer in units}


def parse_choice(texts: Sequence[str]) -> Units:
    """Parse what `--units` was given: "0-8,12" for every layer, or "LAYER/0-8,12" any number of times; empty: None."""
    named: dict[str, list[int]] = {}
    for text in texts:
        layer, slash, numbers = text.rpartition("/")
        if not slash and len(texts) > 1:
            raise UnitvisError(f"--units {text} names no layer and is not alone; write LAYER/{text}, or give it once")
        if not slash:
            return parse_units(text)
        named.setdefault(layer, []).extend(parse_units(numbers))
    return named or None


def parse_units(text: str) -> list[int]:
    """Parse numbers and inclusive ranges: "0-8,12" is 0 to 8 and 12; raises UnitvisError for anything else."""
    units: list[int] = []
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UnitvisError(f"units {text!r} cannot be read; write numbers and ranges, such as 0-8,12")
        if max(len(first), len(last)) > _MAX_DIGITS:
            raise UnitvisError(f"units {text[:40]!r}... have numbers of more than {_MAX_DIGITS} digits, as no unit has")
        end = int(last if dash else first) + 1
        if end - int(first) > MAX_LISTED_UNITS:
            raise UnitvisError(f"units {text!r} are more than the {MAX_LISTED_UNITS:,} that a sheet can hold")
        units.extend(range(int(first), end))
    return units
