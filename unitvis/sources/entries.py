"""The image among the entries of an item or a batch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from unitvis.decoding.decode import decode
from unitvis.errors import ImageError, UnitvisError, abridged, error_text
from unitvis.sources.arrays import is_pixels

# Names that datasets give to their images; one of them decides where several entries of a dict may be the image.
_USUAL_NAMES = frozenset("image images img imgs pixel_values picture photo input inputs x jpg jpeg png webp".split())  # noqa: SIM905


class ImageEntry:
    """Picks the image of an item (ndim 3) or the images of a batch (ndim 4).

    given: the key or number of the entry; None: found by looking. The first item decides which key of a dict it is, and
    the others must have it, too.
    """

    def __init__(self, given: str | int | None, ndim: int) -> None:
        self._given, self._ndim = given, ndim
        self._key: Any = None  # of dicts, once it is known

    def __call__(self, item: Any) -> Any:
        """Return the image of an item; ImageError if it has none, UnitvisError if there are several to choose from."""
        if self._given is not None:
            return _decoded(self._named(item))
        if _is_image(item, self._ndim):
            return _decoded(item)
        if isinstance(item, Mapping):
            if self._key is None:
                self._key = self._found_key(item)
            if self._key not in item:
                raise ImageError(f"an item has no entry {self._key!r}, which is the image in the first one")
            return _decoded(item[self._key])
        if isinstance(item, tuple | list):
            if not item:
                raise UnitvisError("an item is empty; an image, or a tuple or dict with one, is needed")
            return _decoded(next((one for one in item if _is_image(one, self._ndim)), item[0]))
        return item

    def _named(self, item: Any) -> Any:
        """Return the entry that was given."""
        if not isinstance(item, Mapping | tuple | list):
            raise UnitvisError(f"entry={self._given!r} was given, and an item is {type(item).__name__} without entries")
        try:
            return item[self._given]  # type: ignore[index]
        except (LookupError, TypeError):
            known = list(item) if isinstance(item, Mapping) else list(range(len(item)))
            raise UnitvisError(f"an item has no entry {self._given!r}; it has {_listed(known)}") from None

    def _found_key(self, item: Mapping[Any, Any]) -> Any:
        """Find the key of the image: the only entry that is one, or the only one of these with a usual name."""
        images = [key for key, value in item.items() if _is_image(value, self._ndim)]
        # Of no images an array is taken, so that it is refused with its dtype and shape.
        keys = images or [key for key, value in item.items() if getattr(value, "ndim", None) == self._ndim]
        for chosen in (keys, [key for key in keys if str(key).lower() in _USUAL_NAMES]):
            if len(chosen) == 1:
                return chosen[0]
        if images:
            raise UnitvisError(
                f"several entries of an item may be the image ({_listed(images)}); name one: entry={images[0]!r}"
            )
        types = [f"{key!r} ({type(value).__name__})" for key, value in item.items()]
        raise ImageError(f"an item has no image; its entries are {abridged(types) or 'none'}")


def is_batch(item: Any) -> bool:
    """True for a batch of images, or a tuple or dict with one, in contrast to a single item."""
    entries = item.values() if isinstance(item, Mapping) else item if isinstance(item, tuple | list) else [item]
    return any(getattr(one, "ndim", 0) == 4 for one in entries)


def _is_image(value: Any, ndim: int) -> bool:
    """True for a picture, or an image file as `datasets.Image(decode=False)` gives it, or an array of pixels."""
    if ndim == 3 and (isinstance(value, Image.Image) or _is_file(value)):
        return True
    return isinstance(value, Tensor | np.ndarray) and is_pixels(value, ndim)


def _is_file(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"}


def _decoded(image: Any) -> Any:
    """Load a picture, whose pixels may still be in a file, or decode an image file; ImageError if that fails."""
    try:
        if isinstance(image, Image.Image):
            image.load()
        elif _is_file(image):
            return decode(Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"])
    except ImageError:
        raise
    except Exception as error:  # Pillow may raise anything for a broken file
        raise ImageError(error_text(error)) from error
    return image


def _listed(keys: list[Any]) -> str:
    return abridged([repr(key) for key in keys])
