"""The classes of the demo's pictures: seven patterns on the surface of a body, and eight objects.

A pattern gets coordinates on a body, an object the plane it lies in; lengths are in local units. Size, position,
rotation, colours and light are drawn elsewhere, with the same distribution for every class.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unitvis.demo.fields import Field, Plane, Rng, dome, edge, noise, pick, scatter, smoothstep, wave

_WORDS = (
    "UNIT", "filter", "image", "layer", "patch", "Deep", "net", "vision", "Hello", "Open", "Cafe", "Taxi", "Hotel",
    "NEWS", "No 7", "1998", "2013", "42 km", "R&B", "Jazz", "ZEBRA", "Quay", "River", "west", "& Co", "Book", "Kiosk",
)  # fmt: skip


@dataclass(frozen=True)
class Surface:
    """The surface of an object, to be coloured and lit."""

    tone: Field  # 0 to 2: position between the three colours of the palette
    height: Field  # relief, in local units
    alpha: Field  # coverage, 0 to 1


# (rng, s, t, size of a picture's pixel) -> tone, height, coverage (None: 1 everywhere)
Pattern = Callable[[Rng, Field, Field, float], tuple[Field, Field, Field | None]]
Motif = Callable[[Rng, Plane], Surface]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _turned(s: Field, t: Field, angle: float) -> tuple[Field, Field]:
    """Rotate coordinates by an angle in radians."""
    c, d = math.cos(angle), math.sin(angle)
    return c * s + d * t, c * t - d * s


def _band(phase: Field, period: float, duty: float, pixel: float) -> Field:
    """Anti-aliased stripes: 1 over the share `duty` of each period, which is 1 in `phase` and `period` in length."""
    return edge((wave(phase) + 2 * duty - 1) * period / 4, pixel)


# Patterns: s, t and `pixel` (the size of a picture's pixel) are in local units.


def stripes(rng: Rng, s: Field, t: Field, pixel: float) -> tuple[Field, Field, Field | None]:
    period = rng.uniform(10, 21) * pixel
    phase = _turned(s, t, rng.uniform(0, math.pi))[0] / period
    if rng.random() < 0.3:  # a soft grating
        soft = 0.5 + 0.5 * np.sin(2 * math.pi * phase)
        return 1.3 * soft, 0.12 * period * soft, None
    bar = _band(phase, period, rng.uniform(0.35, 0.65), pixel)
    every_other = 1 + scatter(np.floor(phase + 0.5), 0 * s, rng.uniform(0, 99)) * pick(rng, 0, 0, 1)
    return bar * every_other, 0.14 * period * np.sqrt(np.maximum(wave(phase), 0)), None


def zigzags(rng: Rng, s: Field, t: Field, pixel: float) -> tuple[Field, Field, Field | None]:
    s, t = _turned(s, t, rng.uniform(0, math.pi))
    period, length = rng.uniform(10, 19) * pixel, rng.uniform(18, 32) * pixel
    phase = (t + rng.uniform(0.22, 0.34) * length * wave(s / length)) / period
    bar = _band(phase, period, rng.uniform(0.35, 0.65), pixel)
    return bar * rng.uniform(0.9, 1.4), 0.12 * period * np.maximum(wave(phase), 0), None


def checkers(rng: Rng, s: Field, t: Field, pixel: float) -> tuple[Field, Field, Field | None]:
    s, t = _turned(s, t, rng.uniform(0, math.pi))
    period = rng.uniform(18, 35) * pixel
    x, y = wave(s / period), wave(t / period)
    sign = np.clip(x * period / 4 / pixel * 2, -1, 1) * np.clip(y * period / 4 / pixel * 2, -1, 1)
    relief = rng.uniform(0, 0.06) * period * np.minimum(np.abs(x), np.abs(y))
    return (0.5 + 0.5 * sign) * rng.uniform(0.9, 1.4), relief, None


def dots(rng: Rng, s: Field, t: Field, pixel: float) -> tuple[Field, Field, Field | None]:
    s, t = _turned(s, t, rng.uniform(0, math.pi))
    period, salt = rng.uniform(13, 26) * pixel, rng.uniform(0, 99)
    row = np.rint(t / period)
    shift = 0.5 * (row - 2 * np.floor(row / 2)) * pick(rng, 0, 1)
    column = np.rint(s / period - shift)
    x, y = s - (column + shift) * period, t - row * period
    radius = period * rng.uniform(0.26, 0.4)
    distance = np.hypot(x, y)
    size = 1 - pick(rng, 0, 0.35) * scatter(column, row, salt)
    relief = dome(distance / size, radius) * pick(rng, -0.6, 0.5, 0.9)
    colour = 1 + scatter(column, row, salt + 7) * pick(rng, 0, 1)
    return edge(radius * size - distance, pixel) * colour, relief, None


def honeycomb(rng: Rng, s: Field, t: Field, pixel: float) -> tuple[Field, Field, Field | None]:
    s, t = _turned(s, t, rng.uniform(0, math.pi))
    period, salt = rng.uniform(14, 29) * pixel, rng.uniform(0, 99)
    s, t = s / period, t / period
    tall = math.sqrt(3)
    ax, ay = s - np.rint(s), t - tall * np.rint(t / tall)
    bx, by = s - np.floor(s) - 0.5, t - tall * (np.floor(t / tall) + 0.5)
    first = ax * ax + ay * ay < bx * bx + by * by
    x, y = np.where(first, ax, bx), np.where(first, ay, by)
    inside = 0.5 - np.maximum(np.abs(x), np.abs(x) * 0.5 + np.abs(y) * (tall / 2))  # 0 on the walls
    wall = rng.uniform(0.05, 0.12)
    cell = edge((inside - wall) * period, pixel)
    colour = 1 + scatter((s - x) * 2, (t - y) * 2, salt) * pick(rng, 0, 0.5, 1)
    relief = np.minimum(inside, 0.25) * period * pick(rng, -0.9, -0.5, 0.6)
    return cell * colour, relief, None


def nets(rng: Rng, s: Field, t: Field, pixel: float) -> tuple[Field, Field, Field | None]:
    s, t = _turned(s, t, rng.uniform(0, math.pi))
    period = rng.uniform(14, 27) * pixel
    wire = period * rng.uniform(0.08, 0.14)
    dx, dy = (s / period - np.rint(s / period)) * period, (t / period - np.rint(t / period)) * period
    weave = 0.5 * wire * wave(s / period) * wave(t / period)
    over = dome(dx, wire) + weave * (np.abs(dx) < wire)
    under = dome(dy, wire) - weave * (np.abs(dy) < wire)
    cover = np.maximum(edge(wire - np.abs(dx), pixel), edge(wire - np.abs(dy), pixel))
    holes = None if rng.random() < 0.35 else np.maximum(cover, pick(rng, 0, 0, 0.35))
    return cover * 1.1, 1.2 * np.maximum(over, under), holes


def scales(rng: Rng, s: Field, t: Field, pixel: float) -> tuple[Field, Field, Field | None]:
    s, t = _turned(s, t, pick(rng, 0, 0, math.pi) + rng.uniform(-0.4, 0.4))
    wide, salt = rng.uniform(14, 27) * pixel, rng.uniform(0, 99)
    tall, radius = wide * rng.uniform(0.4, 0.55), wide * 0.56
    tone, height = np.zeros_like(s), np.zeros_like(s)
    top = np.floor(t / tall)
    rings, colours = pick(rng, 1, 2), pick(rng, 0, 0.5, 1)
    for k in (1, 0, -1):  # from the lowest row to the one on top
        row = top + k
        shift = 0.5 * (row - 2 * np.floor(row / 2))
        column = np.rint(s / wide - shift)
        distance = np.hypot(s - (column + shift) * wide, t - row * tall)
        cover = edge(radius - distance, pixel)
        q = distance / radius
        shade = np.clip(q * rings - np.floor(np.minimum(q * rings, rings - 0.01)), 0, 1) ** 2
        cell = (0.15 + 0.85 * shade) * (1 + colours * scatter(column, row, salt))
        tone = tone * (1 - cover) + cover * cell
        height = np.where(cover > 0.5, 0.28 * (t - row * tall) + 0.15 * dome(distance, radius), height)
    return tone, height, None


# Bodies for patterns: coordinates on the body, its relief and its outline.


def _body(rng: Rng, plane: Plane) -> tuple[Field, Field, Field, Field]:
    """A ball, a tube, a panel, a pebble or hanging cloth: s, t, height, alpha."""
    u, v, pixel = plane.u, plane.v, plane.pixel
    kind = rng.integers(5)
    if kind == 0:
        rr = u * u + v * v
        z = np.sqrt(np.maximum(1 - rr, 0))
        bulge = 1 / (0.45 + 0.55 * z)
        return u * bulge, v * bulge, 0.9 * z, edge((1 - rr) / 2, pixel)
    if kind == 1:
        half = rng.uniform(0.6, 0.9)
        z = np.sqrt(np.maximum(1 - (u / half) ** 2, 0.02))
        around = half * np.arcsin(np.clip(u / half, -1, 1))
        return around, v, 0.6 * z, edge(np.minimum(half - np.abs(u), 1 - np.abs(v)), pixel)
    if kind == 2:
        width, height = rng.uniform(0.7, 1), rng.uniform(0.7, 1)
        inside = np.minimum(width - np.abs(u), height - np.abs(v))
        return u, v, np.minimum(inside, 0.06), edge(inside, pixel)
    if kind == 3:
        rr = np.hypot(u, v) + 0.09 * noise(rng, "smooth")
        return u, v, 0.7 * np.sqrt(np.clip(1 - rr, 0, 1)), edge(1 - rr, pixel)
    n, m = noise(rng, "smooth", 100, 100), noise(rng, "smooth", 100, 100)
    return u + 0.09 * n, v + 0.09 * m, 0.11 * (n + m), edge(1.1 - np.maximum(np.abs(u), np.abs(v)) + 0.1 * n, pixel)


def _patterned(pattern: Pattern) -> Motif:
    """A motif that shows the pattern on a random body."""

    def motif(rng: Rng, plane: Plane) -> Surface:
        s, t, height, alpha = _body(rng, plane)
        tone, relief, cover = pattern(rng, s, t, plane.pixel)
        return Surface(tone, height + relief, alpha if cover is None else alpha * cover)

    return motif


# Objects.


def rings(rng: Rng, plane: Plane) -> Surface:
    r = np.hypot(plane.u, plane.v)
    period = 1 / rng.uniform(2.5, 5)
    phase = r / period + pick(rng, 0, 0.5)
    bar = _band(phase, period, rng.uniform(0.35, 0.65), plane.pixel)
    relief = pick(rng, 0.1, 0.25) * period * np.maximum(wave(phase), 0) - pick(rng, 0, 0.25, 0.6) * r
    return Surface(bar * (1 + pick(rng, 0, 0.6) * r), relief, edge(1 - r, plane.pixel))


def wheels(rng: Rng, plane: Plane) -> Surface:
    u, v, p = plane.u, plane.v, plane.pixel
    r, turn = np.hypot(u, v), np.arctan2(v, u) / (2 * math.pi) + rng.random()
    tyre, rim, hub = rng.uniform(0.76, 0.88), rng.uniform(0.06, 0.1), rng.uniform(0.12, 0.22)
    n, wide = int(rng.integers(5, 13)), rng.uniform(0.035, 0.07)
    from_spoke = np.abs(wave(turn * n) - 1) / 4 * 2 * math.pi / n * np.maximum(r, 0.05)
    taper = 1 + rng.uniform(-0.3, 0.8) * (0.8 - r)
    spokes = edge((wide * taper - from_spoke), p) * (r < tyre)
    ring, outer = edge(rim / 2 - np.abs(r - tyre + rim / 2), p), edge(np.minimum(1 - r, r - tyre), p)
    core = edge(hub - r, p)
    tread = 0.25 * _band(turn * 40, 0.15, 0.5, p) * pick(rng, 0, 1)
    metal = np.maximum(np.maximum(spokes, ring), core)
    tone = np.where(outer > 0.5, 0.1 + tread, 1.2 + 0.8 * core)
    height = np.maximum(dome(r - (1 + tyre) / 2, (1 - tyre) / 2), dome(from_spoke, wide * 1.2) * (r < tyre))
    height = np.maximum(height, np.maximum(dome(r - tyre + rim / 2, rim), 0.9 * dome(r, hub)))
    alpha = np.maximum(metal, outer)
    return Surface(tone, height, np.maximum(alpha, pick(rng, 0, 0, 0.6) * edge(1 - r, p)))


def text(rng: Rng, plane: Plane) -> Surface:
    side = 160  # pixels of the page of text, which spans the plane
    size = int(rng.integers(25, 50))
    page = Image.new("L", (side, side))
    pen, font = ImageDraw.Draw(page), _font(size)
    y = int(rng.integers(-6, 10))
    while y < side:
        line = " ".join(rng.choice(_WORDS, 3 if size < 36 else 2))
        pen.text((int(rng.integers(-size, size // 2)), y), line, fill=255, font=font)
        y += int(size * rng.uniform(1.02, 1.25))
    ink_page = np.asarray(page, np.float32) / 255
    x, y_ = (plane.u * 0.5 + 0.5) * side, (plane.v * 0.5 + 0.5) * side
    i, j = np.clip(y_, 0, side - 2), np.clip(x, 0, side - 2)
    i0, j0 = i.astype(np.intp), j.astype(np.intp)
    fi, fj = (i - i0).astype(np.float32), (j - j0).astype(np.float32)
    above = ink_page[i0, j0] * (1 - fj) + ink_page[i0, j0 + 1] * fj
    below = ink_page[i0 + 1, j0] * (1 - fj) + ink_page[i0 + 1, j0 + 1] * fj
    ink = np.minimum(1.4 * (above * (1 - fi) + below * fi), 1)
    inside = 0.97 - np.maximum(np.abs(plane.u), np.abs(plane.v))
    ink = ink * (inside > 0.02)
    paper = edge(inside, plane.pixel) * pick(rng, 0, 1, 1, 1, 1)
    height = ink * pick(rng, -0.04, 0.04, 0.07) + 0.1 * np.minimum(inside, 0.05)
    return Surface(ink * 1.2, height, np.maximum(ink, paper))


def faces(rng: Rng, plane: Plane) -> Surface:
    u, v, p = plane.u / rng.uniform(0.74, 0.86), plane.v, plane.pixel
    turn = rng.uniform(-0.12, 0.12)
    w = u - turn * (1 - u * u)  # looks aside
    r = np.hypot(u, v * (1 + 0.1 * np.sign(v)))
    head = edge(1 - r, p)
    gap, level, open_ = rng.uniform(0.34, 0.44), rng.uniform(-0.22, -0.1), rng.uniform(0.08, 0.17)
    x = np.abs(w) - gap
    y = v - level
    eye_size = rng.uniform(0.17, 0.24)
    eye = edge(1 - np.hypot(x / eye_size, y / open_), p / open_)
    gaze = rng.uniform(-0.06, 0.06)
    iris_at = np.hypot(np.abs(w - gaze) - gap, y)
    iris = eye * edge(open_ * 0.95 - iris_at, p)
    glint = edge(0.04 - np.hypot(np.abs(w - gaze) - gap + 0.04, y + 0.05), p) * iris
    arch, thick = rng.uniform(-0.12, 0.2), rng.uniform(0.03, 0.07)
    brow = edge(thick - np.abs(y + open_ + 0.13 + arch * (x - 0.1) ** 2 * 8 - 0.1 * x), p)
    brow = brow * (np.abs(x) < eye_size * 1.15)
    smile, mouth_y, mouth_w = rng.uniform(-0.15, 0.55), rng.uniform(0.42, 0.52), rng.uniform(0.26, 0.42)
    lips = rng.uniform(0.05, 0.13)
    bow = v - mouth_y + smile * w * w * 1.5 - 0.04
    fade = np.sqrt(np.clip(1 - (w / mouth_w) ** 2, 0, 1))
    mouth = edge(lips * fade - np.abs(bow), p) * (np.abs(w) < mouth_w)
    slit = edge(0.022 - np.abs(bow), p) * mouth
    bridge = np.exp(-((w / 0.09) ** 2)) * smoothstep(v, -0.3, 0.1) * smoothstep(-v, -0.2, 0)
    nose = np.exp(-((w / 0.13) ** 2) - ((v - 0.16) / 0.2) ** 2) + 0.5 * bridge
    nostril = np.exp(-(((np.abs(w) - 0.08) / 0.04) ** 2) - ((v - 0.27) / 0.03) ** 2)
    hairline = -0.52 + rng.uniform(-0.12, 0.12) + rng.uniform(-0.3, 0.5) * w * w + 0.05 * noise(rng, "rough")
    hair_reach = np.hypot(u / rng.uniform(1.05, 1.2), (v + 0.06) / 1.08)
    beard = pick(rng, 0.0, 0.0, 1.0) * smoothstep(v - 0.28 - 0.45 * (1 - np.abs(w)) + 0.25, 0, 0.2) * head
    hair = edge(hairline - v, 4 * p) * edge(1 - hair_reach, p) * pick(rng, 0, 1, 1, 1)
    tone = np.full_like(u, 1) - 0.25 * nostril
    tone = tone * (1 - beard) + beard * 0.35
    tone = np.where(mouth > 0.4, 0.45 - 0.45 * slit, tone)
    tone = tone * (1 - eye) + eye * 2
    tone = tone * (1 - iris) + iris * (0.6 * smoothstep(iris_at, open_ * 0.4, open_ * 0.6))
    tone = tone * (1 - glint) + glint * 2
    tone = tone * (1 - brow) + brow * 0.1
    strands = 0.18 * np.sin(40 * np.arctan2(v + 0.2, u) + 3 * noise(rng)) * hair
    tone = np.where(hair > 0.5, 0.2 + strands, tone)
    socket = np.exp(-((x / 0.24) ** 2) - (y / 0.2) ** 2)
    height = 0.8 * dome(r, 1.02) + 0.16 * nose - 0.07 * socket + 0.05 * (eye + mouth * fade)
    height = height + 0.06 * hair + 0.03 * strands
    return Surface(np.clip(tone, 0, 2), height, np.maximum(head, hair))


def flowers(rng: Rng, plane: Plane) -> Surface:
    u, v, p = plane.u, plane.v, plane.pixel
    r, turn = np.hypot(u, v), np.arctan2(v, u) / (2 * math.pi)
    n, slim, heart = int(rng.integers(5, 13)), rng.uniform(0.75, 1.25), rng.uniform(0.2, 0.32)
    pointed = rng.uniform(0.5, 1.1)
    tone, height, alpha = np.zeros_like(u), np.zeros_like(u), np.zeros_like(u)
    for k in range(rng.integers(1, 4)):
        reach = 1 - 0.2 * k
        phase = turn * n + 0.5 * k + rng.uniform(-0.08, 0.08)
        from_middle = (phase - np.rint(phase)) * 2  # -1..1 over a petal
        q = np.clip(r / reach, 0, 1)
        half = slim * np.sin(math.pi * q**pointed * 0.93) ** 0.6 * 0.95
        inside = (half - np.abs(from_middle)) * r * math.pi / n
        cover = edge(np.minimum(inside, reach - r), p)
        vein = 0.14 * np.cos(from_middle * 14) * q
        petal = 0.25 + 1.0 * q + vein - 0.35 * np.abs(from_middle)
        tone = tone * (1 - cover) + cover * petal
        curl = np.sqrt(np.clip(1 - (from_middle / np.maximum(half, 0.05)) ** 2, 0, 1))
        lift = curl * q / n + 0.1 * k - 0.25 * q
        height = np.where(cover > 0.5, lift, height)
        alpha = np.maximum(alpha, cover)
    core = edge(heart - r, p)
    seeds = 0.5 + 0.5 * np.cos(u * 55) * np.cos(v * 55)
    tone = tone * (1 - core) + core * (1.4 + 0.6 * seeds)
    height = np.where(core > 0.5, 0.3 + 0.7 * dome(r, heart) + 0.03 * seeds, height)
    return Surface(np.clip(tone, 0, 2), height, np.maximum(alpha, core))


def stars(rng: Rng, plane: Plane) -> Surface:
    r, turn = np.hypot(plane.u, plane.v), np.arctan2(plane.v, plane.u) / (2 * math.pi) + 0.25
    n, inner = int(rng.integers(4, 8)), rng.uniform(0.36, 0.5)
    phase = turn * n
    side = (phase - np.rint(phase)) * 2 * math.pi / n
    x, y = r * np.cos(side), r * np.abs(np.sin(side))
    ix, iy = inner * math.cos(math.pi / n), inner * math.sin(math.pi / n)
    length = math.hypot(1 - ix, iy)
    inside = ((1 - x) * iy - y * (1 - ix)) / length
    facet = pick(rng, 0, 1) * 0.9 * edge(side * r, plane.pixel)
    rim = pick(rng, 0, 1) * edge(0.07 - inside, plane.pixel)
    tone = (0.35 + facet + 0.4 * r) * (1 - rim) + 1.9 * rim
    return Surface(np.clip(tone, 0, 2), inside * rng.uniform(0.5, 1.0), edge(inside, plane.pixel))


def spirals(rng: Rng, plane: Plane) -> Surface:
    r, turn = np.hypot(plane.u, plane.v), np.arctan2(plane.v, plane.u) / (2 * math.pi)
    arms, winds, hand = int(rng.integers(1, 4)), rng.uniform(2.2, 3.6), pick(rng, -1, 1)
    reach = r if rng.random() < 0.6 else np.log1p(7 * r) / math.log(8)
    phase = reach * winds + hand * arms * turn + rng.random()
    bar = _band(phase, 1 / winds, rng.uniform(0.4, 0.6), plane.pixel)
    relief = 0.12 / winds * wave(phase) + pick(rng, 0, 0.3, 0.5) * dome(r, 1.0)
    alpha = edge(1 - r, plane.pixel)
    return Surface(bar * (0.8 + 0.5 * r), relief, alpha * (bar if rng.random() < 0.3 else 1))


def butterflies(rng: Rng, plane: Plane) -> Surface:
    u, v, p = np.abs(plane.u), plane.v, plane.pixel
    tone, height, alpha = np.zeros_like(u), np.zeros_like(u), np.zeros_like(u)
    lift = rng.uniform(0.05, 0.45)
    border, spots = rng.uniform(0.1, 0.22), rng.uniform(0.08, 0.15)
    wings = ((0.50, 0.42, 0.40, 0.56, 0.30), (0.52, -0.36, -0.62, 0.58, 0.36))  # x, y, angle, long, wide
    for x0, y0, angle, long, wide in wings:
        long, wide = long * rng.uniform(0.9, 1.08), wide * rng.uniform(0.85, 1.15)
        x, y = _turned(u - x0, v - y0, angle)
        q = np.hypot(x / long, y / (wide * (1 + 0.45 * np.clip(x / long, -1.5, 1.5))))  # wider away from the body
        cover = edge((1 - q) * wide, p)
        ray = 0.16 * np.cos(18 * np.arctan2(v - 0.05, u + 0.15))
        wing = 1.0 + ray + 0.35 * (1 - q)
        wing = wing + (0.1 - wing) * edge((q - 1 + border) * wide, p)
        for sx, sy in ((0.45, 0.0), (0.0, 0.25 * (1 if y0 > 0 else -1))):
            d = np.hypot(x - sx * long, y - sy * wide)
            spot, pupil = edge(spots - d, p), edge(0.5 * spots - d, p)
            wing = wing + (2 - wing) * spot - 1.8 * pupil
        tone = tone * (1 - cover) + cover * wing
        height = np.where(cover > 0.5, lift * u + 0.02 * ray + 0.04 * (1 - q), height)
        alpha = np.maximum(alpha, cover)
    body = edge(1 - np.hypot(u / 0.085, (v + 0.02) / 0.55), p / 0.085)
    feeler = edge(0.028 - np.abs(u - 0.05 - 0.35 * (v + 0.5) ** 2 * 3), p) * ((v < -0.45) & (v > -0.95))
    tone = tone + (0.15 - tone) * feeler
    tone = tone + (0.3 + 0.15 * np.cos(v * 40) - tone) * body
    height = np.where(body > 0.5, 0.15 + dome(u, 0.085), height)
    return Surface(np.clip(tone, 0, 2), height, np.maximum(np.maximum(alpha, body), feeler))


MOTIFS: dict[str, Motif] = {
    "stripes": _patterned(stripes), "zigzags": _patterned(zigzags), "checkers": _patterned(checkers),
    "dots": _patterned(dots), "honeycomb": _patterned(honeycomb), "nets": _patterned(nets),
    "scales": _patterned(scales),
    "rings": rings, "wheels": wheels, "text": text, "faces": faces, "flowers": flowers, "stars": stars,
    "spirals": spirals, "butterflies": butterflies,
}  # fmt: skip
