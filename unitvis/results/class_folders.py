"""Class folders: the classes of images that lie in one folder a class, from the images' names."""

from __future__ import annotations

from collections.abc import Mapping

from unitvis.sources.tar import is_tar_name

_MAX_NAME = 1000  # characters of a folder's name that are kept


def class_folders(names: Mapping[int, str]) -> dict[int, str]:
    """The class folder of each image, by id: the one folder that its name has below a folder common to all.

    names: of the images, as class/image, or archive.tar/class/image. Empty where an image lies in no such folder or in
    folders of a folder, and where all lie in one.
    """
    inside = {id: _folders(name) for id, name in names.items()}
    if not inside:
        return {}
    first, last = min(inside.values()), max(inside.values())  # what both begin with, all do
    common = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    if any(len(folders) != common + 1 for folders in inside.values()):
        return {}
    return {id: folders[common][:_MAX_NAME] for id, folders in inside.items()}


def _folders(name: str) -> list[str]:
    """The folders in an image's name, without archives and without those that stand for the folder itself."""
    return [part for part in name.split("/")[:-1] if part not in ("", ".") and not is_tar_name(part)]
