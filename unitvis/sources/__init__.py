"""Image sources: `open_source` opens whatever a user gives as images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unitvis.errors import UnitvisError
from unitvis.sources.arrays import ArraySource
from unitvis.sources.base import Batch, Failure, Source
from unitvis.sources.decoding import Decoding
from unitvis.sources.files import FileSource, folder_source, is_image_name, list_source, paths_source
from unitvis.sources.packed import PackSource, pack_source
from unitvis.sources.streams import DatasetSource, LoaderSource, StreamSource, first_entry, loader_source
from unitvis.sources.tar import TarSource, is_tar_name, tar_source
from unitvis.sources.transform import Transform

__all__ = [
    "ArraySource",
    "Batch",
    "DatasetSource",
    "Failure",
    "FileSource",
    "LoaderSource",
    "PackSource",
    "Source",
    "StreamSource",
    "TarSource",
    "open_source",
    "reopen_source",
]

_ACCEPTED = (  # the end of an error message
    "a folder, a .txt list of paths, .tar archives, a .npy array, a tensor or array (uint8 [N, H, W, 3] or normalised "
    "float [N, C, H, W]), a Dataset, a DataLoader or an iterable of batches"
)


def open_source(
    images: Any,
    transform: Transform | None = None,
    *,
    on_error: str = "skip",
    max_failures: int | None = None,
    decoder: str = "pillow",
    scaled: bool = False,
    allow_truncated: bool = False,
) -> Source:
    """Open images as a Source; only their names are read now.

    Args:
        images: a folder (searched recursively, sorted), a .txt list (one path a line, relative to the list), .tar
            archives (one path, with braces as in train-{000..146}.tar, or a list), a .npy file or pack, a list of
            paths, a tensor or array (uint8 [N, H, W, 3], or float [N, C, H, W] already normalised), a map-style dataset
            or sequence of images, a DataLoader that does not shuffle, or an iterable of batches. Of an item or batch
            that is a tuple or dict, the first entry is the image.
        transform: turns pixels into the model's input; required for image files, PIL images and uint8.
        on_error: "skip" lists an image that cannot be used in `failures`, "raise" raises UnitvisError.
        max_failures: number of images that may fail; one more raises UnitvisError. None: any number.
        decoder, scaled, allow_truncated: how files are decoded, see `Decoding`.

    Raises UnitvisError if `images` cannot be opened.
    """
    source = _open_any(images, transform, on_error, Decoding(decoder, scaled, allow_truncated))
    if max_failures is not None:
        if max_failures < 0:
            raise UnitvisError(f"max_failures={max_failures}; at least 0 is needed")
        source.max_failures = max_failures
    return source


def _open_any(images: Any, transform: Transform | None, on_error: str, decoding: Decoding) -> Source:
    """Choose the source by the type of `images`."""
    if isinstance(images, Source):
        return images
    if isinstance(images, str | os.PathLike):
        return _open_path(os.fsdecode(images), transform, on_error, decoding)
    if isinstance(images, np.ndarray | Tensor):
        return ArraySource(images, transform, on_error=on_error)
    if isinstance(images, DataLoader):
        return loader_source(images, transform, on_error=on_error)
    if isinstance(images, list | tuple) and images:
        if all(isinstance(one, str | os.PathLike) for one in images):
            return _open_paths([os.fsdecode(one) for one in images], transform, on_error, decoding)
        if getattr(first_entry(images[0]), "ndim", 3) == 4:
            return StreamSource(images, transform, on_error=on_error)
    indexed = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    if indexed and not isinstance(images, IterableDataset | Mapping | bytes | bytearray):
        return DatasetSource(images, transform, on_error=on_error)
    if isinstance(images, Iterable) and not isinstance(images, Mapping | bytes | bytearray | Image.Image):
        return StreamSource(images, transform, on_error=on_error)
    hint = "; a map-style dataset needs __len__" if hasattr(images, "__getitem__") else ""
    raise UnitvisError(f"no images can be read from {type(images).__name__}{hint}; give {_ACCEPTED}")


def reopen_source(description: Mapping[str, Any], transform: Mapping[str, Any] | None) -> Source:
    """Open the source of a run again, from what `Source.describe` and `Transform.to_json` wrote into its manifest.

    Raises UnitvisError if the source has no path, or the images are no longer there.
    """
    if description.get("path") is None:
        raise UnitvisError(f"the images came from a {description['kind']}, which has no path; give them as images=")
    values = None if transform is None else Transform.from_json(transform)
    try:
        return open_source(description["path"], values, **description.get("decoding", {}))
    except UnitvisError as error:
        raise UnitvisError(f"the images of the run are not where they were: {error}; give them as images=") from error


def _open_paths(paths: list[str], transform: Transform | None, on_error: str, decoding: Decoding) -> Source:
    """Open a list of paths: image files, or tar archives, but not both."""
    tars = [path for path in paths if is_tar_name(path)]
    if not tars:
        return paths_source(paths, transform, on_error=on_error, decoding=decoding)
    if len(tars) < len(paths):
        other = next(path for path in paths if not is_tar_name(path))
        raise UnitvisError(f"{tars[0]!r} is an archive and {other!r} is none; give archives alone, or files alone")
    return tar_source(paths, transform, on_error=on_error, decoding=decoding)


def _open_path(path: str, transform: Transform | None, on_error: str, decoding: Decoding) -> Source:
    """Open a folder, a .txt list, tar archives, a .npy array or a pack by its path."""
    ending = os.path.splitext(path)[1].lower()
    if is_tar_name(path) and not os.path.isdir(path):
        return tar_source(path, transform, on_error=on_error, decoding=decoding)
    if os.path.isdir(path):
        return folder_source(path, transform, on_error=on_error, decoding=decoding)
    if not os.path.exists(path):
        unfinished = os.path.exists(f"{path}.part") and ending == ".npy"
        hint = "; that pack is not finished: resume it with `unitvis pack --resume`" if unfinished else ""
        raise UnitvisError(f"there is no file or folder {path!r}{hint}")
    try:
        if ending == ".txt":
            return list_source(path, transform, on_error=on_error, decoding=decoding)
        if ending == ".npy":
            if packed := pack_source(path, transform, on_error=on_error, decoding=decoding):
                return packed
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return ArraySource(array, transform, on_error=on_error, path=os.path.abspath(path))
    except (OSError, ValueError, EOFError) as error:
        raise UnitvisError(f"cannot read {path!r}: {' '.join(str(error).split())}") from error
    if is_image_name(path):
        raise UnitvisError(f"{path!r} is one image; give the folder that holds it, or a .txt list with its path")
    raise UnitvisError(f"{path!r} is neither a folder, a .txt list of paths, a .tar archive nor a .npy array")
