"""Classes: those of a unit's winners, whose images lie in class folders, and the names of a head's units."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from unitvis.models.labels import Labels
from unitvis.results.arrays import LayerArrays
from unitvis.results.data import RunData
from unitvis.results.folder import write_labels

FOLDERS = "the folders of the images, sorted"  # the origin of names that nobody gave


def winner_classes(run: RunData, top: LayerArrays, units: Sequence[int]) -> list[dict[str, int]]:
    """For each of the units, how many of its winners that fired lie in each class folder.

    Most first; of equal counts the one with the stronger winner. A folder that is named by a code of the run's labels
    (n02123045) is shown by the name of that class.
    """
    shown, found = _names_by_code(run), []
    for unit in units:
        counts = Counter[str]()
        for folder, count in _folders_of_winners(run, top, unit).items():
            counts[shown.get(folder, folder)] += count
        found.append(dict(counts.most_common()))
    return found


def _folders_of_winners(run: RunData, top: LayerArrays, unit: int) -> Counter[str]:
    folders, ids = run.class_folders, top.images[unit][top.fired[unit]].tolist()
    return Counter(folders[id] for id in ids if id in folders)


def _names_by_code(run: RunData) -> dict[str, str]:
    """The names of classes by their codes, with the code where several have one name (the two cranes of ImageNet)."""
    if run.labels is None or run.labels.codes is None:
        return {}
    number, named = Counter(run.labels.names), zip(run.labels.codes, run.labels.names, strict=True)
    return {code: f"{name} ({code})" if number[name] > 1 else name for code, name in named}


def classes_text(classes: Mapping[str, int]) -> str:
    """Counts by class as text: "dog 6, cat 3", with semicolons where a name has a comma."""
    return ("; " if any("," in name for name in classes) else ", ").join(f"{n} {count}" for n, count in classes.items())


def unit_names(run: RunData, layer: str) -> tuple[list[str], str] | None:
    """The names of the classes of a head's units, one a unit, and where they come from; None for other layers.

    Those of the run's labels, if they are as many as the units. Else the class folders in sorted order (as
    torchvision's ImageFolder counts them), if they are as many and the winners agree: for more than half of the units,
    no folder has more of them than the one of the unit's number.
    """
    top = run[layer]
    if not _is_head(run, layer):
        return None
    if run.labels is not None and len(run.labels.names) == len(top):
        return list(run.labels.names), run.labels.origin
    folders = sorted(set(run.class_folders.values()))
    if len(folders) != len(top) or 2 * sum(_in_own_folder(run, top, folders)) <= len(top):
        return None
    shown = _names_by_code(run)
    return [shown.get(folder, folder) for folder in folders], FOLDERS


def _in_own_folder(run: RunData, top: LayerArrays, folders: list[str]) -> Iterator[bool]:
    """For each unit, whether no folder has more of its winners than the one of its number."""
    for unit, own in enumerate(folders):
        counts = _folders_of_winners(run, top, unit)
        yield counts[own] > 0 and counts[own] == max(counts.values())


def name_classes(run: RunData, labels: Labels | Sequence[str] | str | Path) -> None:
    """Name the classes of a run that was read from a folder, which keeps the names; warns where they name nothing."""
    run.set_labels(labels)
    if run.labels is not None and run.folder is not None:
        write_labels(run.labels, run.folder)
    if run.tops:
        warn_of_idle_labels(run)


def warn_of_idle_labels(run: RunData) -> None:
    """Warn, with the reason, where a run's labels name neither the units of a layer nor class folders."""
    labels = run.labels
    if labels is None or any(found[1] == labels.origin for layer in run if (found := unit_names(run, layer))):
        return
    if not _names_by_code(run).keys().isdisjoint(run.class_folders.values()):
        return
    heads = [f"layer {layer!r}, the network's last, has {len(run[layer]):,}" for layer in run if _is_head(run, layer)]
    why = heads[0] if heads else "the network's last layer is not ranked; name it (--layer), see `unitvis layers`"
    warnings.warn(f"the labels ({len(labels.names):,} classes, {labels.origin}) name no unit: {why}")


def _is_head(run: RunData, layer: str) -> bool:
    return run[layer].info.get("head", False)
