"""Which files are images by their names, and what the other names were."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, takewhile

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import UnitvisError
from unitvis.schema import COUNT, TEXT, ByName, problem

# Endings of images, the same wherever unitvis runs: ids depend on what is listed, so a file that the installed Pillow
# cannot decode is listed all the same, and fails.
_IMAGE = re.compile(rb"\.(jpe?g|jpe|jfif|png|webp|avif|bmp|gif|tiff?|p[bgpn]m)$", re.IGNORECASE)
_DIGITS = b"0123456789"
_LAST_ENDING = re.compile(rb"\.[A-Za-z0-9]{1,10}$")  # any longer one is no type of file but part of the name
# An ending as text: of the surrogates those that `os.fsdecode` makes of bytes.
_ENDING = re.compile(r"\.[^/\0\ud800-\udc7f\udd00-\udfff]+")
_ENDINGS_SHOWN = 8  # of other files, the most frequent ones


class ImageNames:
    """Picks the names of images while a source lists its files, and counts the names of the other files.

    endings: those of images, each all that follows the key (".jpg", ".seg.png", "" for none), in any case; None: the
    fixed table. others: number of other files by the last ending of their names, "none" without one.
    """

    def __init__(self, endings: Sequence[str] | None) -> None:
        self._endings = None if endings is None else {os.fsencode(ending) for ending in endings}
        self.others: Counter[str] = Counter()
        self._shared_keys = 0
        self._shared: list[str] = []  # names of the first images that share a key
        self._last_key = b""
        self._last_names: dict[bytes, None] = {}  # of the images with this key, in order; they follow one another

    def take(self, name: bytes, *, hidden: bool = False) -> bool:
        """True for the name of an image; any other name, and a hidden one, is counted."""
        endings = _whole_ending(name)
        if hidden or not (_IMAGE.search(name) if self._endings is None else endings.lower() in self._endings):
            last = _LAST_ENDING.search(name)
            self.others["hidden" if hidden else last[0].decode().lower() if last else "none"] += 1
            return False
        key = name.removesuffix(endings)
        if key != self._last_key:
            self._last_key, self._last_names = key, {name: None}
        elif name not in self._last_names:
            self._last_names[name] = None
            self._shared_keys += len(self._last_names) == 2
            if self._shared_keys == 1:
                self._shared = [one.decode("utf-8", "surrogateescape") for one in islice(self._last_names, 3)]
        return True

    @property
    def warning(self) -> str | None:
        """A sentence if several images share a key, as a photograph and its segmentation do; None otherwise."""
        if not self._shared_keys:
            return None
        names = ", ".join(map(repr, self._shared))
        return (
            f"of {self._shared_keys:,} samples several files are images ({names}), and all of them are ranked; choose "
            "with images_ending='.jpg' (--images-ending .jpg)"
        )

    def array(self) -> NDArray[np.uint8]:
        """What was counted, to save it with a listing; see `restored`."""
        counted = {"others": self.others, "shared_keys": self._shared_keys, "shared": self._shared}
        return np.frombuffer(json.dumps(counted).encode(), np.uint8)

    @classmethod
    def restored(cls, array: NDArray[np.generic]) -> ImageNames:
        """Make the counts again that `array` gave; ValueError for other arrays."""
        names, counted = cls(None), json.loads(array.tobytes())
        if wrong := problem(counted, {"others": ByName(COUNT), "shared_keys": COUNT, "shared": [TEXT]}):
            raise ValueError(wrong)
        names.others = Counter(counted["others"])
        names._shared_keys, names._shared = counted["shared_keys"], counted["shared"]
        return names


def _whole_ending(name: bytes) -> bytes:
    """All endings of a name, numbers apart: ".seg.png" of 0001.seg.png, ".png" of frame.0001.png; empty without any.

    What comes before is the key, which the files of one WebDataset sample share.
    """
    _, *parts = name.rpartition(b"/")[2].split(b".")
    endings = list(takewhile(lambda part: part.strip(_DIGITS), reversed(parts)))
    return b"".join(b"." + part for part in reversed(endings))


def is_image_name(name: bytes) -> bool:
    """True if a file of this name in a folder counts as an image."""
    return bool(_IMAGE.search(name))


def checked_endings(given: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Endings in lower case, sorted; None if none were given. UnitvisError unless each is "" or begins with a dot."""
    if given is None:
        return None
    endings = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not endings or not all(isinstance(one, str) and (not one or _ENDING.fullmatch(one)) for one in endings):
        raise UnitvisError(
            f"images_ending={given!r}; an ending is all that follows the first dot, such as '.jpg' or '.seg.png', or "
            "'' for names without one"
        )
    return tuple(sorted({ending.lower() for ending in endings}))


def others_in_words(others: Mapping[str, int]) -> str:
    """Numbers of other files in words, most frequent endings first, as in "6 other files (.heic 4, none 2)"."""
    total = sum(others.values())
    frequent = sorted(others.items(), key=lambda one: (-one[1], one[0]))[:_ENDINGS_SHOWN]
    shown = [f"{ending} {count:,}" for ending, count in frequent]
    if rest := total - sum(count for _, count in frequent):
        shown.append(f"others {rest:,}")
    return f"{total:,} other file{'s' * (total != 1)}" + (f" ({', '.join(shown)})" if shown else "")
