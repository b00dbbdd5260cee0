"""Files that are damaged, too large or no images: one line that says why, in bounded memory."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from support.encoded import header, pixels, stored, tiff
from support.sources import PLAIN, everything, noise
from unitvis.decoding import decode as decode_module
from unitvis.decoding.decode import MAX_PIXELS, decode, jpeg_scans
from unitvis.errors import ImageError
from unitvis.sources import open_source

DEADLINE = 300  # seconds after which what a test waits for is taken to never happen


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "GIF", "TIFF", "JPEG"])
def test_a_bomb_is_refused_with_its_size(kind):
    with pytest.raises(ImageError) as error:
        decode(header(kind, 20_000, 20_000))
    assert str(error.value) == "20000 x 20000 pixels; more than 89,478,485 are refused"
    side = int(MAX_PIXELS**0.5) + 1
    with pytest.raises(ImageError, match=f"{side} x {side} pixels"):  # where Pillow itself only warns
        decode(header(kind, side, side))


def test_a_tiff_whose_tile_is_a_bomb_is_refused():
    with pytest.raises(ImageError, match="20000 x 20000 pixels"):
        decode(tiff("<", [bytes(99)], 6, 10, [8] * 3, 2, tags=[(322, 4, [20_000]), (323, 4, [20_000])]))


def test_a_jpeg_of_endless_scans_is_refused():
    data = stored(Image.new("L", (8, 8)), "JPEG", progressive=True)
    scan = data[data.index(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match=r"^more than 500 JPEG scans; such a file is refused$"):
        decode(data[:-2] + scan * 600 + data[-2:])


def progressive(side=8):
    """A progressive JPEG with a preview in its EXIF data, whose own start of scan does not count."""
    return stored(Image.fromarray(noise(1, side, side)), "JPEG", progressive=True, exif=b"Exif\0\0" + b"\xff\xda" * 600)


def test_scans_are_those_of_the_image_alone():
    data = progressive()
    scans = data.count(b"\xff\xda") - 600
    assert jpeg_scans(data, 1000) == scans > 1
    film = np.random.default_rng(0).integers(0, 256, 60_000, np.uint8).tobytes() + b"\xff\xda" * 600
    motion_photo = data + film  # a film that follows the end of the image
    assert jpeg_scans(motion_photo, 1000) == scans
    assert (pixels(motion_photo) == pixels(data)).all()
    for hidden in (b"\xff\x02\xff\xff", b"\xff\x00\xff\xff"):  # no segments, so nothing is skipped after them
        scan = data[data.rindex(b"\xff\xda") : -2]
        assert jpeg_scans(data[:-2] + hidden + scan * 900 + data[-2:], 800) == 800


def test_avif_is_decoded_upright_or_named():
    small = np.kron(noise(3, 3, 4), np.ones((8, 8, 1), np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    data = stored(Image.fromarray(small), "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    assert pixels(data).shape == (32, 24, 3)
    assert np.abs(pixels(data) - np.rot90(small, -1)).max() <= 3


def test_a_pillow_without_avif_gives_a_failure_that_names_it(monkeypatch, tmp_path):
    data = stored(Image.fromarray(noise(0)), "AVIF")
    for number, content in enumerate((data, stored(Image.fromarray(noise(1)), "PNG"))):
        (tmp_path / f"{number}.avif").write_bytes(content)
    formats = [(n, m, None if n == "AVIF" else p) for n, m, p in decode_module._FORMATS]
    monkeypatch.setattr(decode_module, "_FORMATS", formats)
    source = open_source(tmp_path, PLAIN)
    assert everything(source)[0] == [1]  # the same ids as where it can be decoded
    assert re.fullmatch(
        r"AVIF, which this Pillow \(.+\) cannot decode; install pillow>=11.3", source.failures[0].reason
    )


def test_formats_that_are_not_decoded_are_named():
    for data, name in (
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
    ):
        with pytest.raises(ImageError, match=f"^{name}, which is not decoded; convert it to JPEG or PNG$"):
            decode(data)


def test_empty_and_not_an_image():
    with pytest.raises(ImageError, match=r"^empty file$"):
        decode(b"")
    for data in (b"this is a text file named .jpg\n", b"\x89PNG", b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF", b"\0" * 100):
        with pytest.raises(ImageError, match=r"^not an image \(JPEG, PNG, WebP, AVIF, BMP, GIF, TIFF or PPM\)$"):
            decode(data)


def photo():
    ramp = np.add.outer(np.arange(200), np.arange(300))[..., None] * np.array([1, 0.5, 0.2])
    return Image.fromarray((ramp % 256).astype(np.uint8))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF")
def test_a_truncated_file_is_a_failure(kind):
    data = stored(photo(), kind)
    for share in (0.03, 0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match=r"^(broken|not an image)"):
            decode(data[: int(len(data) * share)])


def test_the_reason_of_a_truncated_jpeg():
    data = stored(photo(), "JPEG")
    with pytest.raises(ImageError, match=r"^broken JPEG: image file is truncated \(\d+ bytes not processed\)$"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(("kind", "rest"), [("JPEG", 128), ("PNG", 0), ("PPM", 0)])
def test_allow_truncated_keeps_what_is_there(kind, rest):
    whole = stored(photo(), kind)
    part = pixels(whole[: len(whole) // 2], allow_truncated=True)
    assert part.shape == (200, 300, 3)
    assert (part[:40] == pixels(whole)[:40]).all()
    assert (part[-1, -1] == rest).all()
    assert (pixels(whole, allow_truncated=True) == pixels(whole)).all()


def test_allow_truncated_in_one_thread_does_not_reach_another():
    data = stored(photo(), "PNG")
    data = data[: len(data) // 2]
    stop, taken = threading.Event(), []

    def strict():
        while not stop.is_set():
            try:
                taken.append(decode(data))
            except ImageError:
                taken.append(None)

    thread = threading.Thread(target=strict)
    thread.start()
    tries, deadline = 0, time.monotonic() + DEADLINE
    while thread.is_alive() and (tries < 100 or len(taken) < 100) and time.monotonic() < deadline:
        decode(data, allow_truncated=True)
        tries += 1
    stop.set()
    thread.join()
    assert len(taken) >= 100
    assert all(one is None for one in taken)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.filterwarnings("ignore")
def test_hostile_bytes_give_a_picture_or_one_line():
    """Bit flips, cuts and foreign pieces in all formats: never another exception, never an address or a second line."""
    random = np.random.default_rng(0)
    small = photo().resize((40, 30))
    seeds = [stored(small, kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP")]
    seeds.append(stored(small, "TIFF", compression="tiff_lzw"))
    seeds.append(stored(small, "TIFF", compression="tiff_deflate"))
    seeds.append(stored(small.convert("CMYK"), "JPEG", progressive=True))
    for round_ in range(60):
        for seed in seeds:
            data = bytearray(seed)
            for at in random.integers(0, min(len(data), 400 if round_ % 2 else len(data)), 1 + round_ % 4):
                data[at] = random.integers(0, 256)
            if round_ % 5 == 0:
                del data[random.integers(8, len(data)) :]
            try:
                assert decode(bytes(data), allow_truncated=round_ % 3 == 0).mode == "RGB"
            except ImageError as error:
                text = str(error)
                assert text
                assert "\n" not in text
                assert " at 0x" not in text
                assert len(text) < 300


def most_at_once(data, expected, monkeypatch):
    """The largest number of six threads that use a picture at the same time, where there is room for `expected`.

    Those that use one wait until so many do and all threads have asked for room; one more would then get in.
    """
    changed, asked, used, too_many, most = threading.Condition(), [], set(), threading.Event(), []
    take = decode_module.MemoryBudget.take

    def asking(room, need):
        with changed:
            asked.append(need)
            changed.notify_all()
        return take(room, need)

    def use(picture, size):
        me = threading.get_ident()
        with changed:
            used.add(me)
            most.append(len(used))
            if len(used) > expected:
                too_many.set()
            changed.notify_all()
            assert changed.wait_for(lambda: max(most) >= expected and len(asked) >= 6, DEADLINE)
        too_many.wait(0.01)  # gives one more the time to come in; what holds does not depend on it
        with changed:
            used.remove(me)

    def work(_):
        for _ in range(5):
            decode_module.decode_sized(data, use)

    monkeypatch.setattr(decode_module.MemoryBudget, "take", asking)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    monkeypatch.setattr(decode_module.MemoryBudget, "take", take)
    assert len(most) == len(asked) == 30
    return max(most)


def test_large_images_wait_for_room(monkeypatch):
    monkeypatch.setattr("unitvis.decoding.decode.memory_budget", decode_module.MemoryBudget(4 * 64 * 64 * 2))
    assert most_at_once(stored(Image.new("RGB", (64, 64)), "PNG"), 2, monkeypatch) == 2
    huge = stored(Image.new("RGB", (300, 300)), "PNG")  # needs more than there is, so it is alone
    assert most_at_once(huge, 1, monkeypatch) == 1
