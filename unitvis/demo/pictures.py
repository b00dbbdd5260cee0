"""The demo's pictures, generated from a seed with NumPy and Pillow; each depends on the seed and its index alone.

A picture is a background, up to two plain bodies, one large and up to two smaller objects of its class, sometimes a
blurred foreground or a beam of light, and the effects of a camera. Only the objects depend on the class.
"""

import math
import multiprocessing
import os
import sys
import warnings
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unitvis.demo.backgrounds import Rgb, background, ramp, scene_colours
from unitvis.demo.fields import Field, Light, R, Rng, X, Y, edge, noise, pick, random_plane, shadow, smoothstep
from unitvis.demo.motifs import MOTIFS, Surface

SIZE = R  # a picture's width and height in pixels
CLASSES: tuple[str, ...] = tuple(MOTIFS)


def label(seed: int, index: int) -> int:
    """The class number of a picture: each block of `len(CLASSES)` pictures holds every class once, in random order."""
    block, slot = divmod(index, len(CLASSES))
    return int(np.random.default_rng([seed, block, 1]).permutation(len(CLASSES))[slot])


def draw(seed: int, index: int) -> NDArray[np.uint8]:
    """Draw picture `index` of the endless series of a seed: uint8 [SIZE, SIZE, 3]."""
    rng = np.random.default_rng([seed, index, 2])
    motif = MOTIFS[CLASSES[label(seed, index)]]
    light = Light.draw(rng)
    canvas = background(rng, light)
    for _ in range(int(pick(rng, 0, 0, 1, 2))):
        canvas = _paint(rng, canvas, _plain_body(rng), _colours(rng), light, 1.0)
    x, y, radius = rng.uniform(-0.3, 0.3), rng.uniform(-0.3, 0.3), rng.uniform(0.55, 1.0)
    discs = [(x, y, radius)]  # centre and radius of each object
    for _ in range(int(pick(rng, 0, 0, 1, 2))):  # smaller ones, behind or in front, on the other side
        away, far = math.atan2(-y, -x) + rng.uniform(-1.2, 1.2), rng.uniform(0.6, 1.0)
        discs.append((x + far * math.cos(away), y + far * math.sin(away), radius * rng.uniform(0.4, 0.75)))
    colours = _colours(rng)
    for disc in discs[:: int(pick(rng, -1, 1))]:
        plane = random_plane(rng, *disc)
        canvas = _paint(rng, canvas, motif(rng, plane), colours, light, disc[2])
        if rng.random() < 0.6:
            colours = _colours(rng)
    if rng.random() < 0.35:
        canvas = _obscured(rng, canvas)
    return _photographed(rng, canvas)


def pictures(count: int, seed: int, workers: int | None = None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw the first `count` pictures of a series: uint8 [count, SIZE, SIZE, 3], and their labels, int64 [count].

    workers: processes; None: one for each core.
    """
    workers = min(workers or os.cpu_count() or 1, count)
    out = np.empty((count, SIZE, SIZE, 3), np.uint8)
    if workers <= 1:
        for i in range(count):
            out[i] = draw(seed, i)
    else:
        # Forking is fast, and safe here in spite of Python's warning about threads, because the child only draws.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pool = context.Pool(workers)
        with pool:
            for i, picture in enumerate(pool.imap(partial(draw, seed), range(count), chunksize=16)):
                out[i] = picture
    return out, np.array([label(seed, i) for i in range(count)])


def _colours(rng: Rng) -> Rgb:
    """Draw three colours that differ clearly, in lightness or in hue alone: [3, 3]."""
    while True:
        if rng.random() < 0.25:
            colours = scene_colours(rng)[rng.permutation(3)]
        else:
            hue, spread = rng.random(), pick(rng, 0.08, 0.3, 0.5)
            hues = hue + np.array([0, spread, spread * rng.uniform(0.5, 2)]) + rng.normal(0, 0.03, 3)
            value = rng.permutation([rng.uniform(0.08, 0.4), rng.uniform(0.4, 0.9), rng.uniform(0.75, 1)])
            grey = rng.uniform(0.1, pick(rng, 0.55, 0.8, 1.0), 3)[:, None]
            pure = np.clip(np.abs((hues[:, None] + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
            colours = (value[:, None] * (1 - grey + grey * pure)).astype(np.float32)
        gaps = np.abs(colours[[0, 1]] - colours[[1, 2]]).sum(1)
        if gaps[0] > 0.7 and gaps[1] > 0.45:
            return np.clip(colours, 0.02, 0.98)


def _paint(rng: Rng, canvas: Rgb, surface: Surface, colours: Rgb, light: Light, scale: float) -> Rgb:
    """Paint a surface on the canvas: uneven colour, light on its relief, and a soft shadow below it."""
    weather, grain = noise(rng), noise(rng, "rough")
    diffuse, shine = light.shade(surface.height * scale + rng.uniform(0, 0.004) * grain)
    alpha = surface.alpha * rng.uniform(0.92, 1)
    reach = rng.uniform(2, 7)
    cast = shadow(surface.alpha, 0.6 * reach, -1.6 * reach * light.x, -1.6 * reach * light.y)
    lit = diffuse * (1 + rng.uniform(0.03, 0.12) * weather + rng.uniform(0.02, 0.1) * grain) * alpha
    albedo = ramp(colours, surface.tone + rng.uniform(0.02, 0.14) * weather)
    return canvas * ((1 - rng.uniform(0.3, 0.65) * cast) * (1 - alpha)) + albedo * lit + shine * alpha


def _plain_body(rng: Rng) -> Surface:
    """Draw a plain body that belongs to no class: a pebble, a slab or a rod."""
    plane = random_plane(rng, rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.2, 0.5))
    u, v = plane.u, plane.v
    kind = rng.integers(3)
    if kind == 0:
        inside: Field = 1 - np.hypot(u, v) + 0.08 * noise(rng, "smooth")
        height = 0.8 * np.sqrt(np.clip(inside, 0, 1))
    elif kind == 1:
        inside = np.minimum(1 - np.abs(u), 0.7 - np.abs(v))
        height = np.clip(inside, 0, 0.12)
    else:
        wide = rng.uniform(0.1, 0.25)
        inside = wide - np.abs(v + rng.uniform(-0.3, 0.3) * u * u)
        height = np.sqrt(np.clip(wide * wide - (wide - inside) ** 2, 0, 1))
    return Surface(rng.uniform(0, 2) + 0.25 * noise(rng), height * 0.3, edge(inside, plane.pixel))


def _obscured(rng: Rng, canvas: Rgb) -> Rgb:
    """Put a blurred object in front of the canvas, or a beam of light or shade across it."""
    turn, offset = rng.uniform(0, 2 * np.pi), rng.uniform(0.45, 0.95)
    along = X * math.cos(turn) + Y * math.sin(turn)
    if rng.random() < 0.5:
        near = smoothstep(along + 0.12 * noise(rng, "smooth"), offset, offset + rng.uniform(0.05, 0.3))
        return canvas * (1 - 0.9 * near) + 0.9 * near * scene_colours(rng)[rng.integers(3), :, None, None]
    beam = smoothstep(along + 0.1 * noise(rng, "smooth"), offset - 0.9, offset - 0.9 + rng.uniform(0.1, 0.6))
    return canvas * (1 + pick(rng, -0.45, 0.35) * beam)


def _photographed(rng: Rng, canvas: Rgb) -> NDArray[np.uint8]:
    """Apply exposure, white balance, vignette and sensor noise: uint8 [SIZE, SIZE, 3]."""
    gain = rng.uniform(0.85, 1.2) * (1 + rng.normal(0, 0.05, (3, 1, 1)))
    rgb = np.maximum(canvas * gain.astype(np.float32), 0) * (1 - rng.uniform(0, 0.22) * (X * X + Y * Y))
    rgb = rgb / (1 + 0.12 * rgb * rgb)  # compress the highlights
    develop = 255 * np.linspace(0, 1, 256, dtype=np.float32) ** rng.uniform(0.8, 1.1)
    rgb = np.take(develop, np.clip(rgb * 255, 0, 255).astype(np.uint8))
    grain = rng.standard_normal((R, R), np.float32) * rng.uniform(0.5, 6)
    return np.ascontiguousarray(np.clip(rgb + grain + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0))
