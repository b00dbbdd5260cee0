"""Fixtures for the tests of several packages."""

from __future__ import annotations

import pytest

from support.half import Rounded
from unitvis.ranking.recorder import Recorder


@pytest.fixture
def emulated_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Recorder computes half precision by the emulation in `support.half`."""
    monkeypatch.setattr(Recorder, "make_step", Rounded.of)
