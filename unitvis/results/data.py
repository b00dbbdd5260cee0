"""RunData: the contents of a run, without drawing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import UnitvisError
from unitvis.models.labels import Labels, labels_from
from unitvis.results.arrays import LayerArrays, winners_of
from unitvis.results.class_folders import class_folders
from unitvis.results.sample import Sample
from unitvis.sources import Source, reopen_source
from unitvis.state.partial import Partial


class RunData:
    """The top-k of every scanned layer, the manifest, and a record of each winner's image.

    tops: by layer, in the order of the forward pass; empty for the run of a shard. records: {"id", "name", ...} by
    image id. source: the images that were scanned; None: opened from the manifest when needed. partial: the state of a
    shard's run or a merged run.
    """

    tops: Mapping[str, LayerArrays]

    def __init__(
        self,
        tops: Mapping[str, LayerArrays],
        manifest: dict[str, Any],
        records: Mapping[int, dict[str, Any]],
        source: Source | None = None,
        partial: Partial | None = None,
    ) -> None:
        self.tops = {name: self._layer(top) for name, top in tops.items()}
        self.manifest, self.records = manifest, dict(records)
        self._source = source
        self.partial = partial
        self.sample: Sample | None = None  # responses of some images, see `results.sample`
        self.folder: Path | None = None  # the folder it was last read from or written to
        self.labels: Labels | None = None  # the names of the classes that the network tells apart
        self._class_folders: tuple[Mapping[int, Any], Mapping[int, str]] | None = None  # of which records, and they

    def _layer(self, top: LayerArrays) -> LayerArrays:
        """The form in which the run holds a layer; `run.Run` has one that draws itself."""
        return top

    def __getitem__(self, layer: str) -> LayerArrays:
        self.need_winners()
        if layer not in self.tops:
            raise UnitvisError(f"the run has no layer {layer!r}; it has {', '.join(self.tops)}")
        return self.tops[layer]

    def need_winners(self) -> None:
        """Raise UnitvisError for the run of a shard, which has no winners before it is merged."""
        if not self.tops:
            raise UnitvisError("this is the run of a shard, which has no winners yet; merge it with the others")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tops)

    def __len__(self) -> int:
        return len(self.tops)

    def strongest(self, count: int) -> Self:
        """The run with the first `count` winners of every unit alone, if it keeps more; manifest["kept"] is then k."""
        k = self.manifest["k"]
        if k <= count:
            return self
        tops = {name: top.strongest(count) for name, top in self.tops.items()}
        found = type(self)(tops, self.manifest | {"k": count, "kept": k}, self.records, self._source, self.partial)
        found.folder, found.labels, found.sample = self.folder, self.labels, self.sample
        return found

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order of the forward pass."""
        return list(self.tops)

    @property
    def winners(self) -> NDArray[np.int64]:
        """Ids of all images that are a winner of some unit, ascending: int64 [n]."""
        return winners_of(self.tops.values())

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input in pixels."""
        _, height, width = self.manifest["input"]
        return height, width

    @property
    def source(self) -> Source:
        """The images that were scanned, opened from the manifest if they are not yet."""
        if self._source is None:
            self._source = reopen_source(self.manifest["source"], self.manifest["transform"])
        return self._source

    def attach(self, source: Source, known: Mapping[int, dict[str, Any]] | None = None) -> None:
        """Set the source of the images, and keep records of the winners' images, or of a shard's candidates.

        known: records made during the scan, by image id; missing ones are read from the source.
        """
        self._source = source
        self.manifest["source"] = source.describe()
        known = known or {}
        if source.rereadable:
            wanted = self.winners if self.partial is None or self.tops else self.partial.candidates
            self.records = {id: known[id] if id in known else source.record(id) for id in wanted.tolist()}

    def set_labels(self, labels: Labels | Sequence[str] | str | Path | None) -> None:
        """Name the network's classes: a list in the order of its head's units, or the path of a file of labels.

        See `labels_from`. None: no names. A folder that the run is written into keeps them.
        """
        self.labels = None if labels is None else labels_from(labels)

    @property
    def class_folders(self) -> Mapping[int, str]:
        """The class folder of each winner's image, by its id; see `class_folders`."""
        if self._class_folders is None or self._class_folders[0] is not self.records:
            names = {id: record["name"] for id, record in self.records.items()}
            self._class_folders = self.records, class_folders(names)
        return self._class_folders[1]

    def set_effective_box(self, layer: str, side: int | None) -> None:
        """Set the side of a layer's effective box, in model-input pixels; None: the layer has none."""
        self.manifest["layers"][layer]["effective_box"] = side

    def count(self) -> dict[str, int]:
        """Count the units: {"units": all, "dead": dead ones, and for each status that occurs the units with it}."""
        status = np.concatenate([top.status for top in self.tops.values()])
        return {
            "units": len(status),
            **{name: int((status == name).sum()) for name in sorted(set(status.tolist()))},
            "dead": int(sum(top.dead.sum() for top in self.tops.values())),
        }
