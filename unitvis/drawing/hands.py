"""Cutting and saving pictures: in processes where there are many image files, else in threads, else one by one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from unitvis.bars import bar
from unitvis.decoding.crew import Crew
from unitvis.decoding.cutting import Cuts, Pieces, as_seen, pieces, save
from unitvis.decoding.processes import may_start
from unitvis.errors import ImageError, UnitvisError
from unitvis.results.data import RunData
from unitvis.sources.base import usable_cores

MIN_FILES = 64  # fewer are cut before processes have started
AHEAD = 16  # images that are cut ahead of those that are used, so that a compute batch of these keeps nobody waiting
MAX_OPEN_PICTURES = 16  # at once, however many cores there are: a large photograph takes 100 MB


class Hands:
    """Context in which the pictures of a run are cut and saved; images: how many will be cut.

    records: of the images, by id, which tell that one has changed; None: those of the run's winners.
    """

    def __init__(self, run: RunData, images: int, records: Mapping[int, Mapping[str, Any]] | None = None) -> None:
        self._run = run
        self._records = run.records if records is None else records
        if images:
            _need_images(run)
        grey = run.manifest["input"][0] == 1
        self._cutter = run.source.cutter(run.input_size, grey=grey) if images else None
        files = self._cutter is not None
        self._value_range = _value_range(run) if images and not files else (0.0, 1.0)
        workers = min(usable_cores(), MAX_OPEN_PICTURES)
        self._ahead = 2 * workers + AHEAD if files else 0
        self._saving: deque[Future[None]] = deque()
        self._executor: Crew | ThreadPoolExecutor | None = None
        if self._cutter is not None:  # a data set of the user's may not expect threads
            self._executor = Crew(workers) if images >= MIN_FILES and may_start() else ThreadPoolExecutor(workers)

    def __enter__(self) -> Self:
        if self._executor is not None:
            self._executor.__enter__()
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            while self._saving and raised[0] is None:
                self._saving.popleft().result()
        finally:
            if isinstance(self._executor, ThreadPoolExecutor):
                self._executor.shutdown(wait=True, cancel_futures=True)
            elif self._executor is not None:
                self._executor.__exit__(*raised)

    def cut(self, tasks: Iterable[tuple[int, Cuts]], total: int) -> Iterator[tuple[int, Pieces]]:
        """Cut images, and yield each with its pieces, in their order, with a bar; total: their number.

        Raises UnitvisError where an image file is no longer the one that was scanned.
        """
        ahead: deque[tuple[int, Callable[[], Pieces]]] = deque()
        with bar(total, "draw") as counted:
            for image, cuts in tasks:
                ahead.append((image, self._cut_later(image, cuts)))
                if len(ahead) > self._ahead:
                    image, result = ahead.popleft()
                    yield image, result()
                    counted.update()
            for image, result in ahead:
                yield image, result()
                counted.update()

    def save(self, picture: Image.Image, path: Path, kind: str, **options: Any) -> None:
        """Write a picture, which is there when the context ends."""
        if not isinstance(self._executor, Crew):
            save(np.asarray(picture), str(path), kind, options)
            return
        while self._saving and self._saving[0].done():
            self._saving.popleft().result()
        self._saving.append(self._executor.submit(save, np.asarray(picture), str(path), kind, options))
        if len(self._saving) > self._ahead:
            self._saving.popleft().result()

    def _cut_later(self, image: int, cuts: Cuts) -> Callable[[], Pieces]:
        """Begin to cut an image; returns a call that waits for its pieces."""
        record = self._records.get(image)
        if self._cutter is None or self._executor is None:
            return lambda: self._cut(image, cuts)
        if record is not None:
            self._run.source.check_name(record)
        hashed = None if record is None else record.get("hash") or ""  # "": of no content
        place, packed = self._run.source.place(image), self._run.source.packed(image)
        future = self._executor.submit(self._cutter, place, hashed, cuts, packed)

        def result() -> Pieces:
            found, reason = None, "it changes while it is read"
            try:
                found = future.result()
            except ImageError as error:
                reason = str(error)
            if found is not None:
                return found
            if record is not None:
                self._run.source.check(record)  # which tells what has changed
            raise UnitvisError(f"{self._run.source.name(image)!r} cannot be used: {reason}")

        return result

    def _cut(self, image: int, cuts: Cuts) -> Pieces:
        """Cut an image that is no file."""
        if image in self._records:
            self._run.source.check(self._records[image])
        picture, to_picture = self._run.source.picture(image, self._value_range)
        seen = as_seen(picture, grey=self._run.manifest["input"][0] == 1)
        found = pieces(seen, to_picture, self._run.input_size, cuts)
        return found._replace(model_input=self._run.source.read(image).cpu().numpy()) if cuts.model_input else found


def _need_images(run: RunData) -> None:
    """Raise UnitvisError for images that cannot be read again."""
    if not run.source.rereadable:
        raise UnitvisError(
            f"the images came from a {run.source.kind}, which cannot be read again to cut patches from; give the same "
            f"images as a folder, array or dataset: unitvis.load(RUN, images=...) or recorder.result(images=...)"
        )


def _value_range(run: RunData) -> tuple[float, float]:
    """The values drawn as black and white, one range for the run: measured for normalised floats, else (0, 1)."""
    sample = run.winners[:64].tolist()
    return run.source.value_range(sample) if run.source.read(sample[0]).is_floating_point() else (0.0, 1.0)
