"""Datasets, DataLoaders and iterables of batches as sources."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset

from support.sources import PLAIN, everything, noise
from unitvis.errors import UnitvisError
from unitvis.sources import Failure, open_source
from unitvis.sources.transform import Transform


class Pictures(Dataset):
    """PIL images with labels; one of them fails."""

    def __init__(self, kind="pil", broken=()):
        self.kind, self.broken = kind, broken

    def __len__(self):
        return 10

    def __getitem__(self, i):
        if i in self.broken:
            raise OSError(f"no bytes of {i}\nto be had")
        image = noise(i, 12, 10)
        floats = torch.from_numpy(image).permute(2, 0, 1).float()
        return {"pil": Image.fromarray(image), "array": image, "tensor": torch.from_numpy(image), "float": floats}[
            self.kind
        ]


class Labelled(Pictures):
    def __getitem__(self, i):
        return super().__getitem__(i), i


class Named(Pictures):
    def __getitem__(self, i):
        return {"image": super().__getitem__(i), "label": i}


TRUTH = np.stack([noise(i, 12, 10) for i in range(10)])


@pytest.mark.parametrize("form", [Pictures, Labelled, Named])
@pytest.mark.parametrize("kind", ["pil", "array", "tensor"])
def test_map_style_datasets_of_pixels(form, kind):
    source = open_source(form(kind), PLAIN)
    assert source.length == 10
    ids, pixels = everything(source, 3)
    assert ids == list(range(10))
    assert (pixels.numpy() == TRUTH).all()
    ids, pixels = everything(source, 3, ids=[9, 2])
    assert (pixels.numpy() == TRUTH[[9, 2]]).all()
    transform = Transform(resize=(6, 5))
    small = open_source(form(kind), transform)
    assert (small.read(4).numpy() == transform(Image.fromarray(TRUTH[4]))).all()
    picture, to_source = small.picture(4)
    assert (np.asarray(picture) == TRUTH[4]).all()
    assert to_source((1, 1, 2, 3)) == (2, 2, 4, 6)
    assert small.record(4)["width"] == 10
    small.check(small.record(4))


def test_map_style_datasets_of_floats():
    source = open_source(Labelled("float"), PLAIN)
    _, pixels = everything(source, 4)
    assert pixels.dtype == torch.float32
    assert (pixels.permute(0, 2, 3, 1).numpy() == TRUTH).all()


def test_an_item_that_fails_is_listed():
    source = open_source(Labelled(broken=(0, 6)), PLAIN)
    assert everything(source, 4)[0] == [1, 2, 3, 4, 5, 7, 8, 9]
    assert source.failures == [Failure(i, f"image {i}", f"OSError: no bytes of {i} to be had") for i in (0, 6)]
    with pytest.raises(UnitvisError, match="'image 0' cannot be used: OSError"):
        everything(open_source(Labelled(broken=(0,)), PLAIN, on_error="raise"))
    with pytest.raises(UnitvisError, match="no image of the dataset could be read: 10 failed, the first is 'image 0'"):
        everything(open_source(Pictures(broken=range(10)), PLAIN))


def test_an_item_that_is_not_an_image_stops():
    for item, message in (
        ("x", r"image 0 of the dataset is str, not a tensor or array; uint8 \[H, W, 3\] or normalised float"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "channels last"),
        (torch.zeros(8, 8), r"\[8, 8\], not an image"),
        ((), "an item is empty"),
    ):
        with pytest.raises(UnitvisError, match=message):
            everything(open_source([[item], 1] if isinstance(item, str) else [item], PLAIN))


class Augmented(Pictures):
    def __getitem__(self, i):
        return torch.rand(3, 8, 8), i


def test_random_augmentation_is_noticed():
    for images in (Augmented(), DataLoader(Augmented(), batch_size=4)):
        source = open_source(images, PLAIN)
        everything(source)
        with pytest.raises(
            UnitvisError, match=r"'image 3' is no longer .* augment at random\): read again, it differs"
        ):
            everything(source, ids=[3])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_dataloaders_are_read_whole_and_by_id(workers):
    loader = DataLoader(Labelled("tensor"), batch_size=4, num_workers=workers)
    source = open_source(loader, PLAIN)
    assert source.rereadable
    assert source.length == 10
    for batch_size in (3, 4, 16):
        ids, pixels = everything(source, batch_size)
        assert ids == list(range(10))
        assert (pixels.numpy() == TRUTH).all()
    ids, pixels = everything(source, 3, ids=[8, 1, 5, 0])
    assert ids == [8, 1, 5, 0]
    assert (pixels.numpy() == TRUTH[[8, 1, 5, 0]]).all()
    assert (np.asarray(source.picture(7)[0]) == TRUTH[7]).all()
    source.check(source.record(7))


def test_a_collate_function_is_used_again():
    def collate(items):
        return torch.stack([image.permute(2, 0, 1).float() / 255 for image, _ in items]), None

    source = open_source(DataLoader(Labelled("tensor"), batch_size=4, collate_fn=collate))
    _, pixels = everything(source)
    assert (pixels.permute(0, 2, 3, 1).numpy() == TRUTH.astype(np.float32) / np.float32(255)).all()
    assert (everything(source, ids=[6])[1][0] == pixels[6]).all()
    assert (source.read(6) == pixels[6]).all()


def test_dataloaders_that_would_lose_or_shuffle_are_refused():
    data = TensorDataset(torch.zeros(10, 3, 4, 4))
    order = "draws in an order of its own"
    for loader, message in (
        (
            DataLoader(data, shuffle=True),
            rf"{order} \(RandomSampler\).*shuffle=False and no sampler, or give its dataset",
        ),
        (DataLoader(data, sampler=[3, 1]), rf"{order} \(list\)"),
        (DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)), rf"{order} \(RandomSampler\)"),
        (DataLoader(data, batch_sampler=[[1, 2], [3]]), rf"{order} \(list\)"),
        (DataLoader(data, batch_size=None, shuffle=True), rf"{order} \(RandomSampler\)"),
        (DataLoader(data, batch_size=4, drop_last=True), "drops its last images; build it with drop_last=False"),
        (DataLoader(Stream([]), batch_size=4, drop_last=True), "drops its last images"),
    ):
        with pytest.raises(UnitvisError, match=message):
            open_source(loader)
    assert everything(open_source(DataLoader(data, batch_size=5, drop_last=True)))[0] == list(range(10))
    assert everything(open_source(DataLoader(Subset(data, [4, 2]), batch_size=2)))[0] == [0, 1]


def test_a_collate_function_that_drops_images_is_refused():
    loader = DataLoader(
        Labelled("tensor"), batch_size=4, collate_fn=lambda items: torch.stack([i for i, n in items if n])
    )
    with pytest.raises(UnitvisError, match=r"gave 3 images where it draws 4, from image 0 on; a collate_fn that drops"):
        everything(open_source(loader, PLAIN))


def test_a_dataset_that_fails_inside_a_dataloader():
    loader = DataLoader(Labelled("tensor", broken=(5,)), batch_size=4)
    with pytest.raises(UnitvisError, match=r"the DataLoader failed after 1 batches: OSError: no bytes of 5 to be had$"):
        everything(open_source(loader, PLAIN))

    def worker():  # how torch passes on what a worker raised
        yield torch.zeros(2, 3, 4, 4)
        raise OSError(
            "Caught OSError in DataLoader worker process 0.\nTraceback (most recent call last):\nOSError: x\n"
        )

    with pytest.raises(UnitvisError, match=r"the stream failed after 1 batches: OSError: x$"):
        everything(open_source(worker()))


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def test_streams_of_any_batches_are_made_even():
    floats = torch.randn(13, 3, 4, 4)
    pieces = [floats[:3], floats[3:4], floats[4:4], floats[4:12], floats[12:]]
    labelled = [(piece, torch.zeros(len(piece))) for piece in pieces]
    named = [{"pixel_values": piece, "labels": 0} for piece in pieces]
    loader = DataLoader(Stream(list(floats)), batch_size=5)
    for images in (iter(pieces), Stream(labelled), iter(named), pieces, (p.numpy() for p in pieces), loader):
        source = open_source(images)
        assert not source.rereadable
        assert source.length is None
        ids, pixels = everything(source, 4)
        assert ids == list(range(13))
        assert (pixels == floats).all()
        assert source.length == 13
        assert source.describe()["images"] == 13


def test_a_stream_is_read_once():
    source = open_source(iter([torch.zeros(2, 3, 4, 5)]))
    with pytest.raises(UnitvisError, match="the stream can be read once only"):
        source.batches(2, ids=[1])
    everything(source)
    with pytest.raises(UnitvisError, match="the stream has been read; give a new one"):
        everything(source)
    record = source.record(1)
    assert record == {"id": 1, "name": "image 1", "width": 5, "height": 4, "hash": None}
    for use in (lambda: source.read(1), lambda: source.picture(1), lambda: source.check(record)):
        with pytest.raises(UnitvisError, match="image 1 came from a stream, which is read once; give a folder"):
            use()


def test_what_a_stream_must_not_give():
    def failing():
        yield torch.zeros(2, 3, 4, 4)
        raise ValueError("out of\ndisk")

    for images, message in (
        (iter([torch.zeros(3, 4, 4)]), r"batch 0 of the stream is torch.float32 \[3, 4, 4\], not an image"),
        (iter(["x"]), "batch 0 of the stream is str"),
        (iter([torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 5)]), r"'image 0' gives .*\[3, 4, 4\], 'image 2' gives"),
        (iter([torch.zeros(2, 3, 4, 4), np.zeros((2, 4, 4, 3), np.uint8)]), "'image 0' gives .*, 'image 2' gives"),
        (failing(), "the stream failed after 1 batches: ValueError: out of disk"),
        (iter([]), "no image of the stream could be read"),
    ):
        with pytest.raises(UnitvisError, match=message):
            everything(open_source(images, PLAIN))


def test_uint8_streams_are_resized():
    transform = Transform(resize=(6, 5))
    expected = np.stack([transform(Image.fromarray(image)) for image in TRUTH])
    assert (everything(open_source(iter([TRUTH[:4], TRUTH[4:]]), transform))[1].numpy() == expected).all()
