"""A scan that was stopped and is resumed gives the bytes of one that was not; damage never gives a wrong result."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import unitvis
from support.commands import TWO_CONVOLUTIONS, model_file
from support.scans import two_convolutions
from unitvis import Interrupted, UnitvisError, cli
from unitvis.decoding.processes import may_start
from unitvis.ranking.recorder import Recorder
from unitvis.scanning.progress import Progress
from unitvis.sources import FileSource
from unitvis.sources.base import usable_cores
from unitvis.state.checkpoints import SCAN_CHECKPOINT, Checkpoints
from unitvis.state.partial import PARTIAL_ARRAYS, Partial
from unitvis.state.sampling import smallest_hashes

COUNT = 70
TRANSFORM = unitvis.Transform(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
PREVIOUS = "progress.previous.npz"


def scan(folder: Path, out: Path | None, model: nn.Module | None = None, **options: object) -> unitvis.Run:
    given = {"transform": TRANSFORM, "progress": False, "batch_size": 8, "every": 1e-6, **options}
    return unitvis.scan(
        model or two_convolutions(), folder, given.pop("layers", None), given.pop("k", 9), out=out, **given
    )


def checkpoint(out: Path) -> Partial | None:
    return Checkpoints(out / SCAN_CHECKPOINT).read(Partial.from_arrays, PARTIAL_ARRAYS)


def result(out: Path) -> tuple[object, ...]:
    manifest = json.loads((out / "manifest.json").read_text())
    kept = {key: manifest[key] for key in ("images", "coverage", "failures", "layers", "model", "source", "k")}
    files = (out / name for name in ("top.npz", "sample.npz", "images.jsonl"))
    return {path.name: path.read_bytes() for path in files if path.exists()}, kept


class StoppedError(Exception):
    """The end of a process, as far as a test in one process can have it."""


def stopping(after: int, how: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """`how` is called once so many batches have been computed, before the checkpoint that follows."""
    seen, real = [0], Progress.after_batch

    def after_batch(self: Progress) -> None:
        seen[0] += 1
        if seen[0] == after:
            how()
        real(self)

    monkeypatch.setattr(Progress, "after_batch", after_batch)


def crash() -> None:
    raise StoppedError


@pytest.mark.parametrize(("batches", "batch_size"), [(1, 8), (2, 7), (5, 7), (9, 8)])
def test_a_scan_that_crashed_goes_on_to_the_same_bytes(
    batches: int, batch_size: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(folder, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopping(batches, crash, patch)
        with pytest.raises(StoppedError):
            scan(folder, tmp_path / "run", batch_size=batch_size)
    asked: list[list[int]] = []
    real = FileSource.batches

    def batches_of(self: FileSource, size: int, *, ids: object = None, **options: object) -> object:
        asked.append(list(range(COUNT) if ids is None else ids))
        return real(self, size, ids=asked[-1], **options)

    monkeypatch.setattr(FileSource, "batches", batches_of)
    run = scan(folder, tmp_path / "run", resume=True, batch_size=16)
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert run.manifest["coverage"] == [[1, 31], [32, 69]]
    files = {"images.jsonl", "manifest.json", "sample.npz", "top.npz"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == files
    good = [id for id in range(COUNT) if id not in (0, 31, 69)]
    done = good[: (batches - 1) * batch_size]  # an image that failed before is tried again
    if done:  # sixteen winners, to see whether the images are the same
        witness = asked.pop(0)
        assert set(witness) <= set(done)
        assert len(witness) == min(len(done), 16)
    assert asked[0] == [id for id in range(COUNT) if id not in done]


def test_a_scan_that_goes_on_in_another_precision_than_was_asked_for_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stopping(3, crash, patch)
        with pytest.raises(StoppedError):
            scan(folder, tmp_path / "run", precision="fp32")
    with pytest.warns(UserWarning, match=r"begun in fp32 and goes on in it, not in fp16 as asked; .* --overwrite"):
        run = scan(folder, tmp_path / "run", resume=True, precision="fp16")
    assert run.manifest["scan"]["precision"] == "fp32"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(
    number: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(folder, tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        stopping(3, lambda: os.kill(os.getpid(), number), patch)
        with pytest.raises(Interrupted, match=r"after 24 of 70 images; resume .* --resume \(resume=True\)") as stopped:
            scan(folder, tmp_path / "run", every=1e9)
    assert stopped.value.code == 128 + number
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    scan(folder, tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_a_second_signal_ends_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    stopping(3, twice, monkeypatch)
    with pytest.raises(Interrupted, match="interrupted twice"):
        scan(folder, tmp_path / "run")


def test_without_a_folder_or_in_another_thread_signals_are_left_alone(folder: Path, tmp_path: Path) -> None:
    class Seeing(nn.Conv2d):
        seen: set[object] = set()  # noqa: RUF012

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add(signal.getsignal(signal.SIGTERM))
            return super().forward(x)

    before = signal.getsignal(signal.SIGTERM)
    scan(folder, None, nn.Sequential(Seeing(3, 2, 3)))
    other = threading.Thread(target=lambda: scan(folder, tmp_path / "run", nn.Sequential(Seeing(3, 2, 3))))
    other.start()
    other.join()
    assert (tmp_path / "run" / "manifest.json").exists()
    assert Seeing.seen == {before}


def unfinished(folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Path:
    """A scan that crashed with two checkpoints, of 24 and 32 images."""
    with monkeypatch.context() as patch:
        stopping(5, crash, patch)
        with pytest.raises(StoppedError):
            scan(folder, out, **options)
    return out


def other_weights() -> nn.Module:
    model = two_convolutions()
    model[0].bias.data[0] += 1
    return model


OTHERS: list[tuple[dict[str, object], str]] = [
    ({"model": other_weights()}, "model.weights is "),
    ({"model": nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh())}, "model.parameters is 443 and 168"),
    ({"transform": unitvis.Transform(mean=(0.5, 0.5, 0.4), std=(0.2, 0.2, 0.2))}, r"transform.mean is \[0.5, 0.5"),
    ({"layers": "0"}, r"layers.2 is \[5, 8, 8\] and nothing"),
    ({"k": 5}, "k is 9 and 5"),
    ({"unit": "neuron"}, "unit is channel and neuron"),
    ({"shard": "1/2"}, "shard is null and 1/2"),
    ({"allow_truncated": True}, "source.decoding.allow_truncated is false and true"),
]


@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_another_scan_is_refused_with_the_difference(
    finished: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    if finished:
        scan(folder, out)
    else:
        unfinished(folder, out, monkeypatch)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for options, message in OTHERS:
        with pytest.raises(UnitvisError, match=rf"then and now\): .*{message}"):
            scan(folder, out, resume=True, **options)
    (folder / "069.png").unlink()
    with pytest.raises(UnitvisError, match=r"source\.images is 70 and 69"):
        scan(folder, out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "raise"}, "'000.png' cannot be used: "),
        ({"max_failures": 0}, "1 images could not be used, more than max_failures=0; the last is '000.png'"),
    ],
)
def test_failures_before_a_crash_count(
    options: dict[str, object], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("031.png", "069.png"):
        shutil.copy(folder / "001.png", folder / name)
    out = unfinished(folder, tmp_path / "run", monkeypatch)
    with pytest.raises(UnitvisError, match=message):
        scan(folder, out, resume=True, **options)


@pytest.mark.parametrize("batches", [6, 9, 99])
def test_images_that_failed_before_a_crash_and_can_be_read_now_are_scanned(
    batches: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the images has more contrast than all others, so that it wins; two that fail again count once."""
    stark, out = folder / "000.png", tmp_path / "run"
    with monkeypatch.context() as patch:
        if batches == 99:  # all images are read, and the run is not written
            patch.setattr(Recorder, "ranked", lambda *_: crash())
        stopping(batches, crash, patch)
        with pytest.raises(StoppedError):
            scan(folder, out)
    part = checkpoint(out)
    assert part is not None
    assert {0, 31} <= part.failures.keys()
    Image.fromarray(np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (12, 12, 3))).save(stark)
    scan(folder, tmp_path / "whole")
    run = scan(folder, out, resume=True, max_failures=2)
    assert 0 in run["0"].images
    assert [failure["id"] for failure in run.manifest["failures"]] == [31, 69]
    assert result(out) == result(tmp_path / "whole")
    scan(folder, out, resume=True)  # the finished run is believed


def test_in_a_shard_too_images_that_failed_are_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = (1, 2)
    out = unfinished(folder, tmp_path / "run", monkeypatch, shard=shard, batch_size=6)
    stopped = checkpoint(out)
    assert stopped is not None
    assert stopped.failures
    for name in ("000.png", "031.png", "069.png"):
        shutil.copy(folder / "001.png", folder / name)
    whole, run = scan(folder, None, shard=shard), scan(folder, out, shard=shard, resume=True)
    assert run.manifest["failures"] == whole.manifest["failures"] == []
    parts = [one.partial for one in (whole, run)]
    assert all(part is not None for part in parts)
    first, second = (part.topk.read() for part in parts if part is not None)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert run.manifest["images"] == whole.manifest["images"] > 0
    scan(folder, out, shard=shard, resume=True)


def test_a_finished_run_is_not_scanned_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = scan(folder, tmp_path / "run")
    before = result(tmp_path / "run")
    monkeypatch.setattr(Recorder, "_rank", None)
    again = scan(folder, tmp_path / "run", resume=True)
    assert again["0"].values.tobytes() == first["0"].values.tobytes()
    assert result(tmp_path / "run") == before
    assert again.source.length == COUNT


@pytest.mark.filterwarnings("ignore:.*float16", "ignore:.*fp16")
def test_a_run_in_half_precision_is_no_answer_to_who_asks_for_an_exact_one(folder: Path, tmp_path: Path) -> None:
    run = scan(folder, tmp_path / "run", precision="fp16")
    assert run.manifest["scan"]["precision"] == "fp16"
    before = result(tmp_path / "run")
    with pytest.raises(UnitvisError, match=r"was scanned with precision fp16, .*give --precision fp16, or start again"):
        scan(folder, tmp_path / "run", resume=True)
    scan(folder, tmp_path / "run", resume=True, precision="fp16")
    assert result(tmp_path / "run") == before


@pytest.mark.parametrize("batches", [3, 99])
def test_a_scan_of_single_neurons_goes_on(
    batches: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"unit": "neuron", "layers": ["2"], "k": 3}
    whole = scan(folder, tmp_path / "whole", **options)
    with monkeypatch.context() as patch, suppress(StoppedError):
        stopping(batches, crash, patch)
        scan(folder, tmp_path / "run", **options)
    with pytest.raises(UnitvisError, match="unit is neuron and channel"):
        scan(folder, tmp_path / "run", layers=["2"], k=3, resume=True)
    run = scan(folder, tmp_path / "run", resume=True, **options)
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert run["2"].values.tobytes() == whole["2"].values.tobytes()


def redrawn(path: Path) -> bytes:
    """Replace a picture by another one; returns what it was."""
    before = path.read_bytes()
    pixels = np.random.default_rng(999).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return before


def test_files_that_changed_since_are_never_paired_with_old_values(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(folder, tmp_path / "whole")
    out = unfinished(folder, tmp_path / "run", monkeypatch)
    saved = checkpoint(out)
    assert saved is not None
    assert saved.seen["id"].tolist() == saved.candidates.tolist()
    winners = np.unique(saved.topk.read().images[:, :9])
    witness = smallest_hashes(winners, 16).tolist()
    path = folder / f"{witness[5]:03}.png"
    before = redrawn(path)
    with pytest.raises(UnitvisError, match=rf"cannot be resumed, because its images .*'{path.name}' is no longer the"):
        scan(folder, out, resume=True)
    path.write_bytes(before)
    shutil.copytree(out, tmp_path / "again")
    scan(folder, out, resume=True)
    assert result(out) == result(tmp_path / "whole")

    records = {record["id"]: record for record in read_records(tmp_path / "whole")}
    other = next(id for id in winners.tolist() if id not in witness and id in records)  # a winner to the end
    redrawn(folder / f"{other:03}.png")
    monkeypatch.setattr(Recorder, "_rank", None)  # it is said before anything more is scanned
    said = rf"'{other:03}.png' is no longer the file that was .* differs; restore it, or scan again \(--overwrite\)"
    with pytest.raises(UnitvisError, match=said):
        scan(folder, tmp_path / "again", resume=True)


def read_records(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_array_that_changed_since_is_refused(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "x.npy", tmp_path / "run"
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 12, 12, 3), np.uint8)
    np.save(path, pixels)
    unfinished(path, out, monkeypatch, precision=precision)
    np.save(path, pixels[:, ::-1])
    with pytest.raises(UnitvisError, match=r"its images have changed: 'image \d+' is no longer the image that"):
        scan(path, out, resume=True, precision=precision)
    np.save(path, pixels)
    run = scan(path, out, resume=True, precision=precision)
    assert run.manifest["witness"]["images"] == 16
    assert run.manifest["images"] == COUNT


@pytest.mark.parametrize("kind", ["uint8", "float", "pack"])
def test_one_winner_of_an_array_that_changed_is_refused(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.npy"
    if kind == "pack":
        unitvis.pack(folder, path, unitvis.Transform(), progress=False)
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 12, 12, 3), np.uint8)
        np.save(path, pixels if kind == "uint8" else (pixels.transpose(0, 3, 1, 2) / 128 - 1).astype(np.float32))
    out, before = unfinished(path, tmp_path / "run", monkeypatch), path.read_bytes()
    part = checkpoint(out)
    assert part is not None
    assert part.seen["id"].tolist() == part.candidates.tolist()
    spread = np.linspace(0, COUNT - 1, 16).astype(int)  # the rows by which a pack is known
    others = np.setdiff1d(part.noted_winners, [*smallest_hashes(part.noted_winners, 16), *spread])
    assert len(others) > 3
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "_rank", None)
        for id in others.tolist():
            rows = np.load(path, mmap_mode="r+")
            rows[id, 2, 2] = rows[id, 2, 2][::-1] + 1
            rows.flush()
            said = rf"its images have changed: '.*{id}(.png)?' is no longer .* differ; restore them, or .* \(--over"
            with pytest.raises(UnitvisError, match=said):
                scan(path, out, resume=True)
            path.write_bytes(before)
    manifest = scan(path, out, resume=True).manifest
    assert manifest["images"] + len(manifest["failures"]) == COUNT


class Scaled(nn.Module):
    """Two convolutions whose responses a factor changes by less than the numbers of the network's identity tell."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.net, self.scaled = two_convolutions(), lambda x: x * factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.scaled(x))


def test_other_responses_of_the_same_images_are_not_called_other_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = unfinished(folder, tmp_path / "run", monkeypatch, model=Scaled(1.0))
    said = r"because its responses have changed and its images have not: .* differs: '\d+.png' gave .*; restore that"
    with pytest.raises(UnitvisError, match=said):
        scan(folder, out, Scaled(1.000001), resume=True)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"state.npy") + 400] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage: Callable[[Path], object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(folder, tmp_path / "whole")
    out = unfinished(folder, tmp_path / "run", monkeypatch)
    damage(out / SCAN_CHECKPOINT)
    if (out / SCAN_CHECKPOINT).exists():
        with pytest.warns(UserWarning, match=r"progress.npz is damaged .*; going on with the checkpoint before it"):
            scan(folder, out, resume=True)
    else:
        scan(folder, out, resume=True)
    assert result(out) == result(tmp_path / "whole")


def test_two_damaged_checkpoints_are_an_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = unfinished(folder, tmp_path / "run", monkeypatch)
    cut(out / SCAN_CHECKPOINT)
    flip(out / PREVIOUS)
    with pytest.raises(UnitvisError, match=r"is damaged .* no other checkpoint; start again with --overwrite"):
        scan(folder, out, resume=True)
    scan(folder, out, overwrite=True)
    assert not (out / SCAN_CHECKPOINT).exists()


def test_a_disk_that_fills_up_keeps_the_checkpoint_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(folder, tmp_path / "whole")
    real, calls = os.fsync, [0]

    def full(number: int) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(UnitvisError, match=r"could not be written into .*run: No space left on device; fix"):
            scan(folder, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted([PREVIOUS, SCAN_CHECKPOINT])
    scan(folder, tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_a_disk_that_fills_up_at_the_very_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scan(folder, tmp_path / "whole")

    def full(file: object, **arrays: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("numpy.savez_compressed", full)
        with pytest.raises(UnitvisError, match=r"the run could not be written into .*run: No space left on device"):
            scan(folder, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(unitvis.Run, "write", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match="interrupted after the scan, before its run was written; resume"):
            scan(folder, tmp_path / "run", resume=True)
    scan(folder, tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_a_disk_that_fills_up_while_the_pictures_are_drawn(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scan(folder, tmp_path / "run")
    real = Image.Image.save

    def full(image: Image.Image, path: object, *options: object, **named: object) -> None:
        real(image, path, *options, **named)  # type: ignore[arg-type]
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert cli.main(["render", str(tmp_path / "run")]) == cli.USAGE
    said = capsys.readouterr().err
    assert "the run is complete, but its pictures could not be written into" in said
    assert "No space left on device; fix that, then draw them with `unitvis render`" in said
    assert not list((tmp_path / "run").rglob("*.part"))
    assert cli.main(["render", str(tmp_path / "run")]) == cli.DONE


def test_a_folder_that_was_removed_meanwhile_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping(3, lambda: shutil.rmtree(tmp_path / "run"), monkeypatch)
    with pytest.raises(UnitvisError, match=r"after 24 of 70 images the checkpoint could not be written into .*No such"):
        scan(folder, tmp_path / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="no lock is taken")
@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
def test_two_commands_never_write_into_one_folder(
    options: dict[str, object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = scan(folder, tmp_path / "whole"), tmp_path / "run"
    refused = "another command is writing into .*run; wait for its end, or give another path"

    def second() -> None:
        if not options:  # the first has written nothing yet when the second begins
            for path in out.iterdir():
                path.unlink()
        for command in (lambda: scan(folder, out, **options), lambda: whole.save(out, overwrite=True)):
            with pytest.raises(UnitvisError, match=refused):
                command()

    with monkeypatch.context() as patch:
        stopping(3, second, patch)
        run = scan(folder, out)
    assert result(out) == result(tmp_path / "whole")
    assert run.save(out, overwrite=True) == out  # the lock is free again


def test_what_a_folder_holds_is_respected(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = unfinished(folder, tmp_path / "run", monkeypatch)
    with pytest.raises(UnitvisError, match=r"not finished; resume it \(--resume\) or start again \(--overwrite\)"):
        scan(folder, out)
    with pytest.raises(UnitvisError, match="exclude each other"):
        scan(folder, out, resume=True, overwrite=True)
    with pytest.raises(UnitvisError, match="resume needs out"):
        scan(folder, None, resume=True)
    scan(folder, tmp_path / "new", resume=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / f"{SCAN_CHECKPOINT}.part").write_bytes(b"half")
    scan(folder, tmp_path / "killed", resume=True)
    assert result(tmp_path / "killed") == result(tmp_path / "new")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(UnitvisError, match="holds no run"):
        scan(folder, tmp_path / "thesis", resume=True)
    with pytest.raises(UnitvisError, match="a stream is read once, so a scan of it cannot be resumed"):
        scan(iter([torch.zeros(2, 3, 9, 9)]), tmp_path / "stream", resume=True)
    with pytest.raises(UnitvisError, match="every 0 seconds"):
        scan(folder, tmp_path / "never", every=0)


def test_an_older_run_stays_until_the_resumed_one_is_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    scan(folder, out, k=3)
    before = result(out)
    unfinished(folder, out, monkeypatch, overwrite=True)
    assert result(out) == before
    scan(folder, out, resume=True)
    assert unitvis.load(out).manifest["k"] == 9


class Refuses(nn.Module):
    """Fails when it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")


@pytest.mark.parametrize("options", [{"layers": "nope"}, {"k": 0}, {"model": Refuses()}, {"batch_size": 0}])
def test_a_scan_that_cannot_start_costs_no_checkpoint(
    options: dict[str, object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    unfinished(folder, out, monkeypatch)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "progress.npz" in before
    with pytest.raises(UnitvisError):
        scan(folder, out, overwrite=True, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_run_that_is_saved_over_an_unfinished_scan_ends_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = scan(folder, None), tmp_path / "run"
    unfinished(folder, out, monkeypatch)
    run.save(out, overwrite=True)
    assert not list(out.glob("progress*"))
    assert unitvis.load(out)


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stderr is not None
    return iter(process.stderr.readline, "")


PROGRAM = """
import sys
from unitvis import cli
from unitvis.scanning.progress import Progress
from unitvis.sources import encoded
encoded.MIN_IMAGES = 1  # worker processes read even few images
real = Progress.after_batch
def after_batch(self):
    real(self)
    print(self._recorder.images, file=sys.stderr, flush=True)
    sys.stdin.readline()  # the test says when to go on
Progress.after_batch = after_batch
sys.exit(cli.main(sys.argv[1:]))
"""


def children(process: int) -> list[int]:
    """Numbers of the processes that a process has started, where the system tells them."""
    path = Path(f"/proc/{process}/task")
    return [int(one) for task in path.glob("*/children") for one in task.read_text().split()]


def lives(process: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for has no environment any more."""
    try:
        return bool(Path(f"/proc/{process}/environ").read_bytes())
    except OSError:
        return False


def test_processes_that_are_killed_or_stopped(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--mean", ".5", ".5", ".5", "--std", ".2", ".2", ".2", "--batch-size", "4", "--checkpoint-every", "1e-9"]
    command = ["scan", model_file(tmp_path, TWO_CONVOLUTIONS), str(folder), *numbers, "-o"]
    assert cli.main([*command, str(tmp_path / "whole")]) == cli.SKIPPED
    arguments = [sys.executable, "-c", PROGRAM, *command, str(tmp_path / "run"), "--resume"]
    seen: dict[int, list[int]] = {signal.SIGKILL: [], signal.SIGTERM: []}
    workers: list[int] = []
    for number, counts in seen.items():
        with subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        ) as process:
            assert process.stdin is not None
            rest = ""
            for line in lines(process):
                if not line.strip().isdigit():
                    rest += line
                    continue
                counts.append(int(line))
                if counts[-1] % 20 > 8:
                    workers += children(process.pid)
                    process.send_signal(number)  # while the process waits, so that it cannot be over before
                    if number == signal.SIGKILL:
                        break
                process.stdin.write("\n")
            rest += "".join(lines(process))
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        assert "Traceback" not in rest
    assert seen == {signal.SIGKILL: [4, 8, 12], signal.SIGTERM: [16]}
    assert "resume with the same command and --resume" in rest
    assert len(workers) == (2 * usable_cores() if may_start() else 0)
    deadline = time.monotonic() + 300
    while any(map(lives, workers)):  # they end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert cli.main([*command, str(tmp_path / "run"), "--resume"]) == cli.SKIPPED
    assert result(tmp_path / "run") == result(tmp_path / "whole")
    assert "67 images" in capsys.readouterr().out


def test_checkpoints_come_as_often_as_asked(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[float] = []
    clock = [0.0]
    monkeypatch.setattr("unitvis.state.checkpoints.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(Progress, "snapshot", lambda self: written.append(clock[0]) or crash_free(self))
    stopping(-1, crash, monkeypatch)
    real = Progress.after_batch

    def tick(self: Progress) -> None:
        clock[0] += 10
        real(self)

    def crash_free(self: Progress) -> object:
        return self._recorder.snapshot(self.identity, self._source.failure_reasons, 0.0)

    monkeypatch.setattr(Progress, "after_batch", tick)
    scan(folder, tmp_path / "run", every=25)
    assert written == [30.0, 60.0, 90.0, 90.0]  # the last one before the second pass


def test_time_is_summed_over_attempts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = unfinished(folder, tmp_path / "run", monkeypatch)
    before = checkpoint(out)
    assert before is not None
    start = time.perf_counter()
    run = scan(folder, out, resume=True)
    assert run.manifest["seconds"]["scan"] > before.seconds > 0
    assert run.manifest["seconds"]["checkpoints"] < time.perf_counter() - start


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("owner", "during"),
    [(Recorder, "ranked"), (importlib.import_module("unitvis.scanning.scan"), "finish_run"), (unitvis.Run, "write")],
)
def test_after_the_last_image_the_first_signal_ends_it(
    owner: object, during: str, number: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(folder, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(owner, during, lambda *_, **__: os.kill(os.getpid(), number))
        with pytest.raises(Interrupted, match="after the scan, before its run was written; resume") as ended:
            scan(folder, tmp_path / "run")
    assert ended.value.code == 128 + number
    assert len(checkpoint(tmp_path / "run").coverage) == COUNT - 3  # nothing is to be read again but the winners
    scan(folder, tmp_path / "run", resume=True)
    assert result(tmp_path / "run") == result(tmp_path / "whole")
