"""The image among the entries of items and batches: tuples, dicts, and tables as Hugging Face's `datasets` has them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from support.sources import PLAIN, everything, noise
from unitvis.errors import UnitvisError
from unitvis.sources import Failure, open_source

TRUTH = np.stack([noise(i) for i in range(10)])
FLOATS = torch.from_numpy(TRUTH).permute(0, 3, 1, 2).float()


def file(i, cut=None):
    data = io.BytesIO()
    Image.fromarray(TRUTH[i]).save(data, "PNG")
    return data.getvalue()[:cut]


class Column:
    """A column of a dataset: a sequence, and nothing else."""

    def __init__(self, dataset, name):
        self.dataset, self.name = dataset, name

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.dataset[i][self.name]


class Table:
    """A stand-in for `datasets.Dataset`: rows are dicts, names give columns; pictures as that package decodes them."""

    def __init__(self, **columns):
        self.columns = columns
        self.features, self.column_names = dict.fromkeys(columns), list(columns)

    def __len__(self):
        return len(TRUTH)

    def __getitem__(self, i):
        return Column(self, i) if isinstance(i, str) else {name: column(i) for name, column in self.columns.items()}


class Stream:
    """A stand-in for `datasets.IterableDataset`."""

    def __init__(self, table):
        self.table = table

    def __iter__(self):
        return (self.table[i] for i in range(len(self.table)))


def decoded(i):
    return Image.open(io.BytesIO(file(i)))


def undecoded(i):
    return {"bytes": file(i), "path": None}


def negative(i):
    return Image.fromarray(255 - TRUTH[i])


@pytest.mark.parametrize("kind", [decoded, undecoded, lambda i: TRUTH[i]], ids=["decoded", "undecoded", "numpy"])
def test_the_column_of_images_of_a_table_is_found(kind):
    for table in (
        Table(label=int, image=kind),
        Table(label=int, photograph_of_it=kind, text=str),
        Table(annotation=negative, image=kind),  # two images, of which one has a usual name
        Table(image=kind)["image"],
    ):
        assert (everything(open_source(table, PLAIN))[1].numpy() == TRUTH).all()
        source = open_source(table, PLAIN)
        assert (np.asarray(source.picture(3)[0]) == TRUTH[3]).all()
    if kind is not TRUTH.__getitem__:
        for table in (Table(label=int, image=decoded), Table(annotation=negative, image=decoded)):
            assert (everything(open_source(Stream(table), PLAIN))[1].numpy() == TRUTH).all()


def test_an_entry_that_is_named_counts():
    for images in (Table(annotation=negative, image=decoded), Stream(Table(annotation=negative, image=decoded))):
        source = open_source(images, PLAIN, entry="annotation")
        assert (everything(source)[1].numpy() == 255 - TRUTH).all()
    pairs = [(TRUTH[i], 255 - TRUTH[i]) for i in range(10)]
    assert (everything(open_source(pairs, PLAIN))[1].numpy() == TRUTH).all()
    assert (everything(open_source(pairs, PLAIN, entry=1))[1].numpy() == 255 - TRUTH).all()


def test_batches_with_the_image_not_first():
    masks = FLOATS[:, :1]
    parts = [slice(0, 4), slice(4, 10)]
    for batches in (
        [{"labels": torch.arange(10)[s], "pixel_values": FLOATS[s]} for s in parts],
        [{"mask": masks[s], "image": FLOATS[s]} for s in parts],
        [(torch.arange(10)[s], FLOATS[s]) for s in parts],
    ):
        assert (everything(open_source(batches))[1] == FLOATS).all()
        assert (everything(open_source(iter(batches)))[1] == FLOATS).all()
    items = [{"label": i, "pixel_values": FLOATS[i]} for i in range(10)]
    for images in (items, DataLoader(items, batch_size=4)):
        source = open_source(images)
        assert (everything(source)[1] == FLOATS).all()
        assert (source.read(7) == FLOATS[7]).all()


def test_what_cannot_be_told_is_asked():
    for images, message in (
        (
            Table(low=decoded, high=negative),
            r"several entries of an item may be the image \('low', 'high'\); name one: entry='low'",
        ),
        ([{"a": FLOATS, "b": FLOATS}], r"several entries of an item may be the image \('a', 'b'\)"),
        (
            Table(label=int, text=str),
            r"10 failed, the first is 'image 0' \(an item has no image; its entries are 'label' \(int\)",
        ),
        (
            Table(label=int, image=lambda i: FLOATS[i].byte()),
            r"torch.uint8 \[3, 8, 8\], not an image; .* channels last",
        ),
        (
            {"train": Table(image=decoded), "test": Table(image=decoded)},
            "from dict; give one of its entries: 'train', 'test'",
        ),
        (iter([[negative(0), negative(1)]]), "batch 0 of the stream is a list of pictures; yield them one at a time"),
    ):
        with pytest.raises(UnitvisError, match=message) as error:
            everything(open_source(images, PLAIN))
        assert "\n" not in str(error.value)
    for entry in ("picture", 3):
        with pytest.raises(UnitvisError, match=rf"an item has no entry {entry!r}; it has 'label', 'image'"):
            everything(open_source(Table(label=int, image=decoded), PLAIN, entry=entry))


def test_a_picture_that_is_broken_in_its_file_is_a_failure():
    def broken(i):
        return Image.open(io.BytesIO(file(i, 150))) if i == 4 else decoded(i)

    def missing(i):
        return None if i == 0 else decoded(i)

    for images in (Table(label=int, image=broken), Stream(Table(label=int, image=broken))):
        source = open_source(images, PLAIN)
        assert everything(source)[0] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
        assert [failure.id for failure in source.failures] == [4]
    source = open_source(Table(label=int, image=missing), PLAIN)
    assert everything(source)[0] == list(range(1, 10))
    reason = "an item has no image; its entries are 'label' (int), 'image' (NoneType)"
    assert source.failures == [Failure(0, "image 0", reason)]
