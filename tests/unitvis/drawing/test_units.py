"""Which units are drawn: what is typed, and what a run has."""

from __future__ import annotations

import pytest

from support.galleries import ODD
from unitvis import UnitvisError
from unitvis.drawing.units import parse_choice, parse_units, units_by_layer


def test_units_are_read_from_text() -> None:
    assert parse_units("0-3,7, 9") == [0, 1, 2, 3, 7, 9]
    for text in ("", "a", "1-", "-3", "1,,2", "²"):
        with pytest.raises(UnitvisError, match="cannot be read; write numbers and ranges"):
            parse_units(text)
    with pytest.raises(UnitvisError, match="have numbers of more than 100 digits, as no unit has"):
        parse_units("9" * 5000)
    with pytest.raises(UnitvisError, match="layer 'a' has no unit 99999999999999999999; it has 4, from 0"):
        units_by_layer({"a": 4}, parse_units("9" * 20))
    with pytest.raises(UnitvisError, match="more than the 100,000 that a sheet can hold"):
        parse_units("0-999999999999")


def test_units_are_chosen_for_all_layers_or_by_layer() -> None:
    assert parse_choice([]) is None
    assert parse_choice(["0-2,7"]) == [0, 1, 2, 7]
    assert parse_choice(["conv1/3", f"{ODD}/0-1", "conv1/5"]) == {"conv1": [3, 5], ODD: [0, 1]}  # a name with a slash
    for texts, message in (
        (["0-2", "conv1/3"], "--units 0-2 names no layer and is not alone; write LAYER/0-2"),
        (["conv1/"], "units '' cannot be read"),
    ):
        with pytest.raises(UnitvisError, match=message):
            parse_choice(texts)
    both, one = {"first": 12, ODD: 6}, {"first": 12}
    assert units_by_layer(both, [5, 0]) == {"first": [5, 0], ODD: [5, 0]}
    assert units_by_layer(both, {"first": [11]}) == {"first": [11]}
    assert units_by_layer(one, None) == {}
    for sizes, units, message in (
        (both, [0, 6], "has no unit 6; it has 6"),
        (one, {ODD: [1]}, "which is not drawn here; drawn are first"),
        (one, {"first": []}, "no unit was named"),
    ):
        with pytest.raises(UnitvisError, match=message):
            units_by_layer(sizes, units)
