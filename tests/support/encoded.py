"""Image files as bytes, some of them written by hand, and the pixels that unitvis decodes from them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image

from unitvis.decoding.decode import decode


def stored(image, kind, **options):
    """A picture as a file of a kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(data, **options):
    """int [H, W, 3]: what unitvis decodes from a file."""
    image = decode(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def png_chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width, height, depth, kind, rows, chunks=()):
    """A PNG written by hand: `rows` are the raw bytes of each row, `chunks` come before them."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    body = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(png_chunk(*one) for one in chunks)
        + png_chunk(b"IDAT", body)
        + png_chunk(b"IEND", b"")
    )


def tiff(order, strips, height, width, bits, photometric, planar=1, tags=()):
    """An uncompressed TIFF written by hand: one strip a plane; `bits` of each sample."""
    start = 8
    offsets = [start + sum(map(len, strips[:i])) for i in range(len(strips))]
    data = b"".join(strips)
    entries = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, bits),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (273, 4, offsets),
        (277, 3, [len(bits)]),
        (278, 4, [height]),
        (279, 4, [len(strip) for strip in strips]),
        (284, 3, [planar]),
        *tags,
    ]
    ifd = start + len(data)
    extra_at = ifd + 2 + 12 * len(entries) + 4
    table, extra = struct.pack(order + "H", len(entries)), b""
    for tag, kind, values in sorted(entries):
        body = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(body) > 4:
            body, extra = struct.pack(order + "I", extra_at + len(extra)), extra + body
        table += struct.pack(order + "HHI", tag, kind, len(values)) + body.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "I", ifd) + data + table + struct.pack(order + "I", 0) + extra


def header(kind, width, height):
    """The start of a file that claims a size, and some bytes more."""
    if kind == "PNG":
        return png(width, height, 8, 2, [b"\0" * 30])
    if kind == "BMP":
        return (
            b"BM"
            + struct.pack("<IHHIIiiHHIIiiII", 1000, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
            + bytes(99)
        )
    if kind == "PPM":
        return b"P6 %d %d 255\n" % (width, height) + bytes(99)
    if kind == "GIF":
        return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + stored(Image.new("L", (8, 8)), "GIF")[13:]
    if kind == "TIFF":
        return tiff("<", [bytes(99)], height, width, [8] * 3, 2)
    data = stored(Image.new("RGB", (8, 8)), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
