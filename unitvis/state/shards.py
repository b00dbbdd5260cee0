"""A share of the images: which ids belong to shard I of N."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

from unitvis.errors import UnitvisError, whole_number


@dataclass(frozen=True)
class Shard:
    """Shard `number` of `count`, counted from 1."""

    number: int
    count: int

    def ids(self, images: int | None, kind: str) -> range:
        """The shard's ids of so many images: a stretch of neighbours, as long as the others' or one longer."""
        if images is None:
            raise UnitvisError(f"a {kind} has no shards, because nothing tells its length; scan it whole")
        if images < self.count:
            raise UnitvisError(f"{images} images cannot be split into {self.count} shards; ask for {images} at most")
        return range((self.number - 1) * images // self.count, self.number * images // self.count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(value: object) -> Shard | None:
    """(2, 4), "2/4" or None."""
    if value is None or isinstance(value, Shard):
        return value
    numbers: list[int] = []
    if isinstance(value, str) and (found := re.fullmatch(r"(\d{1,18})/(\d{1,18})", value)):
        numbers = [int(number) for number in found.groups()]
    elif isinstance(value, tuple | list) and len(value) == 2:
        with suppress(UnitvisError):
            numbers = [whole_number("a number of a shard", one, 1) for one in value]
    if not numbers or not 1 <= numbers[0] <= numbers[1]:
        raise UnitvisError(f"shard {value!r} is none; write I/N, from 1/N to N/N")
    return Shard(*numbers)
