"""Image sources: `open_source` opens whatever a user gives as images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unitvis.decoding.options import Decoding
from unitvis.errors import UnitvisError, abridged, whole_number
from unitvis.sources.arrays import ArraySource, mapped_array
from unitvis.sources.base import Batch, Failure, Source
from unitvis.sources.description import checked_entry
from unitvis.sources.encoded import EncodedSource
from unitvis.sources.entries import is_batch
from unitvis.sources.files import FileSource, folder_source, list_source, paths_source
from unitvis.sources.image_names import checked_endings, is_image_name
from unitvis.sources.packed import PackSource, pack_source
from unitvis.sources.streams import DatasetSource, LoaderSource, StreamSource, loader_source
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
    "open_as_described",
    "open_source",
    "reopen_source",
]

_ACCEPTED = (  # the end of an error message
    "a folder, a .txt list of paths, .tar archives, a .npy array, a tensor or array (uint8 [N, H, W, 3] or normalised "
    "float [N, C, H, W]), a Dataset, a DataLoader or an iterable of batches"
)


_NAMED_BY_ENDING = ("folder", "tar")  # kinds of sources whose files are chosen by the endings of their names


def open_source(
    images: Any,
    transform: Transform | None = None,
    *,
    on_error: str = "skip",
    max_failures: int | None = None,
    decoder: str = "pillow",
    scaled: bool = False,
    allow_truncated: bool = False,
    images_ending: str | Sequence[str] | None = None,
    entry: str | int | None = None,
) -> Source:
    """Open images as a Source; only their names are read now.

    Args:
        images: a folder (searched recursively, sorted), a .txt list (one path a line, relative to the list), .tar
            archives (one path, with braces as in train-{000..146}.tar, or a list), a .npy file or pack, a list of
            paths, a tensor or array (uint8 [N, H, W, 3], or float [N, C, H, W] already normalised), a map-style dataset
            or sequence of images (a `datasets.Dataset` or one of its columns, too), a DataLoader that does not shuffle,
            or an iterable of batches or of PIL images. Of a tuple, the first entry that is an image counts; of a dict,
            the only one, or the only one with a usual name (image, pixel_values, ...).
        transform: turns pixels into the model's input; required for image files, PIL images and uint8.
        on_error: "skip" lists an image that cannot be used in `failures`, "raise" raises UnitvisError.
        max_failures: number of images that may fail; one more raises UnitvisError. None: any number.
        decoder, scaled, allow_truncated: how files are decoded, see `Decoding`.
        images_ending: which files of a folder or of archives are images, in place of a fixed table: one or more
            endings, each all that follows the name's first dot (".jpg", ".seg.png", "" for none), numbers apart; in any
            case.
        entry: key or number of the image in the items or batches of a dataset, DataLoader or iterable; -1 is the last.

    Raises UnitvisError if `images` cannot be opened.
    """
    endings, entry = checked_endings(images_ending), checked_entry(entry)
    source = _open_any(images, transform, on_error, Decoding(decoder, scaled, allow_truncated), endings, entry)
    if endings is not None and not (isinstance(source, EncodedSource) and source.kind in _NAMED_BY_ENDING):
        raise UnitvisError(
            f"images_ending={images_ending!r} chooses files of folders and archives, not of a {source.kind}"
        )
    if entry is not None and not isinstance(source, DatasetSource | StreamSource):
        raise UnitvisError(f"entry={entry!r} names the image in items of a dataset or batches, not in a {source.kind}")
    if max_failures is not None:
        source.max_failures = whole_number("max_failures", max_failures, 0)
    return source


def _open_any(
    images: Any,
    transform: Transform | None,
    on_error: str,
    decoding: Decoding,
    endings: Sequence[str] | None,
    entry: str | int | None,
) -> Source:
    """Choose the source by the type of `images`."""
    if isinstance(images, Source):
        return images
    if isinstance(images, str | os.PathLike):
        return _open_path(os.fsdecode(images), transform, on_error, decoding, endings)
    if isinstance(images, np.ndarray | Tensor):
        return ArraySource(images, transform, on_error=on_error)
    if isinstance(images, DataLoader):
        return loader_source(images, transform, on_error=on_error, entry=entry)
    if isinstance(images, list | tuple) and images:
        if all(isinstance(one, str | os.PathLike) for one in images):
            return _open_paths([os.fsdecode(one) for one in images], transform, on_error, decoding, endings)
        if is_batch(images[0]):
            return StreamSource(images, transform, on_error=on_error, entry=entry)
    indexed = hasattr(images, "__getitem__") and hasattr(images, "__len__")
    if indexed and not isinstance(images, IterableDataset | Mapping | bytes | bytearray):
        return DatasetSource(images, transform, on_error=on_error, entry=entry)
    if isinstance(images, Iterable) and not isinstance(images, Mapping | bytes | bytearray | Image.Image):
        return StreamSource(images, transform, on_error=on_error, entry=entry)
    hint = f"; give {_ACCEPTED}"
    if isinstance(images, Mapping) and images:  # such as the splits of a `datasets.DatasetDict`
        hint = f"; give one of its entries: {abridged(list(map(repr, images)))}"
    elif hasattr(images, "__getitem__"):
        hint = f"; a map-style dataset needs __len__{hint}"
    raise UnitvisError(f"no images can be read from {type(images).__name__}{hint}")


def reopen_source(description: Mapping[str, Any], transform: Mapping[str, Any] | None) -> Source:
    """Open the source of a run again, from what `Source.describe` and `Transform.to_json` wrote into its manifest.

    Raises UnitvisError if the source has no path, or the images are no longer there.
    """
    if description.get("path") is None:
        raise UnitvisError(f"the images came from a {description['kind']}, which has no path; give them as images=")
    try:
        Decoding.from_json(description.get("decoding", {}))
    except UnitvisError as error:
        raise UnitvisError(f"the images of the run were read in a way that is unknown here: {error}") from error
    try:
        source = open_as_described(description["path"], description, transform)
    except UnitvisError as error:
        raise UnitvisError(f"the images of the run are not where they were: {error}; give them as images=") from error
    if source.kind != description["kind"]:  # by which it is known whether the run must have a record of each image
        raise UnitvisError(
            f"the run says that its images came from a {description['kind']}, and {description['path']!r} is a "
            f"{source.kind}; give them as images="
        )
    return source


def open_as_described(
    images: Any, description: Mapping[str, Any], transform: Mapping[str, Any] | None, **options: Any
) -> Source:
    """Open images with the options by which a scan chose and decoded them, from its manifest's source and transform.

    An option that images of this kind do not have is left out.
    """
    if "images_ending" in description and _lists_files(images):
        options["images_ending"] = description["images_ending"]
    if "entry" in description and not isinstance(images, str | os.PathLike | np.ndarray | Tensor | Source):
        options["entry"] = description["entry"]
    decoding = Decoding.from_json(description["decoding"]).to_json() if "decoding" in description else {}
    values = None if transform is None else Transform.from_json(transform)
    return open_source(images, values, **decoding, **options)


def _lists_files(images: Any) -> bool:
    """True for a folder or archives, whose images are chosen by the endings of their names."""
    paths = images if isinstance(images, list | tuple) and images else [images]
    return all(isinstance(one, str | os.PathLike) for one in paths) and all(
        os.path.isdir(one) or is_tar_name(os.fsdecode(one)) for one in paths
    )


def _open_paths(
    paths: list[str],
    transform: Transform | None,
    on_error: str,
    decoding: Decoding,
    endings: Sequence[str] | None,
) -> Source:
    """Open a list of paths: image files, or tar archives, but not both."""
    tars = [path for path in paths if is_tar_name(path)]
    if not tars:
        return paths_source(paths, transform, on_error=on_error, decoding=decoding)
    if len(tars) < len(paths):
        other = next(path for path in paths if not is_tar_name(path))
        raise UnitvisError(f"{tars[0]!r} is an archive and {other!r} is none; give archives alone, or files alone")
    return tar_source(paths, transform, on_error=on_error, decoding=decoding, endings=endings)


def _open_path(
    path: str, transform: Transform | None, on_error: str, decoding: Decoding, endings: Sequence[str] | None
) -> Source:
    """Open a folder, a .txt list, tar archives, a .npy array or a pack by its path."""
    ending = os.path.splitext(path)[1].lower()
    if is_tar_name(path) and not os.path.isdir(path):
        return tar_source(path, transform, on_error=on_error, decoding=decoding, endings=endings)
    if os.path.isdir(path):
        return folder_source(path, transform, on_error=on_error, decoding=decoding, endings=endings)
    if not os.path.exists(path):
        unfinished = os.path.exists(f"{path}.part") and ending == ".npy"
        hint = "; that pack is not finished: resume it with `unitvis pack --resume`" if unfinished else ""
        raise UnitvisError(f"there is no file or folder {path!r}{hint}")
    if ending in (".txt", ".npy") and not os.path.isfile(path):  # a pipe would be waited for
        raise UnitvisError(f"{path!r} is not a regular file; give a folder, a .txt list of paths or a .npy array")
    try:
        if ending == ".txt":
            return list_source(path, transform, on_error=on_error, decoding=decoding)
        if ending == ".npy":
            if packed := pack_source(path, transform, on_error=on_error, decoding=decoding):
                return packed
            return ArraySource(mapped_array(path), transform, on_error=on_error, path=os.path.abspath(path))
    except OSError as error:
        raise UnitvisError(f"cannot read {path!r}: {error.strerror}") from error
    if is_image_name(os.fsencode(path)):
        raise UnitvisError(f"{path!r} is one image; give the folder that holds it, or a .txt list with its path")
    raise UnitvisError(f"{path!r} is neither a folder, a .txt list of paths, a .tar archive nor a .npy array")
