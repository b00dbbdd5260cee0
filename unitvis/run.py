"""Runs, their layers and their units, with methods that draw them and representations for notebooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unitvis.drawing import sheets
from unitvis.drawing.notebook import PATCH_SIZE, layer_html, png, run_html
from unitvis.drawing.overview import overview, printed_overview
from unitvis.drawing.page import Page
from unitvis.drawing.printing import printed_sheet
from unitvis.errors import UnitvisError, abridged, check_unit, printable, whole_number
from unitvis.files import only_writer
from unitvis.results.arrays import LayerArrays
from unitvis.results.classes import unit_names, winner_classes
from unitvis.results.data import RunData
from unitvis.results.folder import check_output, read_run, write_run
from unitvis.results.sample import QUARTILES, Histogram, Sample, Typical, refuse_without_sample

MAX_BINS = 4096  # of a histogram of at most 256 images
_VALUES_SHOWN = 9  # responses in the text of a unit, at most
_UNITS_SHOWN = 36  # units of a slice that a notebook draws, at most


@dataclass(frozen=True, repr=False)
class LayerTop(LayerArrays):
    """The top-k of one layer's units; `top[12]` is one unit, and `top[0:9]` some."""

    run: Run | None = field(default=None, repr=False, compare=False)  # the run it is part of; gives the images to draw

    @overload
    def __getitem__(self, unit: int) -> Unit: ...
    @overload
    def __getitem__(self, unit: slice) -> UnitSlice: ...
    def __getitem__(self, unit: int | slice) -> Unit | UnitSlice:
        """Return one unit, which a notebook shows as its tile, or those of a slice, which it shows as a sheet."""
        if isinstance(unit, slice):
            return UnitSlice(self, range(len(self))[unit])
        check_unit(self.name, unit, len(self))
        return Unit(self, int(unit))

    def classes(self, unit: int) -> dict[str, int]:
        """How many of a unit's winners that fired lie in each class folder (root/class/image), most first.

        {"dog": 6, "cat": 3}; {} where the images do not lie in class folders.
        """
        check_unit(self.name, unit, len(self))
        return {} if self.run is None else winner_classes(self.run, self, [unit])[0]

    @property
    def labels(self) -> list[str] | None:
        """The names of the classes, one a unit, if the layer is a classifier's head and they are known; else None."""
        found = None if self.run is None else unit_names(self.run, self.name)
        return found and found[0]

    def __iter__(self) -> Iterator[Unit]:
        return (Unit(self, unit) for unit in range(len(self)))

    def typical(self, unit: int, quantiles: Sequence[float] = QUARTILES) -> Typical:
        """A unit's usual images: of the run's sample those at quantiles of its responses, and nine around the median.

        The sample is up to 256 images chosen by a hash of their ids, see `Sample.typical`. UnitvisError where the run
        keeps none.
        """
        return self._sample(unit).typical(self.name, int(unit), quantiles)

    def histogram(self, unit: int, bins: int = 32) -> Histogram:
        """How a unit's responses are distributed over the run's sample, in bins of one width.

        They reach from the smallest response of the sample to the largest one of the run, that of the first winner.
        UnitvisError where the run keeps no sample.
        """
        bins = whole_number("bins", bins, 1, MAX_BINS)
        return self._sample(unit).histogram(self.name, int(unit), bins, float(self.values[int(unit), 0]))

    def _sample(self, unit: int) -> Sample:
        check_unit(self.name, unit, len(self))
        if self.run is None:
            raise UnitvisError(f"layer {self.name!r} belongs to no run, so there is no sample of its images")
        if self.run.sample is None:
            raise refuse_without_sample(self.run.manifest)
        return self.run.sample

    def _repr_html_(self) -> str:
        return layer_html(self, self.run)


@dataclass(frozen=True, eq=False)
class Unit:
    """One unit's top-k: `run["features.10"][12]`."""

    layer: LayerTop
    number: int

    @property
    def values(self) -> NDArray[np.float32]:
        """float32 [k], descending; NaN where blank."""
        return self.layer.values[self.number]

    @property
    def images(self) -> NDArray[np.int64]:
        """int64 [k], image ids; -1 where blank."""
        return self.layer.images[self.number]

    @property
    def positions(self) -> NDArray[np.int32]:
        """int32 [k, 2]: row, column; -1 where blank."""
        return self.layer.positions[self.number]

    @property
    def boxes(self) -> NDArray[np.int32]:
        """int32 [k, 4]: left, top, right, bottom in model-input pixels; 0 where blank."""
        return self.layer.boxes[self.number]

    @property
    def status(self) -> str:
        """The unit's status: "separated", "tied" or "unseparated"."""
        return str(self.layer.status[self.number])

    @property
    def label(self) -> str | None:
        """The name of the unit's class, see `LayerTop.labels`."""
        return labels[self.number] if (labels := self.layer.labels) else None

    @property
    def classes(self) -> dict[str, int]:
        """The classes of the unit's winners, see `LayerTop.classes`."""
        return self.layer.classes(self.number)

    def tile(self, *, crop: str | None = None, size: int = 96) -> Image.Image:
        """Draw the unit's patches as a 3x3 tile, strongest first. crop, size: see `Run.patch`."""
        return _run_of(self.layer).tile(self.layer.name, self.number, crop=crop, size=size)

    def __repr__(self) -> str:
        values = " ".join(f"{value:.4g}" for value in self.values[:_VALUES_SHOWN])
        more = f" and {len(self.values) - _VALUES_SHOWN} more" if len(self.values) > _VALUES_SHOWN else ""
        label = f" ({printable(label)})" if (label := self.label) else ""
        return f"<unit {self.number}{label} of {printable(self.layer.name)}: {self.status}, {values}{more}>"

    def _repr_png_(self) -> bytes | None:
        try:
            return png(self.tile(size=PATCH_SIZE))
        except UnitvisError:  # the images cannot be read; the notebook shows the text
            return None


@dataclass(frozen=True, eq=False)
class UnitSlice(Sequence[Unit]):
    """Some units of a layer, `run["features.10"][0:9]`; a notebook shows them as a sheet."""

    layer: LayerTop
    numbers: range

    @overload
    def __getitem__(self, place: int) -> Unit: ...
    @overload
    def __getitem__(self, place: slice) -> UnitSlice: ...
    def __getitem__(self, place: int | slice) -> Unit | UnitSlice:
        """Return the unit at a place in the slice, from 0, or those at some places."""
        found = self.numbers[place]
        return UnitSlice(self.layer, found) if isinstance(found, range) else Unit(self.layer, found)

    def __len__(self) -> int:
        return len(self.numbers)

    def sheet(self, *, crop: str | None = None, size: int | None = None) -> Image.Image:
        """Draw a page of the units' tiles; see `Run.sheet`."""
        return _run_of(self.layer).sheet(self.layer.name, self.numbers, crop=crop, size=size)

    def __repr__(self) -> str:
        numbers = abridged([str(number) for number in self.numbers])
        return f"<{len(self)} units of {printable(self.layer.name)}: {numbers}>"

    def _repr_png_(self) -> bytes | None:
        try:
            return png(self[:_UNITS_SHOWN].sheet(size=PATCH_SIZE))
        except UnitvisError:  # there are no units, or the images cannot be read; the notebook shows the text
            return None


def _run_of(layer: LayerTop) -> Run:
    """The run that a layer is part of; raises UnitvisError for one that belongs to none."""
    if layer.run is None:
        raise UnitvisError(f"layer {layer.name!r} belongs to no run, so there are no images to cut from")
    return layer.run


class Run(RunData):
    """The top-k of every scanned layer: `run["features.10"].values`, `run.tile("features.10", 7)`."""

    tops: Mapping[str, LayerTop]

    def _layer(self, top: LayerArrays) -> LayerTop:
        arrays = top.values, top.images, top.positions, top.boxes, top.status
        return LayerTop(top.name, *arrays, top.info, run=self)

    def __getitem__(self, layer: str) -> LayerTop:
        super().__getitem__(layer)
        return self.tops[layer]

    def patch(self, layer: str, unit: int, rank: int, *, crop: str | None = None, size: int = 96) -> Image.Image:
        """Cut the patch of one winner. size: its width and height in pixels.

        crop: "rf" (receptive field), "effective" (effective box) or "image"; None: the layer's default, "rf" while the
        receptive field is at most half as wide and high as the image, else "effective".
        """
        return sheets.patch(self, layer, unit, rank, crop=crop, size=size)

    def tile(self, layer: str, unit: int, *, crop: str | None = None, size: int = 96) -> Image.Image:
        """Draw a unit's patches as a 3x3 tile, strongest first. crop, size: see `patch`."""
        return sheets.tile(self, layer, unit, crop=crop, size=size)

    @overload
    def sheet(
        self, layer: str, units: Sequence[int] | None = None, *, crop: str | None = None, size: int | None = None
    ) -> Image.Image: ...
    @overload
    def sheet(
        self, layer: str, units: Sequence[int] | None = None, *, crop: str | None = None, width: float | str
    ) -> Page: ...
    def sheet(
        self,
        layer: str,
        units: Sequence[int] | None = None,
        *,
        crop: str | None = None,
        size: int | None = None,
        width: float | str | None = None,
    ) -> Image.Image | Page:
        """Draw a page of tiles with unit numbers and largest values. units: None: all. crop, size: see `patch`.

        width: of a page for print, in millimetres or as "160mm", "16cm" or "6.3in"; a `Page` is returned, which is
        saved as PNG, SVG or PDF, and patches are as large as it allows.
        """
        if width is None:
            return sheets.sheet(self, layer, units, crop=crop, size=size)
        if size is not None:
            raise UnitvisError(f"patches are as large as a page of width={width} allows; leave out size={size}")
        return printed_sheet(self, layer, units, crop=crop, width=width)

    @overload
    def overview(self, layers: Sequence[str] | None = None) -> Image.Image: ...
    @overload
    def overview(self, layers: Sequence[str] | None = None, *, width: float | str) -> Page: ...
    def overview(self, layers: Sequence[str] | None = None, *, width: float | str | None = None) -> Image.Image | Page:
        """Draw nine units of each layer side by side, chosen by rule.

        layers: None: five of the run's. width: draws a `Page` for print, see `sheet`.
        """
        return overview(self, layers) if width is None else printed_overview(self, layers, width=width)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the run into a folder: a new or empty one, or with `overwrite` one that holds a run; returns it."""
        with only_writer(folder := check_output(path, overwrite=overwrite)):
            return self.write(folder)

    def write(self, folder: Path) -> Path:
        """Write the run into a folder that `check_output` returned; see `results.folder`."""
        return write_run(self, folder)

    def _repr_html_(self) -> str:
        return run_html(self)

    def __repr__(self) -> str:
        if not self.tops:
            return f"<Run: a shard, {self.manifest['images']} images, to be merged>"
        units = sum(len(top) for top in self.tops.values())
        return (
            f"<Run: {units} units of {len(self)} layers, top {self.manifest['k']} of {self.manifest['images']} images>"
        )


def load(path: str | Path, images: object = None) -> Run:
    """Read a run folder. images: the images that were scanned, if they are no longer at the manifest's path."""
    return read_run(Run, path, images)
