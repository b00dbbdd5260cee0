"""Names of images as bytes, packed into arrays."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unitvis.sources import Source, open_source
from unitvis.sources.names import Names
from unitvis.sources.transform import Transform


def test_names_survive_arrays():
    names = Names([b"", b"a", b"\xff\n", b"x" * 300])
    again = Names.from_arrays(names.arrays())
    assert [again[i] for i in range(len(again))] == [b"", b"a", b"\xff\n", b"x" * 300]
    assert again.hash() == names.hash() != Names([b"", b"a"]).hash()


@pytest.mark.parametrize("change", [0, -1, 7])
def test_starts_that_are_not_those_of_the_names_are_refused(change):
    arrays = Names([b"a", b"bc"]).arrays()
    for starts in (arrays["starts"] + change * (arrays["starts"] == 2), arrays["starts"][:-1], arrays["starts"][None]):
        if np.array_equal(starts, arrays["starts"]):
            continue
        with pytest.raises(ValueError, match="names do not start"):
            Names.from_arrays({**arrays, "starts": starts})
    with pytest.raises(ValueError, match="names do not start"):
        Names.from_arrays({**arrays, "names": np.frombuffer(b"a\0\0c\0", np.uint8)})


def described(source: Source) -> tuple[dict[str, object], list[str]]:
    return source.describe(), [source.name(id) for id in range(source.length or 0)]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_damaged_listing_is_made_again(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever one of its arrays is replaced by: a listing of a cache is never a reason to fail."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in ("files", "tar"):
        monkeypatch.setattr(f"unitvis.sources.{module}.MIN_SAVED_NAMES", 1)
        monkeypatch.setattr(f"unitvis.sources.{module}.SETTLE_NS", -1)
    images = tmp_path / "images"
    (images / "a").mkdir(parents=True)
    for name in ("0.png", "a/1.png", "2.txt"):
        Image.new("RGB", (4, 4)).save(images / name, "PNG")
    if kind == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            archive.add(images, "images")
        images = tmp_path / "x.tar"
    wanted = described(open_source(images, Transform()))
    (listing,) = (tmp_path / "cache" / "unitvis").iterdir()
    arrays = dict(np.load(listing))
    text = [b"[]", b"{}", b'{"others": {"x": "y"}, "shared_keys": 0, "shared": []}', b"["]
    for name, array in arrays.items():
        others = [None, array[:1], array[:0], array[None], array.astype("U9"), np.float64(0)]
        others += [] if name == "rewritten" else [np.array(["\0"])]
        others += [array - 7, array[::-1]] if array.dtype == np.int64 else []
        others += [np.frombuffer(one, np.uint8) for one in text]
        for other in others:
            changed = {key: one for key, one in arrays.items() if key != name}
            np.savez(listing, **changed if other is None else changed | {name: other})
            assert described(open_source(images, Transform())) == wanted, (name, other)
    listing.unlink()
    os.mkfifo(listing, 0o600)
    assert described(open_source(images, Transform())) == wanted
