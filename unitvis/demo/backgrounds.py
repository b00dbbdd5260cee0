"""Backgrounds that look like scenes and materials, independent of the class of the objects drawn on them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from unitvis.demo.fields import PIXEL, Field, Light, R, Rng, X, Y, noise, pick, smoothstep, stretch

Rgb = NDArray[np.floating[Any]]  # [3, R, R] within 0..1
Colour = tuple[float, float, float]

# Dark, middle and light colours of scenes; every channel is jittered, and a fifth of the pictures have random colours.
_SCENES: tuple[tuple[Colour, Colour, Colour], ...] = (
    ((0.10, 0.22, 0.42), (0.35, 0.58, 0.83), (0.92, 0.94, 0.97)),  # clear sky
    ((0.22, 0.12, 0.26), (0.83, 0.42, 0.28), (0.98, 0.82, 0.52)),  # sunset
    ((0.05, 0.12, 0.05), (0.25, 0.42, 0.14), (0.65, 0.73, 0.33)),  # leaves
    ((0.17, 0.10, 0.05), (0.48, 0.32, 0.18), (0.80, 0.65, 0.45)),  # wood, earth
    ((0.12, 0.12, 0.13), (0.42, 0.41, 0.40), (0.80, 0.79, 0.76)),  # stone
    ((0.48, 0.36, 0.22), (0.80, 0.67, 0.46), (0.96, 0.89, 0.73)),  # sand
    ((0.02, 0.12, 0.17), (0.08, 0.40, 0.47), (0.66, 0.86, 0.85)),  # water
    ((0.27, 0.08, 0.06), (0.62, 0.27, 0.18), (0.88, 0.60, 0.45)),  # clay
    ((0.05, 0.04, 0.13), (0.20, 0.17, 0.38), (0.62, 0.56, 0.77)),  # night
    ((0.42, 0.30, 0.36), (0.79, 0.63, 0.66), (0.97, 0.90, 0.88)),  # blossom
)


_TABLE_POSITIONS = np.linspace(0, 1, 256)  # of the entries of a colour table


def ramp(colours: Rgb, t: Field) -> Rgb:
    """Interpolate colours [n, 3] at t, where 0 is the first and n - 1 the last: [3, R, R]."""
    last = len(colours) - 1
    table = np.stack([np.interp(_TABLE_POSITIONS * last, range(last + 1), c) for c in colours.T]).astype(np.float32)
    return np.take(table, np.clip(t * (255 / last), 0, 255).astype(np.uint8), 1)


def scene_colours(rng: Rng) -> Rgb:
    """Draw the dark, middle and light colour of a scene: [3, 3]."""
    if rng.random() < 0.2:
        colours = np.sort(rng.random((3, 3)), axis=0) * 0.8 + 0.1
    else:
        colours = np.array(_SCENES[rng.integers(len(_SCENES))]) + rng.normal(0, 0.05, (3, 3))
    return np.clip(colours, 0.02, 0.98).astype(np.float32)


def _direction(rng: Rng) -> tuple[float, float]:
    """Draw a random unit vector."""
    turn = rng.uniform(0, 2 * math.pi)
    return math.cos(turn), math.sin(turn)


def _lit(rgb: Rgb, height: Field, light: Light, gloss: float = 0.3) -> Rgb:
    """Shade a colour by the light on a height field."""
    diffuse, shine = light.shade(height)
    return rgb * diffuse + gloss * shine


def _clouds(rng: Rng, light: Light) -> Rgb:
    c = scene_colours(rng)
    t = Y * 0.5 + 0.5 + 0.12 * noise(rng, "smooth", 128, 64)
    cloud = smoothstep(noise(rng, "natural", 128, 72) + rng.uniform(-0.5, 0.4), -0.2, 1.4)
    return ramp(c[:2][:: int(pick(rng, -1, 1))], t) * (1 - cloud) + ramp(c[1:], t + 0.6) * cloud


def _hills(rng: Rng, light: Light) -> Rgb:
    c, ground = scene_colours(rng), scene_colours(rng)
    rgb = ramp(c[[1, 2]], Y * 0.8 + 0.8 + 0.15 * noise(rng, "natural", 128, 50))
    line = rng.uniform(-0.6, -0.1)
    for k in range(rng.integers(2, 5)):
        skyline = line + rng.uniform(0.05, 0.22) * noise(rng, "smooth", int(rng.integers(40, 120)), 1)
        near = min(0.35 + 0.2 * k + rng.uniform(-0.1, 0.1), 1)
        land = ramp(ground, 0.9 + 0.35 * noise(rng, "rough") + 0.25 * noise(rng, "natural") - 0.25 * Y)
        a = smoothstep(Y - skyline, -PIXEL, PIXEL)
        rgb = rgb * (1 - a) + a * (land * near + (1 - near) * c[2][:, None, None])
        line += rng.uniform(0.25, 0.5)
    return rgb


def _sand(rng: Rng, light: Light) -> Rgb:
    c = scene_colours(rng)
    n = noise(rng, "smooth")
    dx, dy = _direction(rng)
    ripple = np.sin((X * dx + Y * dy) * rng.uniform(9, 16) + 2.6 * n)
    height = 0.012 * ripple * rng.uniform(0.2, 1) + 0.05 * n + rng.uniform(0, 0.004) * noise(rng, "rough")
    return _lit(ramp(c, 1.1 + 0.2 * n + 0.12 * noise(rng, "rough")), height, light, 0.05)


def _grain(rng: Rng, light: Light) -> Rgb:
    """Wood, bark, brushed metal, grass: noise stretched in one direction."""
    c = scene_colours(rng)
    thin = int(rng.integers(6, 22))
    n = 0.6 * noise(rng, "natural", R, thin) + 0.5 * noise(rng, "rough", R, thin * 2) + 0.4 * noise(rng, "smooth")
    if rng.random() < 0.5:
        n = np.ascontiguousarray(n.T)
    return _lit(ramp(c, 1 + 0.5 * n), 0.02 * n, light, 0.1)


def _rock(rng: Rng, light: Light) -> Rgb:
    c = scene_colours(rng)
    n, m = noise(rng), noise(rng)
    height = rng.uniform(0.05, 0.09) * n - 0.08 * np.exp(-10 * np.abs(m)) + rng.uniform(0, 0.006) * noise(rng, "rough")
    return _lit(ramp(c, 1 + 0.3 * n - 0.5 * np.exp(-14 * np.abs(m))), height, light, 0.1)


def _water(rng: Rng, light: Light) -> Rgb:
    c = scene_colours(rng)
    n = 0.7 * noise(rng, "natural", 90, 128) + 0.5 * noise(rng, "smooth", 50, 128)
    return _lit(ramp(c, 0.8 + 0.25 * n + 0.4 * Y), 0.045 * n, light, 0.9)


def _plaster(rng: Rng, light: Light) -> Rgb:
    c = scene_colours(rng)
    dx, dy = _direction(rng)
    t = 1 + 0.6 * (X * dx + Y * dy) + 0.18 * noise(rng)
    return _lit(ramp(c, t), rng.uniform(0, 0.006) * noise(rng, "rough"), light, 0.05)


def _marble(rng: Rng, light: Light) -> Rgb:
    c = scene_colours(rng)
    n = noise(rng, "smooth")
    vein = np.abs(noise(rng) + 0.7 * n)
    return ramp(c, 1.9 - 1.3 * np.exp(-5 * vein) - 0.3 * np.abs(n))


def _velvet(rng: Rng, light: Light) -> Rgb:
    """Folded cloth."""
    c = scene_colours(rng)
    n = noise(rng, "smooth", int(rng.integers(40, 128)), int(rng.integers(40, 128)))
    return _lit(ramp(c, 1 + 0.35 * n + 0.1 * noise(rng, "rough")), 0.22 * n, light, 0.15)


def _strokes(rng: Rng, light: Light) -> Rgb:
    """Foliage, grass, straw, pebbles: many small shaded pieces, some out of focus."""
    c = scene_colours(rng)
    side = R + 16
    image = Image.new("RGB", (side, side), tuple(int(255 * v * 0.6) for v in c[0]))
    pen = ImageDraw.Draw(image)
    lean, spread = rng.uniform(0, np.pi), pick(rng, 0.25, 0.7, 3)
    long, wide = rng.uniform(7, 22), rng.uniform(1.5, 6)
    count = int(np.clip(2.2 * side * side / (long * wide * 2), 50, 170))
    tones, angles = np.sort(rng.random(count)), lean + spread * rng.standard_normal(count)
    colours = ramp(c, (2 * tones + rng.normal(0, 0.2, count)).astype(np.float32)).T
    spots = rng.uniform(0, side, (count, 2))
    for (x, y), a, colour in zip(spots.tolist(), angles.tolist(), (colours * 255).astype(int).tolist(), strict=True):
        dx, dy = long * np.cos(a), long * np.sin(a)
        nx, ny = -wide * np.sin(a), wide * np.cos(a)
        leaf = [(x - dx, y - dy), (x + nx, y + ny), (x + dx, y + dy), (x - nx, y - ny)]
        pen.polygon(leaf, fill=tuple(colour))
        pen.line([leaf[0], leaf[2]], fill=tuple(int(v * 0.75) for v in colour))
    image = image.filter(ImageFilter.GaussianBlur(pick(rng, 0.7, 1.2, 2.5)))
    return np.asarray(image.crop((8, 8, 8 + R, 8 + R)), np.float32).transpose(2, 0, 1) / 255


def _bokeh(rng: Rng, light: Light) -> Rgb:
    """Distant lights out of focus."""
    c = scene_colours(rng)
    rgb = ramp(c, 0.5 + 0.3 * Y + 0.35 * noise(rng, "smooth"))
    for _ in range(rng.integers(4, 10)):
        x, y, radius = rng.uniform(-1.1, 1.1), rng.uniform(-1.1, 1.1), rng.uniform(0.08, 0.35)
        soft = rng.uniform(0.03, 0.12)
        disc = smoothstep(radius - np.hypot(X - x, Y - y), -soft, soft)
        rgb = rgb + disc * rng.uniform(0.1, 0.4) * (c[rng.integers(1, 3)][:, None, None] - 0.3 * rgb)
    return rgb


def _blurred(rng: Rng, light: Light) -> Rgb:
    """Distant scenery out of focus: coarse noise in three colour channels."""
    c = scene_colours(rng)
    size = int(rng.integers(4, 9))
    far = np.stack([stretch(coarse) for coarse in rng.random((3, size, size), np.float32)])
    return ramp(c, 0.6 + 0.9 * far.mean(0)) + 0.35 * (far - 0.5)


_KINDS: tuple[Callable[[Rng, Light], Rgb], ...] = (
    _clouds, _hills, _sand, _grain, _rock, _water, _plaster, _marble, _velvet, _strokes, _strokes, _bokeh, _blurred,
)  # fmt: skip


def background(rng: Rng, light: Light) -> Rgb:
    """Draw a background of a random kind and colours: [3, R, R], 0 to 1."""
    return np.clip(_KINDS[rng.integers(len(_KINDS))](rng, light), 0, 1)
