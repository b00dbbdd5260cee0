"""A scan with worker processes that is killed at random moments leaves no process, and goes on to the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unitvis.decoding.processes import may_start

pytestmark = pytest.mark.skipif(not may_start(), reason="there are no worker processes on this system")

DEADLINE = 300  # seconds after which what a test waits for is taken to never happen

# Arguments: a folder of images, a folder for runs, a marker, a seed, a number of trials. A trial is a scan that is
# killed, is resumed and perhaps killed again, and is resumed to its end. Moments are counted in calls of functions,
# of all or of those that reach the system, among which writing checkpoints has most: so they do not depend on how fast
# a machine is. Scans are forks, so that PyTorch is imported once. Prints for each trial: [exit status of each scan],
# [number of worker processes at each kill].
PROGRAM = """
import io, json, os, random, signal, sys
from pathlib import Path
import torch._dynamo, torch.fx.experimental.proxy_tensor  # once, not in each fork
import unitvis
from support.scans import two_convolutions
from unitvis.sources import encoded

images, out, marker, seed, trials = sys.argv[1:]
os.environ["UNITVIS_TEST"] = marker  # which the workers inherit
encoded.MIN_IMAGES = 17  # worker processes read so few images, but not the winners that a resumed scan begins with
transform = unitvis.Transform(mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
model = two_convolutions()

def reaches_the_system(event, function):
    modules = "posix", "fcntl", "select", "_posixsubprocess"
    return event == "c_call" and (
        getattr(function, "__module__", None) in modules or isinstance(getattr(function, "__self__", None), io.IOBase)
    )

def scan(name, moment):
    told, tell = os.pipe()
    process = os.fork()
    if not process:
        calls = [0, 0]  # all, and those that reach the system
        def count(_, event, function):
            calls[0] += 1
            calls[1] += reaches_the_system(event, function)
            if moment and calls[moment[0]] == moment[1]:
                sys.setprofile(None)
                workers = sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children"))
                os.write(tell, str(workers).encode())
                os.kill(os.getpid(), signal.SIGKILL)
        sys.setprofile(count)
        unitvis.scan(model, images, transform=transform, out=f"{out}/{name}", resume=True, batch_size=8, workers=2,
            every=1e-9, progress=False)
        sys.setprofile(None)
        os.write(tell, json.dumps(calls).encode())
        os._exit(0)
    os.close(tell)
    status = os.waitpid(process, 0)[1]
    with os.fdopen(told) as file:
        return status, json.loads(file.read() or "null")

chance = random.Random(int(seed))
status, calls = scan("whole", None)
print(json.dumps([status, calls]), flush=True)
for trial in range(int(trials)):
    ends = []
    for part in (0.9, 1.0, None):  # a little less than all, so that the first scan is always killed
        kind = chance.randrange(2)
        moment = None if part is None else (kind, chance.randrange(1, int(part * calls[kind])))
        ends.append(scan(f"run{trial}", moment))
    print(json.dumps([[status for status, _ in ends], [told for status, told in ends if status]]), flush=True)
"""


def started_with(marker: str) -> list[int]:
    """Numbers of the processes that were started with a marker in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"UNITVIS_TEST={marker}\0".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def result(run: Path) -> tuple[object, ...]:
    """What must be the same for all scans of a folder."""
    manifest = json.loads((run / "manifest.json").read_text())
    kept = {key: manifest[key] for key in ("images", "coverage", "failures", "layers", "model", "source", "k")}
    return *((run / name).read_bytes() for name in ("top.npz", "sample.npz", "images.jsonl")), kept


@pytest.mark.parametrize(("seed", "trials"), [(1, 3), pytest.param(2, 100, marks=pytest.mark.slow)])
def test_kills_at_random_moments(seed: int, trials: int, folder: Path, tmp_path: Path) -> None:
    marker = os.urandom(8).hex()
    root = Path(__file__).parents[3]
    paths = os.pathsep.join(map(str, (root, root / "kernels", root / "tests")))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(tmp_path), marker, str(seed), str(trials)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, *ends = map(json.loads, done.stdout.splitlines())
    assert whole[0] == 0
    assert len(ends) == trials
    for number, (statuses, _) in enumerate(ends):
        assert statuses[0] == 9
        assert statuses[1] in (0, 9), done.stderr
        assert statuses[2] == 0, done.stderr
        assert result(tmp_path / f"run{number}") == result(tmp_path / "whole")
        assert sorted(path.name for path in (tmp_path / f"run{number}").iterdir()) == sorted(
            path.name for path in (tmp_path / "whole").iterdir()
        )
    assert any(2 in workers for _, workers in ends)  # some were killed while images were read
    deadline = time.monotonic() + DEADLINE
    while started_with(marker):  # they end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.1)
