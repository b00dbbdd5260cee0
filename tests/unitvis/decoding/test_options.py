"""The decoders that may be chosen, and decoding at a smaller scale."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from support.encoded import header, pixels, stored
from unitvis.choices import DECODERS
from unitvis.decoding.options import Decoding
from unitvis.errors import ImageError, UnitvisError
from unitvis.sources.transform import Transform


def photograph(width, height):
    """A smooth picture, as photographs are: noise would differ between any two ways to scale."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y), np.sin(9 * x * y)]
    return Image.fromarray(np.stack([127 + 120 * wave for wave in waves], axis=2).astype(np.uint8))


def orientation_exif(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return exif


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_scaled_decoding_is_nearly_the_same_and_keeps_the_geometry(decoder, orientation):
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    data = stored(photograph(320, 200), "JPEG", quality=95, exif=orientation_exif(orientation))
    size = (200, 320) if orientation == 6 else (320, 200)
    for resize in (24, 50, 99, (30, 70), None):
        transform = Transform(resize=resize, crop=20)
        whole, scaled = (Decoding(decoder, scaled).pixels(data, transform) for scaled in (False, True))
        assert whole[1] == scaled[1] == size
        assert whole[0].shape == scaled[0].shape == (20, 20, 3)
        assert np.abs(whole[0].astype(int) - scaled[0]).mean() < 2
        assert (whole[0] != scaled[0]).any() == (resize is not None)
    assert Decoding(decoder, scaled=True).picture(data).size == size


def test_simplejpeg_gives_the_same_picture_and_leaves_other_formats_to_pillow():
    pytest.importorskip("simplejpeg")
    fast = Decoding("simplejpeg")
    colour, grey = photograph(70, 41), photograph(70, 41).convert("L")
    for image, options in ((colour, {}), (grey, {}), (colour, {"progressive": True}), (colour, {"subsampling": 0})):
        data = stored(image, "JPEG", quality=90, exif=orientation_exif(8), **options)
        assert np.abs(np.asarray(fast.picture(data)).astype(int) - pixels(data)).max() <= 2
    for data in (stored(colour.convert("CMYK"), "JPEG"), stored(colour, "PNG"), stored(colour, "WEBP")):
        assert (np.asarray(fast.picture(data)) == pixels(data)).all()


def test_simplejpeg_refuses_what_pillow_refuses():
    pytest.importorskip("simplejpeg")
    data = stored(photograph(300, 200), "JPEG")
    with pytest.raises(ImageError, match="broken JPEG: "):
        Decoding("simplejpeg").picture(data[: len(data) // 2])
    part = np.asarray(Decoding("simplejpeg", allow_truncated=True).picture(data[: len(data) // 2])).astype(int)
    assert np.abs(part[:60] - pixels(data)[:60]).max() <= 2
    with pytest.raises(ImageError, match="20000 x 20000 pixels"):
        Decoding("simplejpeg").picture(header("JPEG", 20_000, 20_000))


def test_two_sizes_in_one_file_are_refused(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    data = stored(photograph(30, 20), "JPEG")
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda data, strict: (20_000, 20_000, "RGB", "420"))
    with pytest.raises(ImageError, match="broken JPEG: two sizes, 30 x 20 and 20000 x 20000"):
        Decoding("simplejpeg").picture(data)


def test_a_decoder_that_is_not_there(monkeypatch):
    with pytest.raises(UnitvisError, match="decoder='turbo'; it must be one of pillow, simplejpeg"):
        Decoding("turbo")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnitvisError, match=r"simplejpeg is not installed; pip install 'unitvis\[simplejpeg\]'"):
        Decoding("simplejpeg")
