"""Progress bars: on a terminal only, and none where none are wanted."""

from __future__ import annotations

import io

import pytest

from unitvis.bars import bar, no_bars


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a bar over four images writes."""
    monkeypatch.setattr("sys.stderr", stream)
    with bar(4, "scan", delay=0) as counted:
        for _ in range(4):
            counted.update()
    return "" if stream is None else stream.getvalue()


def test_bars_are_shown_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scan" in shown(Terminal(), monkeypatch)
    assert shown(io.StringIO(), monkeypatch) == ""
    assert shown(None, monkeypatch) == ""
    with no_bars():
        assert shown(Terminal(), monkeypatch) == ""
    assert "scan" in shown(Terminal(), monkeypatch)


def test_short_work_has_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    with bar(4, "draw") as counted:
        counted.update(4)
    assert stream.getvalue().strip() == ""
