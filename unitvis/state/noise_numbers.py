"""Numbers of what a network computes from fixed noise, as a manifest has them, and whether two networks have the same.

Each layer has five numbers (`responses`, see `network.identity.numbers_of`), and each of its channels one (`channels`,
see `network.identity.channel_numbers`): a change of one channel among many is lost in the numbers of the layer. Those
of louder noise (`loud_responses`, `loud_channels`) tell of bounds that the noise itself does not reach.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unitvis.errors import abridged
from unitvis.schema import Is

ROUNDING = 1e-5  # share of a layer's largest response by which other hardware may change a float32 response
CHANNEL_ROUNDING = 1e-4  # share of a layer's mean magnitude by which it may change that of a channel over few places


def encoded(numbers: NDArray[np.float32]) -> str:
    """float32 [n] as text: base64 of the little-endian bytes, six characters a number."""
    return base64.b64encode(numbers.astype("<f4").tobytes()).decode()


def decoded(text: str) -> NDArray[np.float32]:
    """What `encoded` was given; ValueError for any other text."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<f4").astype(np.float32)


def _is_encoded(value: object) -> bool:
    try:
        return isinstance(value, str) and decoded(value).ndim == 1
    except (ValueError, binascii.Error):
        return False


NUMBERS = Is("float32 numbers in base64", _is_encoded)


def changed_layers(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The layers that two descriptions of a model both have and whose numbers differ by more than rounding, in words.

    A layer whose own five numbers agree is named with its channels that differ. Descriptions by earlier versions of
    unitvis lack numbers of channels, or of louder noise: those are not compared.
    """
    quiet, loud = (_changed(one, other, prefix) for prefix in ("", "loud_"))
    return list({**loud, **quiet}.values())


def changed_arrays(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The arrays that two descriptions of a model both have and whose numbers differ by more than rounding, by name.

    Rounding is a share of the number or, for small ones, of a twentieth of the mean magnitude of the array's numbers:
    other hardware rounds a table of sines otherwise.
    """
    arrays = [described.get("arrays") or {} for described in (one, other)]
    changed = []
    for name in sorted(arrays[0].keys() & arrays[1].keys()):
        then, now = (decoded(each[name]).astype(np.float64) for each in arrays)
        least = np.abs(then).mean() / 20 if len(then) else 0
        if then.shape != now.shape or not np.allclose(then, now, rtol=ROUNDING, atol=ROUNDING * least):
            changed.append(name)
    return changed


def _changed(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """What `changed_layers` says of each layer, by name, for the entries of a description that begin with `prefix`."""
    layers, channels = ([d.get(prefix + key) or {} for d in (one, other)] for key in ("responses", "channels"))
    changed = {name: name for name in layers[0] if name in layers[1] and not _same(layers[0][name], layers[1][name])}
    for name in channels[0]:
        if name not in channels[1] or name in changed:
            continue
        then, now = decoded(channels[0][name]), decoded(channels[1][name])
        if then.shape != now.shape:
            changed[name] = name
        elif len(found := np.flatnonzero(~_close(then, now))):
            changed[name] = f"{name} (channel{'s' * (len(found) > 1)} {abridged(list(map(str, found)))})"
    return changed


def _same(one: Any, other: Any) -> bool:
    """Whether a layer's numbers, the largest magnitude first, are equal up to rounding; for anything else, equality."""
    if not all(
        isinstance(value, list) and value and all(isinstance(v, float) for v in value) for value in (one, other)
    ):
        return one == other
    slack = ROUNDING * max(abs(one[0]), abs(other[0]))
    return len(one) == len(other) and all(abs(a - b) <= slack for a, b in zip(one, other, strict=True))


def _close(then: NDArray[np.float32], now: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the numbers of a layer's channels [C] are equal up to rounding.

    Rounding is a share of the channel's own number or, for weaker channels, of the layer's mean: that of a sum which
    cancels out is as large as in others. The layer's largest would let a strong channel hide a change of all others.
    """
    a, b = then.astype(np.float64), now.astype(np.float64)
    finite = np.isfinite(a)
    scale = np.maximum(np.abs(a), np.abs(a[finite]).mean() if finite.any() else 0)
    with np.errstate(invalid="ignore"):
        return (np.abs(a - b) <= CHANNEL_ROUNDING * scale) | (a == b) | (np.isnan(a) & np.isnan(b))
