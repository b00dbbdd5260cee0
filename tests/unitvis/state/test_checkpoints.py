"""Checkpoints: the newest whole one is read, and none is taken for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from unitvis.errors import UnitvisError
from unitvis.state.checkpoints import Arrays, Checkpoints


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "state.npz")


def arrays(number: int) -> Arrays:
    return {"number": np.array(number), "rows": np.arange(1000) + number}


def number(found: Arrays) -> int:
    np.testing.assert_array_equal(found["rows"], np.arange(1000) + found["number"])
    return int(found["number"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_arrays(path: Path) -> None:
    np.savez(path, colour=np.zeros(3))


DAMAGES = [cut, change_a_bit, empty, other_arrays]


def test_the_newest_is_read_and_the_one_before_is_kept(checkpoints: Checkpoints, tmp_path: Path) -> None:
    for count in range(4):
        checkpoints.write(arrays(count))
        assert checkpoints.read(number, arrays(0)) == count
        assert {path.name for path in tmp_path.iterdir()} <= checkpoints.names
    assert checkpoints.names == {"state.npz", "state.previous.npz"} == {path.name for path in tmp_path.iterdir()}
    (tmp_path / "state.npz").unlink()
    assert checkpoints.exist
    assert checkpoints.read(number, arrays(0)) == 2


def test_those_of_another_scan_stay_until_its_successor_has_one(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in range(2):
        checkpoints.write(arrays(count))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    successor = Checkpoints(tmp_path / "state.npz")

    def full(*_: object, **__: object) -> None:
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr("numpy.savez", full)
        with pytest.raises(OSError, match="full"):
            successor.write(arrays(5))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    successor.write(arrays(5))
    assert {path.name for path in tmp_path.iterdir()} == {"state.npz"}  # no damage leads back to the other scan
    successor.write(arrays(6))
    (tmp_path / "state.npz").unlink()
    assert Checkpoints(tmp_path / "state.npz").read(number, arrays(0)) == 5


def test_without_a_checkpoint_none_is_read(checkpoints: Checkpoints) -> None:
    assert not checkpoints.exist
    assert checkpoints.read(number, arrays(0)) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_gives_way_to_the_one_before_with_a_warning(
    damage: Callable[[Path], None], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoints.write(arrays(1))
    checkpoints.write(arrays(2))
    damage(tmp_path / "state.npz")
    with pytest.warns(UserWarning, match=r"state\.npz is damaged \(.+\); going on with the checkpoint before it"):
        assert checkpoints.read(number, arrays(0)) == 1


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_none_is_whole_reading_is_refused(
    damage: Callable[[Path], None], checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoints.write(arrays(1))
    damage(tmp_path / "state.npz")
    for _ in range(2):
        with pytest.raises(UnitvisError, match=r"state\.npz is damaged .*, and there is no other checkpoint; start"):
            checkpoints.read(number, arrays(0))
        assert checkpoints.exist
        (tmp_path / "state.previous.npz").write_bytes(b"damaged as well")


def test_a_write_that_fails_leaves_the_checkpoints_as_they_were(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(arrays(1))
    checkpoints.write(arrays(2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, arrays: Arrays) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unitvis.state.checkpoints.write_arrays", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(arrays(3))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_removing_removes_both_and_nothing_else(checkpoints: Checkpoints, tmp_path: Path) -> None:
    (tmp_path / "other.npz").touch()
    checkpoints.write(arrays(1))
    checkpoints.write(arrays(2))
    checkpoints.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["other.npz"]
    assert not checkpoints.exist
    checkpoints.remove()  # there is nothing left to remove


def test_one_is_due_when_its_time_has_passed_since_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("unitvis.state.checkpoints.time", SimpleNamespace(perf_counter=lambda: clock.now))
    checkpoints = Checkpoints(tmp_path / "state.npz", every=25.0)
    due = []
    for clock.now in (100.0, 124.0, 125.0, 130.0):
        due.append(checkpoints.due)
    assert due == [False, False, True, True]
    checkpoints.write(arrays(1))
    due = []
    for clock.now in (130.0, 154.0, 155.0):
        due.append(checkpoints.due)
    assert due == [False, False, True]


@pytest.mark.parametrize("every", [0, -1.0, float("nan")])
def test_an_interval_that_is_not_above_0_is_refused(every: float, tmp_path: Path) -> None:
    with pytest.raises(UnitvisError, match=f"checkpoints come every {every} seconds; more than 0 are needed"):
        Checkpoints(tmp_path / "state.npz", every)
