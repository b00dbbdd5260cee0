"""Shards: I/N of the images."""

from __future__ import annotations

import pytest
import torch

import unitvis
from support.scans import two_convolutions
from unitvis import UnitvisError
from unitvis.state.shards import parse_shard


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "a/b", (1,), (2, 1), (1.0, 2), 3, "1/0", "-1/4"])
def test_what_is_no_shard(shard: object) -> None:
    with pytest.raises(UnitvisError, match="is none; write I/N, from 1/N to N/N"):
        parse_shard(shard)


def test_shards_split_what_there_is() -> None:
    for length, count in ((53, 7), (7, 7), (100, 1)):
        ids = [id for number in range(count) for id in parse_shard((number + 1, count)).ids(length, "folder")]
        assert ids == list(range(length))
    images = torch.zeros(53, 3, 12, 12)
    with pytest.raises(UnitvisError, match="53 images cannot be split into 54 shards"):
        unitvis.scan(two_convolutions(), images, shard="1/54", progress=False)
    with pytest.raises(UnitvisError, match="a stream has no shards"):
        unitvis.scan(two_convolutions(), iter([images]), shard="1/2", progress=False)
