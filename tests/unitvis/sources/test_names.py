"""Names of images as bytes, packed into arrays."""

from __future__ import annotations

from unitvis.sources.names import Names


def test_names_survive_arrays():
    names = Names([b"", b"a", b"\xff\n", b"x" * 300])
    again = Names.from_arrays(names.arrays())
    assert [again[i] for i in range(len(again))] == [b"", b"a", b"\xff\n", b"x" * 300]
    assert again.hash() == names.hash() != Names([b"", b"a"]).hash()
