"""Scalar fields, from which the pictures are computed: noise, coordinates, anti-aliased edges, light.

A field is a float32 array [R, R] over the pixels of a picture. Coordinates run from -1 to 1, whatever R is.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Field = NDArray[np.floating[Any]]
Rng = np.random.Generator

R = 96  # a picture's width and height in pixels
PIXEL = 2 / R  # size of a pixel in coordinates
_AXIS = np.linspace(-1 + 1 / R, 1 - 1 / R, R, dtype=np.float32)
X: Field = np.ascontiguousarray(np.broadcast_to(_AXIS[None], (R, R)))
Y: Field = np.ascontiguousarray(np.broadcast_to(_AXIS[:, None], (R, R)))
_NOISE_PERIOD = 256  # pixels after which the noise repeats
_MAX_CROP = 128  # pixels of a crop's width and height, at most


@cache
def _noise_bank() -> dict[str, list[Field]]:
    """Periodic Gaussian noise of three roughnesses, computed once; pictures take crops of it."""
    rng = np.random.default_rng(1311_2901)
    f = np.hypot(np.fft.fftfreq(_NOISE_PERIOD)[:, None], np.fft.rfftfreq(_NOISE_PERIOD)[None])
    f[0, 0] = 1
    bank: dict[str, list[Field]] = {}
    for name, power in (("smooth", 2.2), ("natural", 1.5), ("rough", 0.8)):
        spectrum = np.where(f < 1.5 / _NOISE_PERIOD, 0, f**-power)
        bank[name] = []
        for _ in range(12):
            field = np.fft.irfft2(spectrum * np.exp(2j * np.pi * rng.random(f.shape)), (_NOISE_PERIOD, _NOISE_PERIOD))
            padded = np.pad((field / field.std()).astype(np.float32), (0, _MAX_CROP), mode="wrap")
            bank[name] += [padded, np.ascontiguousarray(padded[::-1].T)]
    return bank


def noise(rng: Rng, kind: str = "natural", width: int = R, height: int = R) -> Field:
    """A field of noise with zero mean and unit deviation: a random crop of `height` x `width` pixels, stretched."""
    fields = _noise_bank()[kind]
    choice, y, x = rng.random(3).tolist()
    top, left = int(y * _NOISE_PERIOD), int(x * _NOISE_PERIOD)
    crop = fields[int(choice * len(fields))][top : top + height, left : left + width]
    return crop if crop.shape == (R, R) else stretch(crop)


def stretch(field: Field) -> Field:
    """Resample an array [h, w] to a field [R, R]."""
    image = Image.fromarray(np.ascontiguousarray(field, np.float32))
    return np.asarray(image.resize((R, R), Image.Resampling.BICUBIC))


def pick(rng: Rng, *options: float) -> float:
    """Draw one of a few numbers with equal probability."""
    return options[int(rng.integers(len(options)))]


def shadow(alpha: Field, softness: float, right: float, down: float) -> Field:
    """The shadow of a surface with coverage `alpha`: blurred, and moved by up to 16 pixels; lengths are in pixels."""
    small = Image.new("L", (R // 4 + 8, R // 4 + 8))
    small.paste(Image.fromarray((alpha * 255).astype(np.uint8)).reduce(4), (4, 4))
    left, top = 4 - right / 4, 4 - down / 4
    moved = small.filter(ImageFilter.GaussianBlur(softness / 4)).resize(
        (R, R), Image.Resampling.BILINEAR, (left, top, left + R // 4, top + R // 4)
    )
    return np.asarray(moved, np.float32) / 255


def edge(distance: Field, width: float = PIXEL) -> Field:
    """Coverage, 0 to 1, of the side where `distance` is positive, anti-aliased over `width`."""
    return np.clip(distance / width + 0.5, 0, 1)


def smoothstep(x: Field, low: float, high: float) -> Field:
    """Smoothstep from 0 at `low` to 1 at `high`."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def dome(distance: Field, radius: float) -> Field:
    """Height of a ball of a radius at a distance from its centre; 0 outside."""
    return np.sqrt(np.maximum(radius * radius - distance * distance, 0))


def wave(phase: Field) -> Field:
    """Triangle wave of period 1 between -1 and 1, which is 1 at integer phases."""
    return 4 * np.abs(phase - np.floor(phase) - 0.5) - 1


def scatter(i: Field, j: Field, salt: float) -> Field:
    """A pseudo-random number between 0 and 1 for each cell (i, j) of a pattern, constant over the cell."""
    h = np.sin(np.rint(i) * 12.9898 + np.rint(j) * 78.233 + salt) * 437.5
    return h - np.floor(h)


@dataclass(frozen=True)
class Plane:
    """Local coordinates of an object in the picture, which fills the disc u^2 + v^2 < 1."""

    u: Field
    v: Field
    pixel: float  # size of a picture's pixel in local units


def _rotation(angle: float) -> NDArray[np.float64]:
    """The matrix [2, 2] of a rotation by an angle in radians."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array([[c, s], [-s, c]])


def random_plane(rng: Rng, x: float, y: float, radius: float) -> Plane:
    """Make the plane of an object with this centre and radius, with random rotation, squash, perspective and warp.

    The distribution is the same for every class.
    """
    angle, squash, tilt = rng.uniform(-0.6, 0.6), rng.uniform(0.78, 1), rng.uniform(0, math.pi)
    turn, lean = _rotation(angle), _rotation(tilt)
    matrix = lean.T @ np.diag([1, 1 / squash]) @ lean @ turn / radius
    (a, b), (c, d) = matrix.tolist()
    dx, dy = X - x, Y - y
    u, v = a * dx + b * dy, c * dx + d * dy
    depth = 1 + rng.uniform(-0.22, 0.22) * np.clip(u, -2, 2) + rng.uniform(-0.22, 0.22) * np.clip(v, -2, 2)
    bend = rng.uniform(0, 0.045)
    return Plane(u * depth + bend * noise(rng, "smooth"), v * depth + bend * noise(rng, "smooth"), PIXEL / radius)


@dataclass(frozen=True)
class Light:
    """The light of a picture: the direction (x, y, z) of one lamp, the share of ambient light, and the gloss."""

    x: float
    y: float
    z: float
    ambient: float
    gloss: float

    @classmethod
    def draw(cls, rng: Rng) -> "Light":
        """Draw a random light."""
        azimuth, height = rng.uniform(0, 2 * math.pi), rng.uniform(0.45, 1.0)
        flat = math.cos(height)
        x, y = flat * math.cos(azimuth), flat * math.sin(azimuth)
        return cls(x, y, math.sin(height), rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.6))

    def shade(self, height: Field) -> tuple[Field, Field]:
        """Compute the diffuse (Lambert) and specular (Phong) terms of a height field in coordinates, both [R, R]."""
        nx, ny = np.empty_like(height), np.empty_like(height)
        nx[:, 1:-1] = (height[:, :-2] - height[:, 2:]) / np.float32(2 * PIXEL)
        ny[1:-1] = (height[:-2] - height[2:]) / np.float32(2 * PIXEL)
        nx[:, 0], nx[:, -1], ny[0], ny[-1] = nx[:, 1], nx[:, -2], ny[1], ny[-2]
        facing = np.maximum((nx * self.x + ny * self.y + self.z) / np.sqrt(nx * nx + ny * ny + 1), 0)
        diffuse = self.ambient + (1 - self.ambient) * facing / max(self.z, 0.55)
        shine = facing * facing
        shine = shine * shine
        return diffuse, self.gloss * shine * shine * shine
