"""Fixtures for the tests of several packages."""

from __future__ import annotations

import pytest

from support.half import Rounded
from support.short_of_memory import Short
from unitvis.ranking.recorder import Recorder


@pytest.fixture
def emulated_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Recorder computes half precision by the emulation in `support.half`."""
    monkeypatch.setattr(Recorder, "make_step", Rounded.of)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> type[Short]:
    """Every Recorder computes half precision as `support.short_of_memory.Short` does."""
    for name in ("limit", "after", "merging", "raising"):
        monkeypatch.setattr(Short, name, getattr(Short, name))
    monkeypatch.setattr(Short, "sizes", [])
    monkeypatch.setattr(Recorder, "make_step", Short.of)
    return Short
